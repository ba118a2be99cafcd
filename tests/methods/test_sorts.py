"""The order of each head's tokens: by kind, by profile, by clusters."""

from dataclasses import replace

import pytest
import torch
from runs import on, run
from tiny import tiny_flux, tiny_wan

import dit_accel
from dit_accel.app.ask import Ask, BadField, Limits
from dit_accel.forward.order import token_order
from dit_accel.generation.options import How, What
from dit_accel.generation.recipe import _spelled
from dit_accel.methods import Call, find
from dit_accel.methods.budget import Profile
from dit_accel.methods.reuse import Reuse
from dit_accel.methods.sorts import Sort, clustered, put
from dit_accel.methods.topk import TopK

GRID, N = (5, 8, 8), 320
TAKERS = ("topk", "pooled", "rectified", "shared", "sla")
BEST = ["time", "none", "tile"]


def qkv(text=0):
    return [2 * torch.randn(1, 3, n, 16) for n in (N, N + text, N + text)]


def saved(path, best=BEST):
    curves = {
        kind: {"0": [{"0.3": 0.1 if kind == own else 0.5} for own in best]} for kind in set(best)
    }
    Profile("topk", {"means": {}}, {}, {}, curves).save(path)
    return f"per-head({path})"


def call(**options):
    return Call(**{"keep": 0.3, "grid": GRID, **options})


def ordered(kind, q, k, v, first=0):
    """q, k, v in an order of the model, and what undoes it."""
    index = torch.arange(N) if kind == "none" else token_order(kind, GRID)
    keys = torch.arange(k.shape[2])
    keys[first : first + N] = first + index
    return q[:, :, index], k[:, :, keys], v[:, :, keys], index.argsort()


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 3)])
def test_tokens_are_put_as_they_are_laid_out(shape):
    index = torch.rand(*shape, 20).argsort(-1)
    for x in (torch.randn(2, 20, 3, 8).transpose(1, 2), torch.randn(2, 3, 20, 8)):
        x.requires_grad_()
        out = put(x, index)
        wanted = x.take_along_dim(index[..., None], 2)
        assert torch.equal(out, wanted) and (shape == (1, 1) or out.stride() == x.stride())
        weight = torch.randn_like(out)
        mine, other = (torch.autograd.grad(y, x, weight)[0] for y in (out, wanted))
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("sort", ["time", "tile", "hilbert", "clusters", "mixed"])
def test_all_blocks_are_dense_in_any_order(name, sort, tmp_path):
    if (name, sort) == ("shared", "clusters"):
        return
    sort = saved(tmp_path / "p.json") if sort == "mixed" else sort
    q, k, v = qkv(40)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for text_first in (False, True):
        out = find(name)(1.0, sort=sort)(q, k, v, call(keep=1.0, text_first=text_first))
        torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("text_first", [False, True])
def test_one_order_for_all_heads_is_that_of_the_model(name, text_first):
    q, k, v = qkv(64)
    forced = torch.zeros(6, dtype=torch.bool)
    forced[0 if text_first else 5] = True
    told = {"forced": forced, "n_forced": 1, "text_first": text_first}
    *there, back = ordered("time", q, k, v, 64 * text_first)
    expected = find(name)(0.3, block_q=64)(*there, call(**told, state={}))[:, :, back]
    found = find(name)(0.3, block_q=64, sort="time")(q, k, v, call(**told, state={}))
    assert torch.equal(found, expected)
    carried = token_order("hilbert", GRID)  # the tokens come in another order of the model
    keys = torch.arange(k.shape[2])
    keys[64 * text_first :][:N] = 64 * text_first + carried
    told["index"] = carried
    method = find(name)(0.3, block_q=64, sort="time")
    again = method(q[:, :, carried], k[:, :, keys], v[:, :, keys], call(**told, state={}))
    torch.testing.assert_close(again[:, :, carried.argsort()], expected)


def test_each_head_is_as_if_all_had_its_order(tmp_path):
    sort = saved(tmp_path / "p.json")
    q, k, v = qkv()
    found = TopK(0.3, block_q=64, sort=sort)(q, k, v, call())
    for head, kind in enumerate(BEST):
        alone = TopK(0.3, block_q=64, sort=kind)(q, k, v, call())
        torch.testing.assert_close(found[:, head], alone[:, head])
    some = call(heads=(1, 2))  # a process's own
    part = TopK(0.3, block_q=64, sort=sort)(q[:, 1:], k[:, 1:], v[:, 1:], some)
    torch.testing.assert_close(part, found[:, 1:])
    turned = call(heads=(2, 0, 1))
    other = TopK(0.3, block_q=64, sort=sort)(*(x[:, [2, 0, 1]] for x in (q, k, v)), turned)
    torch.testing.assert_close(other, found[:, [2, 0, 1]])


def test_a_state_and_a_table_stay_with_the_order(tmp_path):
    """Whatever the keep of a step is, tokens are where the full step left them."""
    sort, state, tokens = saved(tmp_path / "p.json"), {}, qkv()
    method = find("shared")(0.3, block_q=64, sort=sort, period=9)
    full = method(*tokens, call(step=3, state=state))
    dense = torch.nn.functional.scaled_dot_product_attention(*tokens)
    torch.testing.assert_close(full, dense, atol=1e-5, rtol=1e-5)
    again = method(*tokens, call(step=4, state=state, keep=0.6))
    torch.testing.assert_close(again, dense, atol=1e-5, rtol=1e-5)
    reused = TopK(0.3, block_q=64, sort=sort, reuse="2")
    first = reused(*tokens, call(step=3, state=(held := {})))
    assert torch.equal(reused(*tokens, call(step=4, state=held)), first) and "reused" in held


def test_keys_that_stay_in_time_lose_nothing():
    """DeltaLLM's case: a block of one place through all frames is its mean."""
    q = torch.randn(1, 2, 256, 16)
    k, v = (2 * torch.randn(1, 2, 1, 4, 16).expand(-1, -1, 64, -1, -1).flatten(2, 3) for _ in "kv")
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    at = Call(0.25, grid=(64, 2, 2))
    found = {sort: find("pooled")(0.25, sort=sort)(q, k, v, at) for sort in ("time", "none")}
    torch.testing.assert_close(found["time"], dense, atol=1e-5, rtol=1e-5)
    assert (found["none"] - dense).norm() > 0.1 * dense.norm()


# clusters: Routing Transformer


def test_tokens_of_a_cluster_lie_together():
    which = torch.arange(N) % 5
    centres = torch.eye(16)[:5] * 4
    x = (centres[which] + 0.1 * torch.randn(N, 16))[None, None]
    found = clustered(x, 5)
    assert torch.equal(found.sort().values[0, 0], torch.arange(N))
    assert which[found[0, 0]].unflatten(0, (5, 64)).unique(dim=1).shape[1] == 1
    assert torch.equal(clustered(torch.randn(1, 2, N, 16), 1), torch.arange(N).expand(1, 2, -1))


def test_clusters_find_what_is_scattered():
    """Five kinds of tokens in turn: in raster order all blocks are alike."""
    which = torch.arange(N) % 5
    kinds = 6 * torch.eye(16)[:5]
    q, k = (kinds[which][None, None] + 0.1 * torch.randn(1, 3, N, 16) for _ in range(2))
    v = torch.randn(1, 3, N, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    plain, sorted_ = (
        (TopK(0.2, block_q=64, sort=sort)(q, k, v, call(keep=0.2)) - dense).norm() / dense.norm()
        for sort in ("none", "clusters")
    )
    assert sorted_ < 0.05 < 0.5 < plain


@pytest.mark.parametrize("sort", ["time", "clusters"])
@pytest.mark.parametrize("make", [tiny_wan, tiny_flux])
def test_a_pipeline_runs_in_the_order_of_its_heads(make, sort):
    pipe = make(1, 1) if make is tiny_flux else make(layers=1)
    stock = run(pipe)
    with on(pipe, TopK(0.3, sort=sort)) as handle:
        assert torch.isfinite(run(pipe)).all()
        report = handle.report()
    assert report.kept < 1 and not report.fallbacks and torch.equal(run(pipe), stock)


def test_texts_and_files(tmp_path):
    text = saved(tmp_path / "p.json")
    for sort in ("none", "time", "clusters", text):
        assert str(Sort.read(sort)) == sort
        config = dit_accel.AccelConfig(TopK(0.2, sort=sort))
        assert dit_accel.AccelConfig.from_dict(config.to_dict()) == config
    assert _spelled(TopK(sort="time")) == 'dit_accel.TopK(sort="time")'
    assert TopK(sort="time").label == "topk, sort time" and not TopK(sort="time").by_parts
    assert How("topk", sort="tile").config().method.sort == Sort("tile")
    with pytest.raises(BadField, match="name no file"):
        Ask(What("a cat"), right=How("topk", sort=text), limits=Limits.for_public())


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: TopK(sort="snake"), "sort is none, tile, hilbert, time, clusters or per-head"),
        (lambda: TopK(sort="per-head"), "or per-head\\(profile.json\\), not per-head"),
        (lambda: TopK(sort="time(x)"), "not time\\(x\\)"),
        (lambda: TopK(sort="per-head(nowhere.json)"), "nowhere.json"),
        (lambda: TopK(sort="time", select="nearest"), "the selector nearest looks where"),
        (lambda: TopK(sort="clusters", reuse=Reuse(4)), "topk keeps a state or tables"),
        (lambda: find("shared")(sort="clusters"), "shared keeps a state or tables"),
        (lambda: find("rettention")(sort="time"), "no select, no reuse and no sort"),
        (
            lambda: dit_accel.AccelConfig(TopK(sort="time"), prune=dit_accel.TokenPruning()),
            "sort=time looks where tokens lie",
        ),
        (lambda: TopK(sort="time")(*qkv(), call(grid=None)), "needs the grid of its 320 queries"),
        (lambda: TopK(sort="clusters")(*qkv(), call(queries=640)), "needs all 640 queries"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_profile_without_these_heads_is_refused(tmp_path):
    text, (q, k, v) = saved(tmp_path / "p.json"), qkv()
    with pytest.raises(ValueError, match="nothing of head 0 in layer 3: profile this model"):
        TopK(sort=text)(q, k, v, call(layer=3))
    profile = Profile.load(tmp_path / "p.json")
    replace(profile, sorts={}).save(tmp_path / "q.json")
    with pytest.raises(ValueError, match="tried no orders: dit-accel profile --sorts"):
        TopK(sort=f"per-head({tmp_path / 'q.json'})")
