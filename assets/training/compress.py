"""Round a pipeline folder's matrices to 8-bit floats; diffusers widens them on loading.

    python assets/training/compress.py data/export assets/emoji

Linear layers are rounded to float8_e4m3fn column by column, each column's error being fed forward
through the inverse Hessian of the layer's real inputs (GPTQ, arXiv 2210.17323), which are
taken from the pipeline while it generates. Convolution kernels are rounded to the nearest value.
Vectors, embeddings, time projection and small matrices stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import WanPipeline
from emoji_set import COLOURS, caption
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EIGHT_BIT = torch.float8_e4m3fn
SMALLEST = 30_000
EXACT = ("time_proj", "shared")
FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def round_columns(weight: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """weight [out, in] rounded to 8-bit floats so that weight @ input changes little.

    hessian: [in, in] mean outer product of the inputs.
    """
    order = hessian.diagonal().argsort(descending=True)
    h = hessian.double()[order][:, order]
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float()[:, order].clone()
    rounded = torch.empty_like(left)
    for i in range(left.shape[1]):
        rounded[:, i] = left[:, i].to(EIGHT_BIT).float()
        error = (left[:, i] - rounded[:, i]) / factor[i, i]
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return rounded[:, order.argsort()].to(EIGHT_BIT)


class Inputs:
    """Mean outer product of the inputs of every linear layer, summed by hooks."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}
        for part, module in modules.items():
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(self._hook(f"{part}.{name}"))

    def _hook(self, name: str):  # noqa: ANN202
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            x = x[::4] if len(x) > 2000 else x
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + x.T @ x, count + len(x))

        return add

    def mean(self, name: str) -> Tensor:
        """[in, in] of one layer."""
        total, count = self.sums[name]
        return total / count


@torch.no_grad()
def calibrate(pipe: WanPipeline, defaults: dict, prompts: list[str], clips: int) -> Inputs:
    """Generate the first `clips` prompts in eight steps; show the text layers every prompt and
    time."""
    transformer, embedder = pipe.transformer, pipe.transformer.condition_embedder
    inputs = Inputs({"transformer": transformer, "text_encoder": pipe.text_encoder})
    call = {k: v for k, v in defaults.items() if k != "fps"} | {"num_inference_steps": 8}
    pipe(prompts[:clips], output_type="latent", **call | _negatives(defaults, clips))
    for name in [
        n for n in inputs.sums if "blocks" not in n or ".attn2.to_k" in n or ".attn2.to_v" in n
    ]:
        del inputs.sums[name]
    for start in range(0, len(prompts), 64):
        batch = prompts[start : start + 64] + [defaults["negative_prompt"]] * 8
        text, _ = pipe.encode_prompt(
            batch, do_classifier_free_guidance=False, max_sequence_length=16
        )
        _, _, keys, _ = embedder(torch.rand(len(batch)) * 1000, text.float())
        for block in transformer.blocks:
            block.attn2.to_k(keys)
            block.attn2.to_v(keys)
    embedder(torch.linspace(0, 1000, 2001), text[:1].float())
    return inputs


def trained(captions: Path) -> list[str]:
    """A prompt of every emoji of the archive, on colours that it was trained on."""
    prompts = []
    for number, clip in enumerate(json.loads(captions.read_text())["clips"]):
        colours = [c for c in COLOURS if c != clip["held_out"]]
        prompts.append(caption(clip["name"], colours[number % len(colours)]))
    return prompts


def _negatives(defaults: dict, count: int) -> dict:
    return {"negative_prompt": [defaults["negative_prompt"]] * count}


def write(source: Path, target: Path, inputs: Inputs) -> None:
    """Copy the folder with rounded weights."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for part, file in FILES.items():
        tensors = load_file(source / part / file)
        for name, weight in tensors.items():
            if weight.dim() < 2 or weight.numel() < SMALLEST or any(e in name for e in EXACT):
                continue
            layer = f"{part}.{name.removesuffix('.weight')}"
            known = layer in inputs.sums
            tensors[name] = (
                round_columns(weight, inputs.mean(layer)) if known else weight.to(EIGHT_BIT)
            )
        save_file(tensors, target / part / file, metadata={"format": "pt"})
    config = target / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="pipeline folder with generation.json")
    parser.add_argument("target", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts.txt"))
    parser.add_argument("--captions", type=Path, default=Path("data/emoji/captions.json"))
    parser.add_argument("--scenes", action="store_true", help="calibrate on random scenes")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=17)
    args = parser.parse_args()
    pipe = WanPipeline.from_pretrained(args.source, torch_dtype=torch.float32)
    pipe.text_encoder.float()
    if args.scenes:
        from show_scenes import prompts as scenes

        prompts = scenes(256, 400)[::2]
    else:
        prompts = args.prompts.read_text().splitlines() + trained(args.captions)
    defaults = json.loads((args.source / "generation.json").read_text())
    defaults |= {"num_frames": args.frames, "height": 256, "width": 256}
    torch.manual_seed(0)
    write(args.source, args.target, calibrate(pipe, defaults, prompts, args.clips))
    total = sum(f.stat().st_size for f in args.target.rglob("*") if f.is_file())
    print(f"{args.target}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
