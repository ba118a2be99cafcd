"""Wan 2.2's two experts, each with projections of its own; image to video."""

import math

import checkpoint_layouts as layouts
import published as naive
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from published import RCM, error
from runs import run

import dit_accel
from dit_accel.checkpoints.load import read

KEEP = 0.6
PAIR = {"transformer_2": True, "boundary_ratio": 0.5}


@pytest.fixture
def experts(tmp_path):
    """Two files, and the model and the projections that they are of."""
    pipe = layouts.trained(**PAIR)
    learned = [layouts.projections(pipe), layouts.projections(pipe)]
    files = []
    for name, own in zip(("high", "low"), learned, strict=True):
        path = tmp_path / f"TurboWan2.2-I2V-A14B-{name}-720P.pth"
        layouts.turbowan(path, pipe, own)
        files.append(path)
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    return pipe, learned, files


def test_high_and_low_noise(experts):
    trained, learned, files = experts
    with naive.attending(trained, naive.sla(learned, KEEP)):
        expected = naive.clip(trained, RCM, boundary=0.9)
    pipe = layouts.base(**PAIR)
    pipe.register_to_config(boundary_ratio=0.9)
    found = dit_accel.load_checkpoint(pipe, *reversed(files), min_tokens=0, keep=KEEP)
    assert (found.unused, found.missing) == ([], [])
    assert error(run(pipe, steps=4, guidance=1.0), expected) < 1e-4
    assert [row["sparse"] for row in found.handle.report().layers] == [2, 2, 2, 2]


def test_which_expert_must_be_known(experts, tmp_path):
    pipe, _, files = experts
    nameless = tmp_path / "model.pth"
    nameless.write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match='two transformers, and .* say into="transformer"'):
        dit_accel.load_checkpoint(pipe, nameless)
    found = dit_accel.load_checkpoint(pipe, nameless, into="transformer_2", min_tokens=0)
    assert set(found.config.method.tensors()) == {
        f"transformer_2.layers.{i}.{part}" for i in range(2) for part in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="has no transformer_2: leave that part out"):
        dit_accel.load_checkpoint(layouts.base(), files[1], into="transformer_2")


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("turbowan-slow", None),
        ("sla-lowrank", None),
        ("sla_low_rank", None),
        ("highland", None),
        ("high_low", None),
        ("sla-low-rank-high", "transformer"),
        ("Wan2.2_T2V_High_noise_14B", "transformer"),
        ("wan22-low720p", "transformer_2"),
        ("wan22_lownoise", "transformer_2"),
    ],
)
def test_high_and_low_are_words_of_the_name(tmp_path, name, slot):
    tensors = {"blocks.0.self_attn.attn_op.local_attn.proj_l.weight": torch.zeros(1, 1)}
    torch.save(tensors, tmp_path / f"{name}.pth")
    layouts.in_folder(tmp_path / name, tensors)
    for path in (tmp_path / f"{name}.pth", tmp_path / name):
        assert read(path)[0].slot == slot


def test_image_to_video_has_its_own_start_and_boundary(tmp_path):
    options = {"kind": WanImageToVideoPipeline, "in_channels": 36, **PAIR}
    trained = layouts.trained(**options)
    path = layouts.turbowan(tmp_path / "high.pth", trained, layouts.projections(trained))
    pipe = layouts.base(**options)
    found = dit_accel.load_checkpoint(pipe, path, min_tokens=0)
    assert (found.sampler, pipe.config.boundary_ratio) == ("rcm:200", 0.9)
    pipe.scheduler.set_timesteps(4)
    levels = [math.tan(t) / (1 + math.tan(t)) for t in (math.atan(200), 1.5, 1.4, 1.0)]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([*levels, 0])
    assert [level >= 0.9 for level in levels] == [True, True, False, False]
    found.restore()
    assert pipe.config.boundary_ratio == 0.5
