"""FastWan and FastH3: gates that diffusers drops, three namings, changes of every kind."""

import json
import re

import checkpoint_layouts as layouts
import pytest
import torch
from checkpoint_layouts import H3, SOUND, TEXT
from diffusers.models.transformers import transformer_minimax_h3 as stock
from published import attending, clip, error, vsa
from runs import run
from safetensors.torch import save_file

import dit_accel

GRID, DMD = (3, 8, 8), [1.0, 0.757, 0.522]
SPARSITY = 0.7

# diffusers → FastVideo's modules, as its own configuration maps them
FASTVIDEO = [
    (r"^patch_embedding\.(.*)", r"patch_embedding.proj.\1"),
    (r"^condition_embedder\.text_embedder\.linear_1", "condition_embedder.text_embedder.fc_in"),
    (r"^condition_embedder\.text_embedder\.linear_2", "condition_embedder.text_embedder.fc_out"),
    (r"^(condition_embedder\.time_embedder)\.linear_1", r"\1.mlp.fc_in"),
    (r"^(condition_embedder\.time_embedder)\.linear_2", r"\1.mlp.fc_out"),
    (r"^condition_embedder\.time_proj", "condition_embedder.time_modulation.linear"),
    (r"^blocks\.(\d+)\.attn1\.to_(q|k|v)", r"blocks.\1.to_\2"),
    (r"^blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.to_out"),
    (r"^blocks\.(\d+)\.attn1\.norm_(q|k)", r"blocks.\1.norm_\2"),
    (r"^blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.attn2.to_out"),
    (r"^blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.fc_in"),
    (r"^blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.fc_out"),
    (r"^blocks\.(\d+)\.norm2", r"blocks.\1.self_attn_residual_norm.norm"),
]  # fmt: skip


def fastvideo(name):
    for pattern, other in FASTVIDEO:
        name = re.sub(pattern, other, name)
    return name


def gates(layers, rows, columns, bias=True, name="blocks.{}.to_gate_compress"):
    out = {f"{name.format(i)}.weight": torch.randn(rows, columns) / 8 for i in range(layers)}
    return out | {f"{name.format(i)}.bias": torch.randn(rows) for i in range(layers) if bias}


def gate_of(tensors, name="blocks.{}.to_gate_compress"):
    def gate(layer, hidden):
        weight, bias = (tensors.get(f"{name.format(layer[1])}.{x}") for x in ("weight", "bias"))
        return torch.nn.functional.linear(hidden, weight, bias)

    return gate


@pytest.mark.parametrize("form", ["diffusers", "mixed", "fastvideo"])
def test_fastwan(tmp_path, form):
    """diffusers' names; half of them FastVideo's, in two files without an index; all of them."""
    trained = layouts.trained()
    own = gates(2, 192, 192)
    names = list(layouts.weights(trained))
    theirs = {"diffusers": [], "mixed": names[::2], "fastvideo": names}[form]
    tensors = {fastvideo(n) if n in theirs else n: x for n, x in layouts.weights(trained).items()}
    folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"
    two = form == "mixed"
    layouts.in_folder(folder / "transformer", tensors | own, 2 if two else 1, index=not two)
    with attending(trained, vsa(GRID, (4, 4, 4), SPARSITY, gate_of(own))):
        expected = clip(trained, DMD)
    pipe = layouts.base()
    found = dit_accel.load_checkpoint(pipe, folder, min_tokens=0, keep=1 - SPARSITY)
    assert (found.family, found.sampler) == ("FastWan", "dmd")
    assert (found.unused, found.missing, len(found.found)) == ([], [], len(tensors) + len(own))
    assert found.arguments == {"num_inference_steps": 3, "guidance_scale": 1.0}
    assert (found.config.order, found.config.tile) == ("tile", (4, 4, 4))
    assert error(run(pipe, steps=3, guidance=1.0), expected) < 1e-4


def test_vsa_of_many_steps_keeps_the_pipelines_sampler(tmp_path):
    trained = layouts.trained()
    tensors = layouts.weights(trained) | gates(2, 192, 192)
    folder = layouts.in_folder(
        tmp_path / "Wan2.1-VSA-T2V-14B-720P-Diffusers" / "transformer", tensors
    )
    pipe = layouts.base()
    scheduler = pipe.scheduler
    found = dit_accel.load_checkpoint(pipe, folder.parent)
    assert (found.family, found.sampler, found.arguments) == ("Wan VSA", None, {})
    assert pipe.scheduler is scheduler and found.config.method.keep == 0.2


BLOCK = "transformer_blocks.{}.attn.to_gate_compress"


def h3_clip(pipe, own):
    sections = (TEXT, SOUND)
    attention = vsa((3, 12, 12), (4, 4, 4), SPARSITY, gate_of(own, BLOCK), sections)
    with attending(pipe, attention, stock):
        return pipe()


@pytest.mark.parametrize("published", [False, True])
def test_fasth3_whole(tmp_path, published):
    """Eight steps, in diffusers' names or the published ones, with FastVideo's sidecar."""
    trained, own = H3(3), gates(2, 192, 96, bias=False, name=BLOCK)
    tensors = trained.transformer.state_dict() | own
    if published:
        tensors = as_published(tensors)
    folder = tmp_path / "FastVideo-FastH3-8-Step-V2"
    layouts.in_folder(folder / "transformer", tensors)
    sidecar = {
        "vsa_sparsity": 0.8, "video_scheduler_shift": 10.0, "audio_scheduler_shift": 3.0,
        "dmd_denoising_steps": [999, 874, 749, 624, 500, 375, 250, 125],
    }  # fmt: skip
    (folder / "fastvideo_inference.json").write_text(json.dumps(sidecar))
    pipe = H3(4)
    found = dit_accel.load_checkpoint(pipe, folder, min_tokens=0)
    assert found.family == "FastH3" and (found.unused, found.missing) == ([], [])
    assert found.config.method.keep == pytest.approx(0.2)
    assert found.arguments == {"num_inference_steps": 9}
    for scheduler, shift in ((pipe.scheduler, 10.0), (pipe.audio_scheduler, 3.0)):
        scheduler.set_timesteps(9)
        levels = [shift * u / (1000 + (shift - 1) * u) for u in sidecar["dmd_denoising_steps"]]
        assert scheduler.sigmas.tolist() == pytest.approx([*levels, 0])
    found.restore()
    dit_accel.load_checkpoint(pipe, folder, min_tokens=0, keep=1 - SPARSITY)
    assert error(pipe(), h3_clip(trained, own)) < 1e-5


def as_published(tensors):
    """The names of published single files: q, k, v in one, gate before value."""
    out = {}
    for name, x in tensors.items():
        if re.search(r"to_[kv]\.", name) or "rope" in name:
            continue
        new = layouts.h3_name(name)
        for ours, theirs in (
            ("norm_out.linear", "final_layer.adaln_proj.linear"),
            ("norm_out.norm", "final_layer.norm"),
            ("audio_proj_out", "final_layer.audio_out"),
            ("audio_proj_in", "audio_patch_proj"),
            ("attn.norm_q", "attn.q_norm"),
            ("attn.norm_k", "attn.k_norm"),
            ("time_embedder.linear_1", "time_embedder.proj_in"),
            ("time_embedder.linear_2", "time_embedder.proj_out"),
        ):
            new = new.replace(ours, theirs)
        new = re.sub(
            r"^proj_in", "video_patch_proj", re.sub(r"^proj_out", "final_layer.video_out", new)
        )
        if "attn.to_q." in name:
            new = new.replace("attn.to_q", "attn.qkv_proj")
            x = torch.cat([tensors[name.replace("to_q", f"to_{p}")] for p in "qkv"])
        if ".ff.net.0.proj." in name:
            x = torch.cat(x.chunk(2)[::-1])
        out[new] = x
    return out


def test_fasth3_adapter(tmp_path):
    """Four steps: low-rank pairs without alpha, differences, gates that are set."""
    trained, base = H3(3), H3(3)
    own = gates(2, 192, 96, bias=False, name=BLOCK)
    tensors = {f"{BLOCK.format(i)}.set_weight": own[f"{BLOCK.format(i)}.weight"] for i in range(2)}
    for name, x in trained.transformer.named_parameters():
        module, _, part = name.rpartition(".")
        if x.ndim == 2:
            down, up = torch.randn(3, x.shape[1]) / 16, torch.randn(x.shape[0], 3) / 16
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            x.data = x.data + up @ down
        else:
            change = torch.randn_like(x) / 16
            tensors[f"{module}.diff_b" if part == "bias" else f"{module}.diff"] = change
            x.data = x.data + change
    save_file(tensors, tmp_path / "FastH3-4-step-LoRA.safetensors")
    found = dit_accel.load_checkpoint(
        base, tmp_path / "FastH3-4-step-LoRA.safetensors", min_tokens=0, keep=1 - SPARSITY
    )
    assert found.family == "FastH3 adapter" and (found.unused, found.missing) == ([], [])
    assert len(found.found) == len(tensors)
    assert found.sampler == "dmd:999,749,500,250"
    assert error(base(), h3_clip(trained, own)) < 1e-5


def test_tiles_that_are_not_served(tmp_path):
    tensors = H3().transformer.state_dict() | gates(2, 192, 96, bias=False, name=BLOCK)
    folder = tmp_path / "FastH3"
    layouts.in_folder(folder / "transformer", tensors)
    (folder / "fastvideo_inference.json").write_text(json.dumps({"vsa_tile_size": 256}))
    with pytest.raises(ValueError, match="tiles of 256 tokens is not served"):
        dit_accel.load_checkpoint(H3(), folder)
