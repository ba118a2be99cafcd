"""Make a stock WanPipeline folder out of a checkpoint of train_scenes.py.

    python assets/training/export_scenes.py data/scenes/dit --out data/export
    python assets/training/compress.py data/export assets/emoji --scenes

The autoencoder, and the sizes, are those of --model.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import torch
from diffusers import WanPipeline
from emoji_set import COLOURS, held_out
from run_state import Average, load
from scene_flow import Flow
from scene_set import EMOJI, VOCABULARY, pair_is_held_out

GENERATION = {
    "height": 384,
    "width": 384,
    "num_frames": 33,
    "num_inference_steps": 20,
    "guidance_scale": 1.0,
    "negative_prompt": "",
    "max_sequence_length": 512,
    "fps": 24,
}

EXAMPLES = (
    "a rocket above a crab on a blue to pink background, moving up",
    "a penguin left of a snowman on a dotted blue background, zooming in",
    "a large fox on a striped green background, moving right",
)  # what the page begins with


def facts() -> dict:
    """What training.json says: vocabulary, prompts to begin with, held-out colours and pairs."""
    return {
        "scenes": True,
        "examples": EXAMPLES,
        "frame_stride": 1,
        "colours": COLOURS,
        "held_out": {name: held_out(name) for name in EMOJI},
        "held_out_pairs": [pair for pair in combinations(EMOJI, 2) if pair_is_held_out(*pair)],
    }


def pipeline(checkpoint: Path, model: Path) -> WanPipeline:
    """The pipeline of a checkpoint in bfloat16."""
    flow, pipe = Flow.of(model, VOCABULARY)
    Average(flow.parts, decay=0.0).load(load(checkpoint)[0])
    return pipe.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", type=Path, default=Path("assets/emoji"))
    parser.add_argument("--out", type=Path, default=Path("data/export"))
    args = parser.parse_args()
    pipeline(args.checkpoint, args.model).save_pretrained(args.out)
    (args.out / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    (args.out / "training.json").write_text(json.dumps(facts(), indent=1) + "\n")
    config = args.out / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    total = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB; next: assets/training/compress.py --scenes")


if __name__ == "__main__":
    main()
