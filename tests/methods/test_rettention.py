"""Re-ttention's identities, its state and the bytes it says it takes."""

import pytest
import torch
from runs import on, run
from tiny import tiny_wan
from torch.nn.functional import scaled_dot_product_attention

import dit_accel
from dit_accel import Rettention, Schedule
from dit_accel.methods import Call

GRID = (3, 10, 10)


def qkv(dtype: torch.dtype = torch.float32):
    return [torch.randn(2, 2, 300, 64).to(dtype) for _ in range(3)]


def call(state: dict, step: int = 0, refresh: bool = False, **options) -> Call:
    return Call(keep=0.3, grid=GRID, state=state, step=step, refresh=refresh, **options)


@pytest.mark.parametrize("rescale", [True, False])
def test_at_the_caching_step_the_sparse_formula_is_the_dense_output(rescale: bool):
    method, state, (q, k, v) = Rettention(rescale=rescale), {}, qkv()
    full = method(q, k, v, call(state, 4))
    torch.testing.assert_close(full, scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(method(q, k, v, call(state, 5)), full)


def test_the_ratio_is_a_share_and_grows_to_one():
    method, state, (q, k, v) = Rettention(growth=0.3), {}, qkv()
    method(q, k, v, call(state))
    first = state["ratio"].clone()
    assert (first > 0).all() and (first <= 1).all() and (first < 0.7).any()
    for step in range(1, 5):
        assert torch.equal(state["ratio"], (first + 0.3 * (step - 1)).clamp(max=1)) or step > 2
        method(q, k, v, call(state, step))
    assert (state["ratio"] == 1).all()


def test_without_rescaling_it_is_ditfastattn():
    method, state, (q, k, v) = Rettention(rescale=False), {}, qkv()
    full = method(q, k, v, call(state))
    q2, k2, v2 = qkv()
    table = method.table(q, k, call(state))
    sparse = dit_accel.ops.block_sparse_attention
    expected = sparse(q2, k2, v2, table) + full - sparse(q, k, v, table)
    torch.testing.assert_close(method(q2, k2, v2, call(state, 1)), expected)
    assert "ratio" not in state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_smaller_residual_is_a_coarser_one(dtype: torch.dtype):
    q, k, v = qkv(dtype)
    dense = scaled_dot_product_attention(q, k, v).float()
    error = {}
    for residual in ("full", "fp8", "pooled", "none"):
        method, state = Rettention(residual=residual), {}
        method(q, k, v, call(state))
        error[residual] = (method(q, k, v, call(state, 1)).float() - dense).norm().item()
    assert error["full"] < error["fp8"] < error["pooled"] < error["none"]


def test_a_full_step_comes_every_period_and_when_the_schedule_asks():
    method, state, (q, k, v) = Rettention(period=3), {}, qkv()
    kept = []
    for step, refresh in ((2, True), (3, False), (4, False), (5, False), (6, False), (7, True)):
        note = lambda table: kept.append(table is None)  # noqa: E731
        method(q, k, v, call(state, step, refresh, note=note))
    assert kept == [True, False, False, True, False, True]


def test_another_shape_starts_anew():
    method, state, (q, k, v) = Rettention(), {}, qkv()
    method(q, k, v, call(state))
    half = [x[:1] for x in (q, k, v)]
    torch.testing.assert_close(method(*half, call(state, 1)), scaled_dot_product_attention(*half))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("residual", ["full", "fp8", "pooled", "none"])
def test_the_bytes_announced_are_the_bytes_kept(residual: str, rescale: bool):
    pipe = tiny_wan(layers=3)
    method = Rettention(residual=residual, rescale=rescale)
    with on(pipe, method, schedule=Schedule(warmup=1, dense_layers=(0,))) as handle:
        run(pipe)
        measured = handle.report().state_bytes
    each = method.state_bytes((1, 2, 3 * 8 * 8, 64), torch.float32)
    assert measured == each * 2 * 2  # two sparse layers, two guidance passes


@pytest.mark.parametrize("name", ["rettention", "shared"])
def test_it_says_the_bytes_before_the_first_step(name: str, caplog):
    pipe = tiny_wan(layers=3)
    schedule = Schedule(warmup=2, dense_layers=(0,))
    with caplog.at_level("INFO"), on(pipe, name, schedule=schedule) as handle:
        run(pipe, steps=4)
        kept = handle.report().state_bytes
        run(pipe, steps=4, guidance=1.0)
        alone = handle.report().state_bytes
    assert [line.split("takes ")[1] for line in caplog.messages if "takes" in line] == [
        f"{kept / 2**20:.1f} MiB: 2 layers in 2 guidance passes",
        f"{alone / 2**20:.1f} MiB: 2 layers in 1 guidance pass",
    ]


def test_what_does_not_fit_is_refused_before_the_first_step(monkeypatch):
    pipe = tiny_wan(layers=3)
    total = Rettention().state_bytes((1, 2, 192, 64), torch.float32) * 3 * 2
    monkeypatch.setattr("dit_accel.runtime.state.free_bytes", lambda device: total - 1)
    steps, step = [], pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    with on(pipe, Rettention(), schedule=Schedule(warmup=2)) as handle:
        with pytest.raises(RuntimeError, match="MiB free; take residual"):
            run(pipe, steps=4)
        assert steps == [] and not handle._engine.state
        with pytest.raises(RuntimeError, match="3 layers in 2 guidance passes, but cpu has"):
            run(pipe, steps=4)  # and again: nothing was booked as told
        monkeypatch.setattr("dit_accel.runtime.state.free_bytes", lambda device: total)
        run(pipe, steps=4)
    assert len(steps) == 4


def test_what_runs_dense_is_not_announced(monkeypatch, caplog):
    monkeypatch.setattr("dit_accel.runtime.state.free_bytes", lambda device: 0)
    pipe = tiny_wan()
    with caplog.at_level("INFO"), on(pipe, Rettention(), min_tokens=10**6):
        run(pipe)
    assert not caplog.messages


def test_passes_are_separate_and_a_new_generation_starts_empty():
    pipe = tiny_wan()
    method = Rettention(keep=0.3, period=100)
    with on(pipe, method, schedule=Schedule(warmup=0)) as handle:
        first = run(pipe, seed=1)
        state = handle._engine.state
        assert {name for name, _ in state} == {"cond", "uncond"}
        cond, uncond = (
            [entry["residual"] for key, entry in state.items() if key[0] == name]
            for name in ("cond", "uncond")
        )
        assert len(cond) == 2 and not torch.equal(cond[1], uncond[1])
        run(pipe, seed=2)
        assert torch.equal(run(pipe, seed=1), first)
        run(pipe, seed=1, guidance=1.0)
        assert {name for name, _ in handle._engine.state} == {"cond"}


def test_it_needs_the_grid_and_more_than_one_step():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="needs the grid of its 300"):
        Rettention()(q, k, v, Call(keep=0.3, grid=(1, 1, 7)))
    with pytest.raises(ValueError, match="carries state"):
        dit_accel.attention(q, k, v, "rettention")
