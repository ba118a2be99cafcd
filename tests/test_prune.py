"""Token pruning: its limits, its equations, what it costs and what it refuses."""

import gc
from dataclasses import replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from tiny import tiny_wan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel import Dense, Rettention, Schedule, TokenPruning, TopK
from dit_accel.config import AccelConfig
from dit_accel.machine import Stopwatch
from dit_accel.pipelines import registry, wan
from dit_accel.pruning.context import CONTEXTS
from dit_accel.pruning.criteria import CRITERIA, Facts, pick, transition_variation
from dit_accel.pruning.span import Span
from dit_accel.runtime.books import StepBook

ALWAYS = {"start": 1, "end": 0, "refresh": 10**9}


def run(pipe, steps=4, size=128, guidance=3.0, **more):
    return pipe(
        prompt="a rocket",
        height=size,
        width=size,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        max_sequence_length=16,
        **more,
    )[0]


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan(layers=4)


@pytest.fixture(scope="module")
def stock(pipe):
    return run(pipe)


def pruned(pipe, method=None, **options):
    prune = TokenPruning(**{**ALWAYS, **options})
    options = {"schedule": Schedule(warmup=0), "min_tokens": 0}
    return dit_accel.accelerated(pipe, method or Dense(), prune=prune, **options)


def test_all_tokens_is_bit_equal(pipe, stock):
    with pruned(pipe, keep=1.0):
        assert torch.equal(run(pipe), stock)
    assert torch.equal(run(pipe), stock)
    assert type(pipe.transformer.blocks) is torch.nn.ModuleList


def test_a_refresh_at_each_step_is_bit_equal(pipe, stock):
    with pruned(pipe, keep=0.5, refresh=1):
        assert torch.equal(run(pipe), stock)


def test_no_token_is_first_block_cache(pipe, stock):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    cached = run(pipe)
    pipe.transformer.disable_cache()
    assert not torch.equal(cached, stock)
    with pruned(pipe, keep=0.0, first=1, last=None):
        torch.testing.assert_close(run(pipe), cached, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_runs_close_to_dense(pipe, stock, criterion):
    with pruned(pipe, keep=0.5, criterion=criterion, refresh=3) as handle:
        out = run(pipe)
        report = handle.report()
    assert torch.isfinite(out).all() and not torch.equal(out, stock)
    error = (out - stock).norm() / stock.norm()
    assert error < 0.1, error
    # 192 tokens are 3 blocks: half of them rounds up to 2
    assert [round(3 * s["tokens"]) for s in report.steps] == [3, 3, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("order", ["tile", "hilbert"])
def test_pruning_in_another_token_order_equals_dense_when_all_run(pipe, stock, order):
    prune = TokenPruning(keep=0.5, refresh=1)
    with dit_accel.accelerated(pipe, Dense(), prune=prune, order=order):
        torch.testing.assert_close(run(pipe), stock, rtol=1e-4, atol=1e-4)
    prune = TokenPruning(keep=0.5, **ALWAYS)
    with dit_accel.accelerated(pipe, Dense(), prune=prune, order=order):
        assert (run(pipe) - stock).norm() / stock.norm() < 0.1


def test_rope_rows_and_selection_are_those_of_the_kept_tokens(pipe):
    """Each block of the span gets the full table's rows at the chosen tokens, in both passes."""
    rows, tokens = [], []
    block = pipe.transformer.blocks[1]

    def spy(module, args, kwargs):
        if args[0].shape[1] < 192:
            rows.append(args[3][0])
            tokens.append(args[0].shape[1])

    whole = []
    hooks = [pipe.transformer.rope.register_forward_hook(lambda m, a, out: whole.append(out[0]))]
    with pruned(pipe, keep=0.5, criterion="stratified") as handle:
        hooks.append(block.register_forward_pre_hook(spy, with_kwargs=True))
        run(pipe, steps=2)
        index = handle.spans[0].selection.index
    for hook in hooks:
        hook.remove()
    assert tokens == [128, 128]  # step 1, both passes
    assert all(torch.equal(r, whole[-1][:, index]) for r in rows)


def test_composes_with_sparse_attention(pipe, stock):
    with pruned(pipe, TopK(keep=0.999), keep=0.5) as handle:
        sparse = run(pipe)
        assert not handle.report().unplanned
    with pruned(pipe, Dense(), keep=0.5):
        torch.testing.assert_close(run(pipe), sparse, rtol=1e-3, atol=1e-3)


def test_taylor_restores_a_linear_change_better_than_reuse():
    from dit_accel.forward.clock import Clock
    from dit_accel.pipelines.base import Geometry, SpanSite

    def error(restore):
        clock = Clock(type("Pipe", (), {})())
        clock.geometry, clock.passname, clock.steps = Geometry((1, 1, 128)), "cond", None
        options = {"keep": 0.5, "refresh": 3, "start": 1, "end": 0, "first": 0, "last": None}
        prune = TokenPruning(restore=restore, criterion="lru", **options)
        span = Span(prune, SpanSite(("blocks",), "x"), clock, 1)
        x = torch.randn(1, 128, 4)

        class Grow(torch.nn.Module):
            def forward(self, x):
                return x * (1 + 0.1 * clock.step)

        for step in range(6):
            clock.step = step
            span.begin(None)
            out = span.run(0, Grow(), (x,), {})
            span.end()
        return float((out - x * 1.5).norm())

    assert error("taylor") < 0.2 * error("reuse")


def test_memory_does_not_grow_and_is_reported(pipe):
    with pruned(pipe, keep=0.5, restore="taylor") as handle:
        run(pipe)
        first = handle.report().state_bytes
        run(pipe)
        assert handle.report().state_bytes == first > 0
        run(pipe, size=64)
        assert handle.report().state_bytes < first


def test_two_experts_and_a_new_size(pipe):
    both = tiny_wan(layers=3, transformer_2=True, boundary_ratio=0.7)
    stock = run(both)
    with pruned(both, keep=0.5, refresh=2) as handle:
        out = run(both)
        assert (out - stock).norm() / stock.norm() < 0.2
        run(both, size=64, guidance=1.0)
        assert torch.equal(run(both), out) and handle.report().generations == 3


def test_regional_compile_without_graph_breaks(pipe):
    four = tiny_wan(layers=4)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with pruned(four, keep=0.5):
        eager = run(four)
        four.transformer.compile_repeated_blocks(fullgraph=True, backend=count)
        torch.testing.assert_close(run(four), eager, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    assert 1 <= len(graphs) <= 2  # all tokens, and any number of them


def test_first_frames_always_run(pipe):
    with pruned(pipe, keep=0.3, anchor_frames=1, criterion="random") as handle:
        run(pipe, steps=3)
        index = handle.spans[0].selection.index
    assert torch.equal(index[:64], torch.arange(64))


def test_ttv_is_its_formula_and_finite_in_half_precision():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    got = transition_variation(x, y)
    for b in range(2):
        cos = torch.stack([x[b, i] @ y[b, i] / (x[b, i].norm() * y[b, i].norm()) for i in range(5)])
        weights = torch.exp(1 - cos) / torch.exp(1 - cos).sum()
        want = weights * torch.stack([y[b, i].norm() / x[b, i].norm() for i in range(5)])
        torch.testing.assert_close(got[b], want)
    big = torch.randn(1, 40_000, 64).half() * 200
    assert torch.isfinite(transition_variation(big, big.flip(1))).all()


def test_pick_takes_whole_blocks_and_counts_the_short_one_truly():
    scores = torch.zeros(150)
    scores[128:] = 1.0  # the last block holds 22 tokens
    scores[0:64] = 0.9
    assert pick(scores, 1, 64).tolist() == list(range(128, 150))
    assert pick(scores, 2, 64).tolist() == [*range(64), *range(128, 150)]
    assert pick(scores, 0, 64).numel() == 0


def test_stratified_rotates_over_all_blocks():
    facts = [Facts(None, None, None, torch.zeros(640), step, 0, 64) for step in range(10)]
    ran = torch.cat([pick(CRITERIA["stratified"](f), 2, 64) for f in facts])
    assert ran.unique().numel() == 640


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 1.5}, r"\[0, 1\]"),
        ({"refresh": 0}, "refresh"),
        ({"start": -1}, "start"),
        ({"criterion": "beauty"}, "criterion is one of"),
        ({"restore": "paste"}, "restore is one of"),
        ({"context": "all"}, "context is one of"),
        ({"threshold": 0.1, "criterion": "lru"}, "threshold is a relative change"),
        ({"criterion": "drift", "first": 0}, "first=0 leaves it none"),
        ({"criterion": "ttv*drift", "first": 0}, "first=0 leaves it none"),
        ({"criterion": "text", "first": 0}, "first=0 leaves it none"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        TokenPruning(**options)


def test_what_cannot_be_pruned_is_refused_and_nothing_is_left(pipe, stock, monkeypatch):
    spanless = {"WanTransformer3DModel": replace(wan.ADAPTER, span=None)}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="per-token arguments"):
        patch.setattr(registry, "_EXTRA", spanless)
        dit_accel.accelerate(pipe, "topk", prune="safe")
    with pytest.raises(ValueError, match="a model of 4 blocks"):
        dit_accel.accelerate(pipe, "topk", prune=TokenPruning(first=4))
    with pytest.raises(ValueError, match="prune is the share of the tokens"):
        dit_accel.accelerate(pipe, "topk", prune="wild")
    with pytest.raises(ValueError, match="state of all tokens"):
        AccelConfig(Rettention(), prune=TokenPruning())
    assert torch.equal(run(pipe), stock)
    assert torch.equal(run(pipe), stock)


def test_configuration_round_trip():
    config = AccelConfig(TopK(), prune=TokenPruning(keep=0.3, criterion="lru"))
    assert AccelConfig.from_dict(config.to_dict()) == config


def test_both_guidance_passes_run_the_same_tokens(pipe, monkeypatch):
    ran, leave = [], Span._leave

    def spy(span, *out):
        ran.append((span.clock.step, span.clock.passname, span.rows.index))
        return leave(span, *out)

    monkeypatch.setattr(Span, "_leave", spy)
    with pruned(pipe, keep=0.5, criterion="drift"):
        run(pipe)
    pairs = list(zip(ran[::2], ran[1::2], strict=True))
    assert [(a[:2], b[:2]) for a, b in pairs[1:]] == [
        ((step, "cond"), (step, "uncond")) for step in (1, 2, 3)
    ]
    assert all(torch.equal(a[2], b[2]) for a, b in pairs[1:])


@pytest.mark.parametrize("keep", [1 / 3, 2 / 3])
def test_flops_of_attention_and_mlp_fall_as_predicted(pipe, keep):
    """r for what is linear in the tokens that run, r² for attention among them."""

    def flops(step):
        pipe.scheduler._step_index = step
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pipe.transformer(latents, torch.tensor([500]), text)
        counts = counter.get_flop_counts()
        block = "WanTransformer3DModel.blocks.1"
        attention = counts[f"{block}.attn1"]
        core = sum(n for op, n in attention.items() if "bmm" in str(op))
        return core, sum(attention.values()) - core, sum(counts[f"{block}.ffn"].values())

    pipe.scheduler.set_timesteps(4)
    latents, text = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 8, 32)
    with pruned(pipe, keep=keep, criterion="stratified"), sdpa_kernel(SDPBackend.MATH):
        full, part = flops(0), flops(1)
    assert [b / a for a, b in zip(full, part, strict=True)] == pytest.approx([keep**2, keep, keep])
    assert min(full) > 0


@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_grows_over_twenty_generations(pipe, context):
    def held():
        gc.collect()
        kept = [x for x in gc.get_objects() if type(x) in (torch.Tensor, StepBook, Stopwatch)]
        tensors = [x for x in kept if type(x) is torch.Tensor]
        return len(kept), sum(x.nbytes for x in tensors)

    with pruned(pipe, keep=0.5, restore="taylor", context=context) as handle:
        for _ in range(2):
            run(pipe, size=64, steps=3)
        before, state = held(), handle.report().state_bytes
        for _ in range(20):
            run(pipe, size=64, steps=3)
        assert handle.report().state_bytes == state and held() == before


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e9),
        MagCacheConfig(
            threshold=1e9, max_skip_steps=9, num_inference_steps=4, mag_ratios=[1.0] * 4
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_steps_that_a_cache_skips_are_left_alone(pipe, stock, config):
    pipe.transformer.enable_cache(config)
    cached = run(pipe)
    with pruned(pipe, keep=0.5) as handle:
        assert torch.equal(run(pipe), cached) and not torch.equal(cached, stock)
        assert all(step["tokens"] == 1 for step in handle.report().steps)
    with pruned(pipe, first=0), pytest.raises(RuntimeError, match="reads all tokens at the first"):
        run(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), stock)


def test_blocks_run_by_someone_else_are_noticed(pipe):
    def forward(model, hidden_states, **more):
        return (hidden_states,)

    with pruned(pipe), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.transformer), "forward", forward)
        with pytest.raises(RuntimeError, match="did not meet the model's blocks"):
            pipe.transformer(hidden_states=torch.randn(1, 16, 3, 8, 8))
