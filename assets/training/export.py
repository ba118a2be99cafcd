"""Make a stock WanPipeline folder out of the two checkpoints of a training run.

python assets/training/export.py --run data/run --out data/export
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import WanPipeline
from models import Sizes, build_scheduler, build_text_encoder, build_tokenizer, build_transformer
from run_state import load
from train_dit import load_vae

GENERATION = {
    "height": 256,
    "width": 256,
    "num_frames": 33,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "negative_prompt": "",
    "max_sequence_length": 512,
    "fps": 24,
}


def pipeline(run: Path) -> WanPipeline:
    """The pipeline of a run's checkpoints in bfloat16; ValueError if a stage is missing."""
    tensors, _, extra = load(run / "dit")
    sizes = Sizes(**extra["sizes"])
    tokenizer = build_tokenizer(extra["names"])
    parts = {
        "transformer": build_transformer(sizes),
        "text_encoder": build_text_encoder(sizes, len(tokenizer)),
    }
    for part, module in parts.items():
        own = {
            k.removeprefix(part + "."): v for k, v in tensors.items() if k.startswith(part + ".")
        }
        missing, unexpected = module.load_state_dict(own, strict=False)
        tied = {"encoder.embed_tokens.weight", "shared.weight"}
        if set(missing) - tied or unexpected:
            raise ValueError(f"Expected the weights of {part}, got others: {missing} {unexpected}.")
    return WanPipeline(
        tokenizer=tokenizer,
        vae=load_vae(run / "vae", torch.device("cpu")),
        scheduler=build_scheduler(),
        **parts,
    ).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("data/run"))
    parser.add_argument("--out", type=Path, default=Path("data/export"))
    args = parser.parse_args()
    pipeline(args.run).save_pretrained(args.out)
    (args.out / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    config = args.out / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    total = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB; next: assets/training/compress.py")


if __name__ == "__main__":
    main()
