"""The gate of VSA: the seam hands over what an attention is given, eager, compiled, re-ordered."""

import checkpoint_layouts as layouts
import pytest
import torch
from diffusers.models.transformers import transformer_minimax_h3 as stock
from published import attending, error, vsa
from runs import on, run

import dit_accel
from dit_accel import VSA
from dit_accel.generation.boost import compiled_blocks

GRID = (3, 8, 8)


def gates(layers=2, rows=192, columns=192):
    out = {f"layers.{i}.weight": torch.randn(rows, columns) / 8 for i in range(layers)}
    return out | {f"layers.{i}.bias": torch.randn(rows) for i in range(layers)}


def of(tensors, part=0):
    prefix = "transformer_2." * part

    def gate(layer, hidden):
        names = (f"{prefix}layers.{layer[1]}.{x}" for x in ("weight", "bias"))
        return torch.nn.functional.linear(hidden, *(tensors.get(name) for name in names))

    return gate


def dense(pipe, tensors):
    with attending(pipe, vsa(GRID, (4, 4, 4), 0.7, of(tensors))):
        return run(pipe, guidance=1.0)


def test_a_pipeline_gives_the_published_clip():
    pipe, tensors = layouts.trained(), gates()
    expected, before = dense(pipe, tensors), run(pipe, guidance=1.0)
    method = VSA(keep=0.3).with_weights(tensors)
    with on(pipe, method, strict=True) as handle:
        assert error(run(pipe, guidance=1.0), expected) < 1e-4
        assert not handle.report().unplanned and handle.report().kept == 0.5
    assert torch.equal(run(pipe, guidance=1.0), before)
    assert "_accel_gated" not in pipe.transformer.blocks[0].attn1.processor.__dict__


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_hand_it_over_too():
    pipe, tensors = layouts.trained(), gates()
    expected = dense(pipe, tensors)
    blocks = compiled_blocks(pipe.transformer, backend="aot_eager")
    with on(pipe, VSA(keep=0.3).with_weights(tensors)), blocks:
        assert error(run(pipe, guidance=1.0), expected) < 1e-4


def test_text_and_sound_in_the_row(tmp_path):
    """MiniMax H3: sections of their own beside the clip, whose queries have a coarse part too."""
    pipe = layouts.H3()
    tensors = {f"layers.{i}.weight": torch.randn(192, 96) / 8 for i in range(2)}
    sections = (layouts.TEXT, layouts.SOUND)
    with attending(pipe, vsa((3, 12, 12), (4, 4, 4), 0.7, of(tensors), sections), stock):
        expected = pipe()
    method = VSA(keep=0.3).with_weights(tensors)
    with dit_accel.accelerated(pipe, method, schedule=dit_accel.Schedule(warmup=0), min_tokens=0):
        assert error(pipe(), expected) < 1e-5
