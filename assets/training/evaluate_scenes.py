"""How often a model of scenes shows what its prompt says, over trained and held-out combinations.

    python assets/training/evaluate_scenes.py --model data/small --batch 20 --grid assets/grid.png

Prompts and noise are the same for every model and canvas size. On a GPU products run in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from evaluate import grid
from references import small
from scene_set import VOCABULARY
from show_scenes import prompts
from torch import Tensor

from dit_accel.evaluate.recognition import References
from dit_accel.evaluate.scenes import SceneRecogniser

SEEN = ("emoji", "alone", "colour", "place", "motion")


def generate(pipe: WanPipeline, call: dict, asked: list[str], batch: int) -> list[Tensor]:
    """uint8 [T, H, W, 3] of each prompt; a clip's noise is its number's."""
    clips, on_gpu = [], pipe.device.type == "cuda"
    for start in range(0, len(asked), batch):
        group = asked[start : start + batch]
        noise = [torch.Generator().manual_seed(start + n) for n in range(len(group))]
        negative = {"negative_prompt": [call["negative_prompt"]] * len(group)}
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=on_gpu):
            frames = pipe(group, generator=noise, **call | negative).frames
        clips += [torch.from_numpy((f * 255).round().astype(np.uint8)) for f in frames]
        print(f"{len(clips)} of {len(asked)} clips", flush=True)
    return clips


def shares(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """The share of the clips where each holds, of those that were asked for it; and how many."""
    out: dict[str, float] = {"prompts": len(verdicts)}
    for name in SEEN:
        known = [v[name] for v in verdicts if name in v]
        if known:
            out[name] = round(sum(known) / len(known), 3)
    return out


def report(recogniser: SceneRecogniser, asked: list[str], clips: list[Tensor]) -> dict:
    """Shares of trained and of held-out combinations, and by the number of emoji."""
    verdicts = recogniser.judge(asked, clips)
    for prompt, verdict in zip(asked, verdicts, strict=True):
        wrong = [name for name, right in verdict.items() if not right]
        print(f"{prompt}: {'wrong: ' + ', '.join(wrong) if wrong else 'right'}", flush=True)
    count = [len(VOCABULARY.read(prompt).objects) for prompt in asked]
    rows = {"trained": verdicts[::2], "held_out": verdicts[1::2]}
    rows |= {f"{n} emoji": [v for v, c in zip(verdicts, count, strict=True) if c == n]
             for n in sorted(set(count))}  # fmt: skip
    return {name: shares(found) for name, found in rows.items()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("assets/emoji"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--references", type=Path, help="of references.py --scenes")
    parser.add_argument("--out", type=Path, default=Path("data/eval-scenes.json"))
    parser.add_argument("--count", type=int, default=200, help="prompts, half of them held out")
    parser.add_argument("--side", type=int, help="default: the model's")
    parser.add_argument("--frames", type=int, help="default: the model's")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--batch", type=int, default=1, help="clips in one call")
    parser.add_argument("--grid", type=Path, help="write a picture of 16 clips here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    call = json.loads((args.model / "generation.json").read_text())
    call.pop("fps")
    given = {"height": args.side, "width": args.side, "num_frames": args.frames,
             "num_inference_steps": args.steps}  # fmt: skip
    call |= {name: value for name, value in given.items() if value}
    pipe = WanPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    found = References.load(args.references) if args.references else small(args.data, scenes=True)
    asked = prompts(call["height"], args.count)
    clips = generate(pipe, call, asked, args.batch)
    if args.grid:
        grid(clips[:16], args.grid)
    results = {"model": str(args.model), **call, **report(SceneRecogniser(found, 1), asked, clips)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
