"""TurboWan's layouts: what is read, what is not, and the clip of the published engine."""

import checkpoint_layouts as layouts
import published as naive
import pytest
import torch
from published import RCM, error
from runs import run

import dit_accel
from dit_accel import api

KEEP = 0.6  # of 3 blocks: one, rounded down; the ratio that was trained, 0.1, keeps one as well


@pytest.fixture(scope="module")
def world():
    """The model that was trained, its projections, and the clip of the published engine."""
    pipe = layouts.trained()
    learned = layouts.projections(pipe)
    with naive.attending(pipe, naive.sla(learned, KEEP)):
        return pipe, learned, naive.clip(pipe, RCM)


def loaded(path, **options):
    pipe = layouts.base()
    return pipe, dit_accel.load_checkpoint(pipe, path, min_tokens=0, keep=KEEP, **options)


@pytest.mark.parametrize("nest", [False, True])
def test_pth_in_wans_own_names(world, tmp_path, nest):
    trained, learned, expected = world
    path = layouts.turbowan(tmp_path / "TurboWan2.1-T2V-1.3B-480P.pth", trained, learned, nest=nest)
    pipe, found = loaded(path)
    assert found.family == "TurboWan" and found.sampler == "rcm:80"
    assert (found.unused, found.missing) == ([], [])
    assert len(found.found) == len(trained.transformer.state_dict()) + len(learned)
    method = found.config.method
    assert (method.block_q, method.block_k, method.rounding, method.linear) == (
        128, 64, "down", "all"
    )  # fmt: skip
    assert found.config.schedule.warmup == 0
    assert found.arguments == {"num_inference_steps": 4, "guidance_scale": 1.0}
    out = run(pipe, steps=4, guidance=1.0)
    assert error(out, expected) < 1e-4
    assert "sparse" in str(found.handle.report()) and not found.handle.report().unplanned


def test_the_share_it_was_trained_with(world, tmp_path):
    trained, learned, _ = world
    path = layouts.turbowan(tmp_path / "TurboWan.pth", trained, learned)
    found = dit_accel.load_checkpoint(layouts.base(), path, min_tokens=0)
    assert found.config.method.keep == 0.1


def test_what_it_replaces_comes_back(world, tmp_path):
    trained, learned, _ = world
    pipe, found = loaded(layouts.turbowan(tmp_path / "TurboWan.pth", trained, learned))
    found.restore()
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert "_dit_accel" not in pipe.transformer.__dict__ and "prepare_latents" not in vars(pipe)
    assert torch.equal(run(pipe), run(trained))  # the weights stay


@pytest.mark.parametrize("given", ["topk", "speed"])
def test_the_method_that_it_replaces_comes_back(world, tmp_path, given):
    trained, learned, _ = world
    path = layouts.turbowan(tmp_path / "TurboWan.pth", trained, learned)
    pipe = layouts.base()
    if given == "topk":
        before = dit_accel.accelerate(pipe, "topk", min_tokens=0)
    else:
        before = dit_accel.at_speed(pipe, "fast", min_tokens=0).handle
    found = dit_accel.load_checkpoint(pipe, path, min_tokens=0)
    assert not before.active and api.speed_of(pipe) is None
    found.restore()
    assert before.active and not found.handle.active
    assert (api.speed_of(pipe) is None) == (given == "topk")
    found = dit_accel.load_checkpoint(pipe, path, min_tokens=0)
    anew = dit_accel.accelerate(pipe, "pooled")
    found.restore()
    assert anew.active and not before.active
    found = dit_accel.load_checkpoint(pipe, path, min_tokens=0)
    dit_accel.restore(pipe)
    found.restore()
    assert not anew.active and "_dit_accel" not in vars(pipe.transformer)


class Packed(torch.Tensor):
    """A weight of another form."""


def test_weights_in_eight_bits_are_refused(world, tmp_path):
    trained, learned, _ = world
    path = layouts.turbowan(tmp_path / "TurboWan.pth", trained, learned)
    for make in (lambda x: x.as_subclass(Packed), lambda x: x.to(torch.int8)):
        pipe = layouts.base()
        last, first = pipe.transformer.proj_out, pipe.transformer.patch_embedding.weight.clone()
        last.weight = torch.nn.Parameter(make(last.weight.detach()), requires_grad=False)
        scheduler = pipe.scheduler
        with pytest.raises(ValueError, match="proj_out.weight of .* eight bits .* quantise after"):
            dit_accel.load_checkpoint(pipe, path)
        assert torch.equal(pipe.transformer.patch_embedding.weight, first)
        assert pipe.scheduler is scheduler and "_dit_accel" not in vars(pipe.transformer)


def test_eight_bit_files(world, tmp_path):
    trained, learned, expected = world
    path = layouts.turbowan(tmp_path / "TurboWan-quant.pth", trained, learned, quant=True)
    pipe, found = loaded(path)
    assert (found.unused, found.missing) == ([], []) and "int8" in found.notes[0]
    rounded = layouts.trained()
    for block in rounded.transformer.blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                codes, scale = layouts.quantised(module.weight.data)
                wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                size = module.weight.shape
                module.weight.data = codes.float() * wide[: size[0], : size[1]]
    with naive.attending(rounded, naive.sla(learned, KEEP)):
        exact = naive.clip(rounded, RCM)
    out = run(pipe, steps=4, guidance=1.0)
    assert error(out, exact) < 1e-4 < error(out, expected)


@pytest.mark.parametrize("files,index", [(1, False), (3, True), (3, False)])
def test_copies_in_diffusers_format(world, tmp_path, files, index):
    trained, learned, expected = world
    names = "blocks.{}.attn1.attn_op.local_attn.proj_l"
    own = dict(zip(layouts.projections(trained, names), learned.values(), strict=True))
    tensors = layouts.weights(trained) | own
    folder = tmp_path / "TurboWan2.1-T2V-1.3B-Diffusers"
    layouts.in_folder(folder / "transformer", tensors, files, index)
    pipe, found = loaded(folder)
    assert (found.unused, found.missing, len(found.found)) == ([], [], len(tensors))
    assert error(run(pipe, steps=4, guidance=1.0), expected) < 1e-4


def test_names_that_are_left_over_or_lacking_are_told(world, tmp_path):
    trained, learned, _ = world
    path = layouts.turbowan(tmp_path / "TurboWan.pth", trained, learned)
    tensors = torch.load(path, weights_only=True)
    del tensors["blocks.1.ffn.0.bias"]
    torch.save(tensors | {"blocks.0.self_attn.extra": torch.ones(1), "epoch": 3}, path)
    _, found = loaded(path)
    assert found.unused == ["epoch", "blocks.0.self_attn.extra"]
    assert found.missing == ["blocks.1.ffn.net.0.proj.bias"]
    for name in (*found.unused, *found.missing):
        assert name in str(found)
    assert "blocks.0.self_attn.extra" not in found.found


def test_another_model_is_refused_and_nothing_is_changed(world, tmp_path):
    trained, learned, _ = world
    path = layouts.turbowan(tmp_path / "TurboWan.pth", trained, learned)
    pipe = layouts.tiny_wan(seed=1)
    before, scheduler = run(pipe), pipe.scheduler
    with pytest.raises(
        ValueError, match=r"192\] in the checkpoint, but .* 128\]: it was trained from another"
    ):
        dit_accel.load_checkpoint(pipe, path)
    assert pipe.scheduler is scheduler and torch.equal(run(pipe), before)
    with pytest.raises(ValueError, match="name layer 1, but this model has 1"):
        dit_accel.load_checkpoint(layouts.base(layers=1), path)


def test_files_that_cannot_be_read(tmp_path):
    pipe = layouts.base()
    evil = tmp_path / "evil.pth"
    torch.save({"x": torch.nn.Linear(1, 1)}, evil)
    (tmp_path / "text.safetensors").write_text("no")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "empty").mkdir()
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "other.pth")
    for name, why in (
        ("evil.pth", "cannot be read as weights alone"),
        ("text.safetensors", "is cut off or damaged"),
        ("notes.txt", "ends neither in .safetensors nor in .pth"),
        ("empty", "holds no .safetensors file"),
        ("missing.pth", "there is no checkpoint"),
        ("other.pth", "none of the checkpoints that are known"),
    ):
        with pytest.raises(ValueError, match=why):
            dit_accel.load_checkpoint(pipe, tmp_path / name)
    folder = layouts.in_folder(tmp_path / "lost", layouts.weights(pipe), 2)
    next(folder.glob("*00002.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lacks .*00002.safetensors, which .*index.json names"):
        dit_accel.load_checkpoint(pipe, folder)
