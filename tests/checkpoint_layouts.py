"""Files as the public's checkpoints are laid out, with random tensors at small width."""

import json
import re
from pathlib import Path

import torch
from diffusers import MiniMaxH3Transformer3DModel
from diffusers.schedulers import MiniMaxH3Scheduler
from safetensors.torch import save_file
from tiny import tiny_wan
from torch import Tensor

# diffusers' name → Wan's own, in this order
_WAN = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
]


def wan_name(name: str) -> str:
    """diffusers' name → the one in Wan's own files."""
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace("scale_shift_table", "modulation")
    for ours, theirs in _WAN:
        name = name.replace(ours, theirs)
    return name


def projections(pipe, prefix: str = "blocks.{}.self_attn.attn_op.local_attn.proj_l") -> dict:
    """SLA's tensors of each layer, large enough to be seen."""
    d = pipe.transformer.config.attention_head_dim
    out = {}
    for i in range(len(pipe.transformer.blocks)):
        out[prefix.format(i) + ".weight"] = torch.randn(d, d) / d**0.5
        out[prefix.format(i) + ".bias"] = torch.randn(d) / 4
    return out


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and a scale for each 128 × 128 tile."""
    tiles = [-(-n // 128) for n in weight.shape]
    scale, out = torch.empty(tiles), torch.empty(weight.shape, dtype=torch.int8)
    for i in range(tiles[0]):
        for j in range(tiles[1]):
            tile = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scale[i, j] = tile.abs().max() / 127
            rounded = (tile / scale[i, j]).round().to(torch.int8)
            out[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = rounded
    return out, scale


def turbowan(path: Path, pipe, learned: dict, quant: bool = False, nest: bool = False) -> Path:
    """TurboWan…pth of the pipeline's transformer: Wan's names, a linear patch embedding."""
    tensors = {wan_name(n): x.clone() for n, x in pipe.transformer.state_dict().items()}
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].flatten(1)
    for name in [n for n in tensors if quant and re.match(r"blocks\..*weight$", n)]:
        if tensors[name].ndim == 2:
            base = name.removesuffix("weight")
            tensors[base + "int8_weight"], tensors[base + "scale"] = quantised(tensors.pop(name))
    tensors |= learned
    torch.save(
        {"state_dict": {f"net.{n}": x for n, x in tensors.items()}} if nest else tensors, path
    )
    return path


def in_folder(folder: Path, tensors: dict, files: int = 1, index: bool = True) -> Path:
    """A transformer's folder in diffusers' format, in several files, with an index or without."""
    folder.mkdir(parents=True)
    places = {}
    for i, name in enumerate(sorted(tensors)):
        places[name] = f"diffusion_pytorch_model-{i % files + 1:05d}-of-{files:05d}.safetensors"
    for file in set(places.values()):
        part = {n: tensors[n].clone().contiguous() for n in tensors if places[n] == file}
        save_file(part, folder / file)
    if index:
        text = json.dumps({"weight_map": places})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return folder


def weights(pipe) -> dict[str, Tensor]:
    return {n: x.clone() for n, x in pipe.transformer.state_dict().items()}


def trained(seed: int = 5, **options):
    """The model that the checkpoint is of."""
    return tiny_wan(seed=seed, heads=3, **options)


def base(seed: int = 5, **options):
    """The stock pipeline that it is loaded into: other weights in its transformers alone."""
    pipe = trained(seed, **options)
    for transformer in (pipe.transformer, pipe.transformer_2):
        for x in transformer.parameters() if transformer is not None else ():
            x.data = torch.randn_like(x) / 8
    return pipe


GENERATION = {
    "height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0,
    "max_sequence_length": 16, "fps": 8,
}  # fmt: skip


def saved(folder: Path) -> tuple[Path, Path]:
    """The stock pipeline in a folder, and beside it a checkpoint for it, of TurboWan's layout."""
    torch.manual_seed(0)
    base().save_pretrained(folder / "wan")
    (folder / "wan" / "generation.json").write_text(json.dumps(GENERATION))
    pipe = trained()
    file = folder / "TurboWan2.1-T2V-1.3B-480P.pth"
    return folder / "wan", turbowan(file, pipe, projections(pipe))


TEXT, SOUND = 20, 6


class H3:
    """As much of MiniMax H3's pipeline as is needed; a clip of 3 x 12 x 12 tokens."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.transformer = MiniMaxH3Transformer3DModel(
            num_attention_heads=3,
            attention_head_dim=64,
            hidden_size=96,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=64,
            in_channels=4,
            audio_in_channels=8,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=32,
            time_embed_dim=32,
            rope_freq_dim=8,
        ).eval()
        self.scheduler, self.audio_scheduler = MiniMaxH3Scheduler(12.0), MiniMaxH3Scheduler(3.0)

    @torch.no_grad()
    def __call__(self, seed: int = 1) -> Tensor:
        """The velocity of one forward."""
        torch.manual_seed(seed)
        clip, ahead = 3 * 12 * 12, TEXT + SOUND
        cells = torch.cartesian_prod(*(torch.arange(n) for n in (3, 12, 12))) * 0.5
        return self.transformer(
            hidden_states=torch.randn(1, clip, 16),
            audio_hidden_states=torch.randn(1, SOUND, 8),
            encoder_hidden_states=torch.randn(1, TEXT, 16),
            timestep=torch.tensor([0.5]),
            timestep_indices=torch.zeros(ahead + clip, dtype=torch.long),
            token_tags=torch.tensor([1] * TEXT + [2] * SOUND + [0] * clip),
            position_ids=torch.cat([torch.zeros(ahead, 3), cells]).double(),
            video_indices=torch.arange(ahead, ahead + clip),
            audio_indices=torch.arange(TEXT, ahead),
            text_indices=torch.arange(TEXT),
            return_dict=False,
        )[0]


# diffusers' module of H3 → the published one
H3_NAMES = [
    ("token_refiner.refiner_blocks.", "token_refiner.blocks."),
    ("transformer_blocks.", "blocks."),
    (".attn.to_out.0", ".attn.out_proj"),
    (".ff.net.0.proj", ".mlp.fc1"),
    (".ff.net.2", ".mlp.fc2"),
    ("context_embedder", "condition_proj"),
]


def h3_name(name: str) -> str:
    for ours, theirs in H3_NAMES:
        name = name.replace(ours, theirs)
    return name


# diffusers' module of HunyuanVideo 1.5 → Tencent's, in this order
_HUNYUAN = [
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2"),
    ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    ("time_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
    ("time_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
    ("context_embedder_2.norm", "byt5_in.layernorm"),
    ("context_embedder_2.linear_", "byt5_in.fc"),
    ("image_embedder.norm_in", "vision_in.proj.0"),
    ("image_embedder.linear_1", "vision_in.proj.1"),
    ("image_embedder.linear_2", "vision_in.proj.3"),
    ("image_embedder.norm_out", "vision_in.proj.4"),
    ("x_embedder", "img_in"),
    ("cond_type_embed", "cond_type_embedding"),
    ("proj_out", "final_layer.linear"),
]
_HUNYUAN_REFINER = [
    ("attn.to_out.0", "self_attn_proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
    ("norm_out.linear", "adaLN_modulation.1"),
]
_HUNYUAN_BLOCK = [
    ("norm1_context", "txt_mod"),
    ("norm1", "img_mod"),
    ("attn.norm_added_q", "txt_attn_q_norm"),
    ("attn.norm_added_k", "txt_attn_k_norm"),
    ("attn.norm_q", "img_attn_q_norm"),
    ("attn.norm_k", "img_attn_k_norm"),
    ("attn.to_out.0", "img_attn_proj"),
    ("attn.to_add_out", "txt_attn_proj"),
    *((f"attn.to_{x}", f"img_attn_{x}") for x in "qkv"),
    *((f"attn.add_{x}_proj", f"txt_attn_{x}") for x in "qkv"),
    ("ff_context.net.0.proj", "txt_mlp.fc1"),
    ("ff_context.net.2", "txt_mlp.fc2"),
    ("ff.net.0.proj", "img_mlp.fc1"),
    ("ff.net.2", "img_mlp.fc2"),
]


def hunyuan_name(name: str) -> str:
    if name.startswith("transformer_blocks."):
        for ours, theirs in _HUNYUAN_BLOCK:
            name = name.replace(f".{ours}.", f".{theirs}.")
        return name.replace("transformer_blocks", "double_blocks")
    if "refiner_blocks" in name:
        for ours, theirs in _HUNYUAN_REFINER:
            name = name.replace(ours, theirs)
    if name.startswith("norm_out."):
        return name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")
    for ours, theirs in _HUNYUAN:
        name = name.replace(ours, theirs)
    return name


def hunyuan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as Tencent publishes them: the refiner's q, k, v in one, shift before scale."""
    out = {hunyuan_name(name): x.clone() for name, x in state.items()}
    for name in [n for n in out if ".attn.to_q." in n]:
        parts = [out.pop(name.replace("to_q", f"to_{x}")) for x in "qkv"]
        out[name.replace("attn.to_q", "self_attn_qkv")] = torch.cat(parts)
    for name in ("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"):
        scale, shift = out[name].chunk(2)
        out[name] = torch.cat([shift, scale])
    return out
