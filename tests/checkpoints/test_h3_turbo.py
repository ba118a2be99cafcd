"""LightX2V's MiniMax H3 Turbo: low-rank pairs in both namings, few steps, top-k in -sla files."""

import checkpoint_layouts as layouts
import published
import pytest
import torch
from checkpoint_layouts import H3
from diffusers.models.transformers import transformer_minimax_h3 as stock
from published import error
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoints.load import read

FILE = "minimax_h3_fl2v_turbo_4step_v0.1_768p_sla_bf16.safetensors"
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
RANK, ALPHA = 4, 128.0
KEEP = 0.3  # of 8 blocks: 2


def pairs(model):
    """Module → (down, up) of each block, and the weights with them."""
    found, expected = {}, {}
    for name, module in model.named_modules():
        if name.startswith("transformer_blocks") and name.endswith(TARGETS):
            out, into = module.weight.shape
            down, up = torch.randn(RANK, into) / 16, torch.randn(out, RANK) / 16
            found[name] = down, up
            expected[name] = module.weight.detach() + ALPHA / RANK * up @ down
    return found, expected


def peft(found):
    ends = ("lora_A", "lora_B")
    return {f"{n}.{e}.weight": x for n, p in found.items() for e, x in zip(ends, p, strict=True)}


def published_pairs(found):
    """The other engines' form: q, k and v are one product, gate and value the other way round."""
    out = {}
    for name, (down, up) in found.items():
        module = layouts.h3_name(name)
        if name.endswith(("to_k", "to_v")):
            continue
        if name.endswith("to_q"):
            module = module.replace("attn.to_q", "attn.qkv_proj")
            parts = [found[name.replace("to_q", f"to_{x}")] for x in "qkv"]
            down = torch.cat([p[0] for p in parts])
            up = torch.block_diag(*(p[1] for p in parts))
        if name.endswith("ff.net.0.proj"):
            up = torch.cat(up.chunk(2)[::-1])
        alpha = torch.tensor(ALPHA * down.shape[0] / RANK)
        out |= {f"diffusion_model.{module}.lora_down.weight": down.contiguous()}
        out |= {f"diffusion_model.{module}.lora_up.weight": up.contiguous()}
        out |= {f"diffusion_model.{module}.alpha": alpha}
    return out


@pytest.mark.parametrize("form", [peft, published_pairs])
def test_low_rank_pairs_and_the_blocks_they_were_trained_with(tmp_path, form):
    pipe, plain = H3(), H3()
    found, expected = pairs(pipe.transformer)
    save_file(form(found), tmp_path / FILE)
    loaded = dit_accel.load_checkpoint(pipe, tmp_path / FILE, min_tokens=0, keep=KEEP)
    assert loaded.family == "H3 Turbo SLA" and (loaded.unused, loaded.missing) == ([], [])
    assert len(loaded.found) == len(form(found))
    for name, weight in expected.items():
        torch.testing.assert_close(pipe.transformer.get_submodule(name).weight, weight)
        plain.transformer.get_submodule(name).weight.data = weight
    text = layouts.TEXT + layouts.SOUND
    with published.attending(plain, published.packed_top_k(KEEP, text), stock):
        reference = plain()
    assert error(pipe(), reference) < 1e-5
    assert not loaded.handle.report().unplanned


def test_how_it_is_run(tmp_path):
    pipe = H3()
    save_file(peft(pairs(pipe.transformer)[0]), tmp_path / FILE)
    before = pipe.scheduler, pipe.audio_scheduler
    loaded = dit_accel.load_checkpoint(pipe, tmp_path / FILE)
    method = loaded.config.method
    assert (method.name, method.keep, method.rounding) == ("topk", 0.15, "down")
    assert loaded.config.schedule.warmup == 0
    for scheduler, shift in ((pipe.scheduler, 6.0), (pipe.audio_scheduler, 3.0)):
        scheduler.set_timesteps(**{"num_inference_steps": 5})
        levels = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25)]
        assert scheduler.sigmas.tolist() == pytest.approx([*levels, 0])
    assert loaded.arguments == {"num_inference_steps": 5}
    loaded.restore()
    assert (pipe.scheduler, pipe.audio_scheduler) == before


def test_the_dense_sibling(tmp_path):
    pipe, plain = H3(), H3()
    found, _ = pairs(pipe.transformer)
    tensors = peft(found) | {"transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(4, 96)}
    save_file(tensors, tmp_path / "minimax_h3_fl2v_turbo_8step_v1.0.safetensors")
    loaded = dit_accel.load_checkpoint(
        pipe, tmp_path / "minimax_h3_fl2v_turbo_8step_v1.0.safetensors"
    )
    assert loaded.config is None and loaded.handle is None and "no -sla" in str(loaded)
    assert loaded.unused == ["transformer_blocks.7.attn.to_q.lora_A.weight"]
    assert loaded.arguments == {"num_inference_steps": 9}
    assert error(pipe(), plain()) > 1e-3


@pytest.mark.parametrize(
    ("place", "method", "steps"),
    [
        ("tesla/translation_turbo_4step", None, 4),
        ("slapdash/turbo_8-steps", None, 8),
        ("MiniMax-H3-Turbo-SLA/turbo_48step", "topk", 4),
        ("models/turbo_8_step_sla2", "topk", 8),
    ],
)
def test_words_of_the_name(tmp_path, place, method, steps):
    file = tmp_path / "a" / "b" / f"{place}.safetensors"  # the names of four places count
    file.parent.mkdir(parents=True)
    into, out = torch.zeros(2, 8), torch.zeros(24, 2)
    module = "blocks.0.attn.qkv_proj"
    save_file({f"{module}.lora_A.weight": into, f"{module}.lora_B.weight": out}, file)
    (found,) = read(file)
    assert (found.method and found.method.name) == method
    assert found.arguments == {"num_inference_steps": steps + 1}
