"""The shared residual: exact at the full step, closer than its parts after it."""

import pytest
import torch
from runs import on, run
from tiny import tiny_wan
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import Pooled, Rettention, Schedule, SharedResidual, ops
from dit_accel.methods import Call


def drifting(step: int):
    """q, k, v that change a little from step to step."""
    generator = torch.Generator().manual_seed(1)
    start, change = (torch.randn(3, 1, 2, 300, 64, generator=generator) for _ in range(2))
    return list(start + 0.05 * step * change)


def call(state: dict, step: int) -> Call:
    return Call(keep=0.3, grid=(3, 10, 10), state=state, step=step)


def test_at_the_caching_step_the_partial_formula_is_the_dense_output():
    method, state, (q, k, v) = SharedResidual(), {}, drifting(0)
    full = method(q, k, v, call(state, 0))
    torch.testing.assert_close(full, scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(method(q, k, v, call(state, 1)), full)


def test_it_beats_pooled_alone_and_the_window_with_its_residual():
    error = {}
    for method in (SharedResidual(keep=0.3), Pooled(keep=0.3), Rettention(keep=0.3, rescale=False)):
        state = {}
        for step in range(3):
            q, k, v = drifting(step)
            out = method(q, k, v, call(state, step))
        error[method.name] = (out - scaled_dot_product_attention(q, k, v)).norm().item()
    assert error["shared"] < error["rettention"] < error["pooled"]


def test_the_table_it_keeps_brings_no_means_of_its_step():
    method, state = SharedResidual(), {}
    method(*drifting(0), call(state, 0))
    table, later = state["table"], drifting(2)
    assert not any(torch.is_tensor(x) and x.is_floating_point() for x in vars(table).values())
    out = method(*later, call(state, 1))
    assert torch.equal(out, ops.pooled_attention(*later, table) + state["residual"])


@pytest.mark.parametrize("residual", ["full", "fp8", "pooled", "none"])
def test_the_bytes_announced_are_the_bytes_kept(residual: str):
    method = SharedResidual(residual=residual)
    with on(tiny_wan(), method, schedule=Schedule(warmup=1)) as handle:
        run(handle._patches[0].engine.clock._pipe())
        measured = handle.report().state_bytes
    assert measured == method.state_bytes((1, 2, 192, 64), torch.float32) * 2 * 2


def test_layers_whose_state_finds_no_room_run_pooled(monkeypatch, caplog):
    method, pipe = SharedResidual(keep=0.5, period=2), tiny_wan(layers=3)
    each = method.state_bytes((1, 2, 192, 64), torch.float32) * 2
    with on(pipe, method, schedule=Schedule(warmup=1)) as handle:
        whole = run(pipe, steps=4)
        monkeypatch.setattr(
            "dit_accel.runtime.state.free_bytes", lambda device: int(2 * each / 0.75)
        )
        with caplog.at_level("INFO"):
            partly = run(pipe, steps=4)
        report = handle.report()
        assert report.stateless_from == 2 and report.state_bytes == 2 * each
        assert "MiB free: layers from 2 on run without one" in caplog.text
        assert "no room for the state of the layers from 2 on" in str(report)
        monkeypatch.setattr("dit_accel.runtime.state.free_bytes", lambda device: 0)
        nowhere = run(pipe, steps=4)
        assert handle.report().state_bytes == 0
        monkeypatch.setattr("dit_accel.runtime.state.free_bytes", lambda device: None)
        assert torch.equal(run(pipe, steps=4), whole)
        assert handle.report().stateless_from is None
    with on(pipe, Pooled(keep=0.5, select="sub"), schedule=Schedule(warmup=1)):
        pooled = run(pipe, steps=4)
    assert torch.equal(nowhere, pooled)
    assert not torch.equal(partly, whole) and not torch.equal(partly, pooled)
