"""Selectors and reuse as fields of every method: which tables are read, and when chosen."""

from dataclasses import replace

import pytest
import torch
from runs import on, run
from tiny import tiny_wan

import dit_accel
from dit_accel import ops
from dit_accel.methods import Call, find, selectors
from dit_accel.methods.pooled import Pooled
from dit_accel.methods.reuse import Reuse
from dit_accel.methods.selectors.base import Scored
from dit_accel.methods.selectors.sub import Sub
from dit_accel.methods.topk import TopK

TAKERS = ("topk", "pooled", "rectified", "shared", "sla")


def qkv(n: int = 640) -> list[torch.Tensor]:
    return [2 * torch.randn(1, 2, n, 16) for _ in range(3)]


def call(step: int = 4, **options) -> Call:
    return Call(**{"keep": 0.3, "grid": (10, 8, 8), "step": step, **options})


@pytest.mark.parametrize("name", TAKERS)
def test_every_method_chooses_by_its_selector(name):
    q, k, v = qkv()
    for text in ("means", "sub", "sub(8)"):
        method, seen = find(name)(0.3, select=text), []
        method(q, k, v, call(note=seen.append))
        if name == "rectified":
            table = method.choose(q, k, call())[0]
        else:
            parts = {"means": 1, "sub": 4, "sub(8)": 8}[text]
            table = ops.block_table(q, k, 0.3, parts=parts)
            seen = seen if name != "shared" else [method.table(q, k, call())]
        assert torch.equal(seen[-1].to_mask(), table.to_mask())
    assert not torch.equal(table.to_mask(), find(name)(0.3).chosen(q, k, call())[0].to_mask())


@pytest.mark.parametrize("name", TAKERS)
def test_all_blocks_by_any_selector_are_dense(name):
    q, k, v = qkv(200)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for text in ("means", "sub"):
        out = find(name)(1.0, select=text)(q, k, v, call(keep=1.0, grid=None))
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


def test_a_selector_of_scores_is_one_method():
    class Reverse(Scored):
        name, description = "reverse", "the blocks from the last on"

        def scores(self, q, k, call, sizes):
            blocks = [-(-x.shape[2] // n) for x, n in zip((q, k), sizes, strict=True)]
            return torch.arange(blocks[1]).float().expand(*q.shape[:2], *blocks)

    q, k, v = qkv()
    forced = torch.zeros(10, dtype=torch.bool)
    forced[0] = True
    table, means = TopK(select=Reverse()).chosen(q, k, call(forced=forced, n_forced=1))
    assert means is None and (table.indices == torch.tensor([0, 7, 8, 9])).all()
    assert Pooled(select=Reverse())(q, k, v, call()).isfinite().all()


def tables(method, calls, tokens):
    """The mask that each call reads."""
    found = []
    for at, (q, k, v) in zip(calls, tokens, strict=True):
        method(q, k, v, replace(at, note=lambda t: found.append(t.to_mask())))
    return found


def test_a_table_serves_so_many_steps():
    state, tokens = {}, [qkv() for _ in range(6)]
    calls = [call(step, state=state) for step in range(3, 9)]
    found = tables(TopK(select="sub", reuse="3"), calls, tokens)
    fresh = tables(TopK(select="sub"), [call(state={})] * 6, tokens)
    for i, mask in enumerate(found):
        assert torch.equal(mask, fresh[i - i % 3])
    assert not torch.equal(fresh[0], fresh[1])


def test_both_passes_read_the_table_of_the_first():
    together, tokens = {}, [qkv() for _ in range(4)]
    calls = [
        call(step, state={}, together=together, passname=name)
        for step in (3, 4)
        for name in ("cond", "uncond")
    ]
    found = tables(TopK(reuse="passes"), calls, tokens)
    fresh = tables(TopK(), calls, tokens)
    assert all(torch.equal(found[i], fresh[i - i % 2]) for i in range(4))
    apart = tables(TopK(reuse="1"), calls, tokens)
    assert all(map(torch.equal, apart, fresh))


@pytest.mark.parametrize(
    "change",
    [{"keep": 0.5}, {"kv_len": 600}, {"grid": None}, {"kv_len": torch.tensor([600])}, {"step": 2}],
    ids=str,
)
def test_another_call_chooses_its_own(change):
    state, tokens = {}, [qkv() for _ in range(2)]
    calls = [call(state=state), call(**{"step": 5, "state": state, **change})]
    found = tables(TopK(reuse="9"), calls, tokens)
    fresh = tables(TopK(), [replace(x, state={}) for x in calls], tokens)
    assert all(map(torch.equal, found, fresh))


def test_other_tokens_choose_their_own():
    state = {}
    method = TopK(reuse="9")
    for n in (640, 320, 640):
        q, k, v = qkv(n)
        assert method.chosen(q, k, call(state=state))[0].n_q == n


def test_texts_and_their_objects():
    for text in ("means", "sub", "sub(8)"):
        assert str(selectors.find(text)) == text
    for text in ("none", "4", "passes", "4+passes"):
        assert str(Reuse.read(text)) == text
    config = dit_accel.AccelConfig(Pooled(0.1, select=Sub(8), reuse=Reuse(4, True)))
    again = dit_accel.AccelConfig.from_dict(config.to_dict())
    assert again == config and config.to_dict()["method"]["select"] == "sub(8)"
    assert {"means", "sub"} < set(selectors.infos())


def test_a_recipe_spells_the_choice():
    from dit_accel.generation.recipe import _spelled

    method = Pooled(0.1, select="sub(8)", reuse="4+passes")
    assert _spelled(method) == 'dit_accel.Pooled(keep=0.1, select="sub(8)", reuse="4+passes")'
    assert eval(_spelled(method)) == method
    assert method.label == "pooled/sub(8), reuse 4+passes" and Pooled().label == "pooled"


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: TopK(select="best"), "unknown selector 'best': choose one of means, sub"),
        (lambda: TopK(select="sub(3)"), "2, 4, 8, 16, 32 or 64 parts, not 3"),
        (lambda: TopK(select="sub(4,4)"), "selector sub does not take 4, 4"),
        (lambda: TopK(select="means(2)"), "selector means does not take 2"),
        (lambda: TopK(reuse="often"), "not 'often'"),
        (lambda: TopK(reuse="3+4"), "not '3\\+4'"),
        (lambda: Reuse(0), "≥ 1, not 0"),
        (lambda: find("rettention")(select="sub"), "rettention has its own choice of blocks"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_selector_is_a_selector():
    with pytest.raises(ValueError, match="select is .*, not 4"):
        TopK(select=4)


def test_a_table_serves_while_queries_stay_alike():
    """Queries turn by and by away from those that the table was chosen for."""
    q, k, v = qkv()
    q = q + 2  # blocks have means
    other = torch.randn(1, 2, 1, 16) * 6
    shares = (0.0, 0.05, 0.1, 0.6, 0.65)
    tokens = [(q + share * other, k, v) for share in shares]
    means = [ops.block_means(x, 64) for x, _, _ in tokens]

    def alike(i, j):
        return float(torch.nn.functional.cosine_similarity(means[i], means[j], dim=-1).mean())

    bound = (alike(0, 2) + alike(0, 3)) / 2
    assert alike(0, 2) > bound > alike(0, 3) and alike(3, 4) > bound
    calls = [call(step, state=state) for state in [{}] for step in range(3, 8)]
    found = tables(TopK(select="sub", reuse=f"9+drift{bound:.4f}"), calls, tokens)
    fresh = tables(TopK(select="sub"), [call(state={})] * 5, tokens)
    for i, j in enumerate((0, 0, 0, 3, 3)):
        assert torch.equal(found[i], fresh[j])
    assert not torch.equal(fresh[0], fresh[3])
    strict = TopK(select="sub", reuse="9+drift1")
    always = tables(strict, [call(3, state={})] * 2, [tokens[0], tokens[3]])
    assert torch.equal(always[1], fresh[3])


@pytest.mark.parametrize("passes", [False, True])
def test_layers_read_what_their_leader_reads(passes):
    """Layers 1 and 3 choose; layer 0 has no leader before it."""
    states: dict = {}
    calls = [
        call(
            step,
            layer=layer,
            passname=name,
            state=states.setdefault((name, layer), {}),
            together=states.setdefault(layer, {}),
            across=states.setdefault((name, "across"), {}),
        )
        for step in (3, 4)
        for name in ("cond", "uncond")[: 1 + passes]
        for layer in range(5)
    ]
    text = "passes+layers:1,3" if passes else "layers:1,3"
    tokens = [qkv() for _ in calls]
    found = tables(TopK(reuse=text), calls, tokens)
    fresh = tables(TopK(), [replace(x, state={}, together={}, across={}) for x in calls], tokens)
    for i, at in enumerate(calls):
        first = i - i % (5 * (1 + passes))  # of this step
        own = first if at.layer == 0 and passes else i - i % 5
        own = (
            own if at.layer == 0 else (first if passes else i - i % 5) + (1 if at.layer < 3 else 3)
        )
        assert torch.equal(found[i], fresh[own]), (i, at.layer)


def test_a_leader_of_another_step_or_shape_leads_nobody():
    across: dict = {}
    method = TopK(reuse="layers:0")
    first, second, third = (qkv() for _ in range(3))
    method.chosen(*first[:2], call(layer=0, across=across))
    for at in (call(5, layer=1, across=across), call(layer=1, across=across, keep=0.5)):
        wanted = TopK().chosen(*second[:2], at)[0].to_mask()
        assert torch.equal(method.chosen(*second[:2], at)[0].to_mask(), wanted)
    wanted = TopK().chosen(*first[:2], call())[0].to_mask()
    assert torch.equal(method.chosen(*third[:2], call(layer=1, across=across))[0].to_mask(), wanted)


def test_a_pipeline_shares_tables_between_layers():
    pipe = tiny_wan()
    found = {}
    for text in ("none", "layers:0", "layers:0,1", "3+drift0.5+passes+layers:0"):
        with on(pipe, TopK(0.4, reuse=text)) as handle:
            found[text] = run(pipe)
            assert not handle.report().fallbacks
    assert torch.equal(found["none"], found["layers:0,1"])
    assert not torch.equal(found["none"], found["layers:0"])


def test_texts_of_drift_and_layers():
    drifts = ("8+drift0.9999999", "8+drift1e-05")
    for text in ("8+drift0.9", "layers:0,4", "4+drift0.95+passes+layers:1,2", *drifts):
        assert str(Reuse.read(text)) == text
        config = dit_accel.AccelConfig(Pooled(0.1, reuse=text))
        assert dit_accel.AccelConfig.from_dict(config.to_dict()) == config
    for text, match in (
        ("drift0.9", "ends the steps of a table"),
        ("8+drift1.5", "ends the steps of a table"),
        ("8+drift0.9.9", "reuse has numbers"),
        ("layers:1,1", "leaders are numbers of layers"),
        ("4+4", "reuse is none, a number of steps"),
        ("layers", "reuse is none, a number of steps"),
    ):
        with pytest.raises(ValueError, match=match):
            Reuse.read(text)
