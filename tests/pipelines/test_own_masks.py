"""Masks of a user or of a model's own: tokens that are pruned or reordered keep theirs."""

import pytest
import torch
from zoo import Pipe, forward, x, zoo

import dit_accel
from dit_accel import Schedule, TokenPruning

ZOO = zoo()
NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("queries", [1, 276])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "BriaFiboTransformer2DModel"])
def test_a_mask_among_the_keywords(name, queries):
    """A token that no one reads: pruned, and in another order, it stays so."""
    case = ZOO[name]
    built = case.build()
    mask = torch.ones(1, 1, queries, 276, dtype=torch.bool)
    mask[..., 5] = False

    def arguments():
        return case.arguments() | {"joint_attention_kwargs": {"attention_mask": mask}}

    stock = forward(built, arguments())
    assert not torch.equal(stock, forward(built, case.arguments()))
    kept = "stale" if queries == 1 else "drop"  # of keys that are gone, what a mask told is gone
    prune = TokenPruning(
        0.5, refresh=10, start=1, end=0, first=0, last=None, context=kept, block=16
    )
    for options in ({"prune": prune}, {"order": "hilbert"}):
        pipe = Pipe(built, steps=2)
        with dit_accel.accelerated(pipe, dit_accel.TopK(keep=0.999), **options, **NOW) as handle:
            out = pipe.steps(arguments)
            report = handle.report()
        assert "prune" not in options or report.steps[1]["tokens"] < 1
        exact = out if kept == "stale" or "order" in options else out[:1]
        for one in exact:
            torch.testing.assert_close(one, stock, rtol=1e-3, atol=1e-3 * float(stock.abs().max()))
        assert out[1].isfinite().all()


def test_a_mask_over_the_picture_meets_the_tokens_it_was_made_for():
    """It runs dense, and tokens do not come in another order than the mask's."""
    case = ZOO["FluxTransformer2DModel"]
    built = case.build()
    mask = torch.ones(1, 1, 1, 276, dtype=torch.bool)
    mask[..., 100:200] = False
    arguments = case.arguments() | {"joint_attention_kwargs": {"attention_mask": mask}}
    stock = forward(built, arguments)
    with dit_accel.accelerated(Pipe(built), "topk", order="hilbert", **NOW) as handle:
        out = forward(built, arguments)
        assert handle.report().unplanned == {"the attention mask hides visual tokens": 2}
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4 * float(stock.abs().max()))


def test_a_block_causal_mask_meets_the_tokens_it_was_made_for():
    case = ZOO["SkyReelsV2Transformer3DModel"]
    built = case.build()
    built._set_ar_attention(2)
    torch.manual_seed(1)
    arguments = case.arguments() | {"hidden_states": x(1, 16, 4, 16, 16)}
    stock = forward(built, arguments)
    with dit_accel.accelerated(Pipe(built), "topk", order="hilbert", **NOW) as handle:
        out = forward(built, arguments)
        assert handle.report().unplanned == {"the attention mask is more than key padding": 2}
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4 * float(stock.abs().max()))
