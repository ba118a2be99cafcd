"""Training: what inference mode left, gradient checkpointing, states."""

import pytest
import torch
from support import NOW, calls, wan
from tiny import tiny_wan
from torch.utils.checkpoint import checkpoint

import dit_accel
from dit_accel import Schedule, TokenPruning

METHODS = ("topk", "pooled", "rectified", "sla")
STATEFUL = ("rettention", "shared")
PRUNE = TokenPruning(keep=0.5, start=1, end=0)


def inputs(t=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, t, 16, 16, generator=generator)
    return x, torch.tensor([500.0]), torch.randn(1, 8, 32, generator=generator)


def gradients(transformer):
    return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])


def loss(pipe, step, t=3, call=None):
    """The loss of one forward at this step of the run."""
    pipe.scheduler._step_index = step
    x, time, text = inputs(t)
    call = call or pipe.transformer
    return call(x.requires_grad_(), time, text, return_dict=False)[0].float().square().mean()


def trained(method, how, order="raster", **options):
    """Gradients of two forwards, one dense and one sparse, and the calls that were counted."""
    pipe = tiny_wan(layers=3)
    pipe.scheduler.set_timesteps(8)
    transformer = pipe.transformer.train()
    schedule = {"schedule": Schedule(warmup=1), "min_tokens": 0, "order": order}
    handle = dit_accel.accelerate(pipe, method, **schedule | options) if method else None
    call = None
    if how == "diffusers":
        transformer.enable_gradient_checkpointing()
    if how in ("whole", "reentrant"):

        def call(*args, **kwargs):
            again = {"use_reentrant": how == "reentrant"}
            return checkpoint(lambda *a: transformer(*a, **kwargs), *args, **again)

    both = loss(pipe, 0, call=call) + 2 * loss(pipe, 1, t=5, call=call)
    both.backward()
    return gradients(transformer), calls(handle.report()) if handle else 0


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("how", ["diffusers", "whole"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_give_the_same_gradients_and_are_not_counted(method, how, order):
    expected, count = trained(method, "", order)
    found, again = trained(method, how, order)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert again == count


def test_a_state_is_trained_through_without_checkpoints():
    found, _ = trained("shared", "")
    assert found.isfinite().all() and found.any()


@pytest.mark.parametrize("how", ["diffusers", "whole"])
@pytest.mark.parametrize(
    "method, options", [(m, {}) for m in STATEFUL] + [("topk", {"prune": PRUNE})]
)
def test_what_keeps_a_state_is_refused_in_a_sentence(how, method, options):
    with pytest.raises(RuntimeError, match="gradient checkpointing would run through it twice"):
        trained(method, how, **options)


def test_frozen_models_are_not_refused():
    pipe = tiny_wan(layers=3)
    pipe.transformer.requires_grad_(False).enable_gradient_checkpointing()
    for options in ({"method": "shared"}, {"method": "topk", "prune": PRUNE}):
        with dit_accel.accelerated(pipe, **NOW, **options):
            x, time, text = inputs()
            pipe.transformer(x, time, text)


@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
@pytest.mark.parametrize("method", [*METHODS, "shared"])
@pytest.mark.parametrize("then", ["the same", "another", "restored"])
def test_what_inference_mode_made_can_be_trained_with(method, order, then):
    pipe = tiny_wan(layers=2)
    with torch.inference_mode():
        dit_accel.accelerate(pipe, method, order=order, **NOW)
        wan(pipe, steps=2)
    if then == "another":
        pipe = tiny_wan(layers=2)
    if then == "restored":
        dit_accel.restore(pipe)
    if then != "the same":
        dit_accel.accelerate(pipe, method, order=order, **NOW)
    x, time, text = inputs()
    pipe.transformer(x, time, text, return_dict=False)[0].square().mean().backward()
    assert gradients(pipe.transformer).any()
