"""Make the two checkpoints of a training run out of a pipeline folder: the inverse of export.py.

    python assets/training/begin.py assets/emoji --out data/run --minutes 3
    python assets/training/train.py --stage dit --resume --out data/run --dit-minutes 12

The autoencoder is taken as it is, so that latents stay what the transformer knows. --minutes says
where in the schedule of --dit-minutes training goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import WanPipeline
from models import Sizes
from run_state import Progress, save


def begin(folder: Path, out: Path, seconds: float) -> None:
    """Write out/vae and out/dit; ValueError where the folder does not name its emoji."""
    names_file = folder / "training.json"
    if not names_file.exists():
        raise ValueError(f"Expected {names_file}, which names the emoji; give a trained folder.")
    names = list(json.loads(names_file.read_text())["held_out"])
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    sizes = asdict(sizes_of(pipe))
    statistics = {key: pipe.vae.config[key] for key in ("latents_mean", "latents_std")}
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    vae = {f"vae.{name}": p.detach() for name, p in pipe.vae.named_parameters()}
    dit = {f"{k}.{n}": p.detach() for k, m in parts.items() for n, p in m.named_parameters()}
    save(out / "vae", vae, Progress(), {"sizes": sizes, **statistics})
    save(out / "dit", dit, Progress(0, seconds), {"sizes": sizes, "names": names})


def sizes_of(pipe: WanPipeline) -> Sizes:
    """The sizes that a pipeline's configurations name."""
    transformer, text, vae = pipe.transformer.config, pipe.text_encoder.config, pipe.vae.config
    return Sizes(
        layers=transformer.num_layers,
        heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        ffn=transformer.ffn_dim,
        text=text.d_model,
        text_layers=text.num_layers,
        vae=vae.base_dim,
        latent=vae.z_dim,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/run"))
    parser.add_argument("--minutes", type=float, default=0.0, help="of the schedule, done already")
    args = parser.parse_args()
    begin(args.folder, args.out, 60 * args.minutes)
    print(f"{args.out}: next: assets/training/train.py --stage dit --resume")


if __name__ == "__main__":
    main()
