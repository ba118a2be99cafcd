"""Few steps on the embedded model: what each method and warm-up keeps of the dense clip.

    python benchmarks/few_steps.py -o benchmarks/results/few-steps.json --steps 4 8 --prompts 2

Each row is held against the dense clip of as many steps, with --full against one of so many, too. A
clip that is measured is not measured again. Times are of whatever else the machine does, too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_accel import Pooled, Schedule, SharedResidual, TopK, accelerated
from dit_accel.config import AccelConfig, resolve
from dit_accel.evaluate.scenes import recogniser
from dit_accel.generation import Boost, Request, generate, load_pipeline
from dit_accel.generation.loading import EMBEDDED
from dit_accel.inputs.prompts import read_prompts
from dit_accel.machine import describe
from dit_accel.media.quality import quality


def rows(tuned: Path | None) -> dict[str, tuple[AccelConfig | None, Boost]]:
    """Name → configuration; a warm-up of one step, of none. tuned: what `finetune` wrote."""
    methods = {
        "shared 10%, one full step": SharedResidual(keep=0.1, period=1.0),
        "topk 30%": TopK(keep=0.3),
        "pooled 30%": Pooled(keep=0.3),
        "pooled 10%": Pooled(keep=0.1),
        "shared 10%": SharedResidual(keep=0.1),
    }
    found: dict[str, tuple[AccelConfig | None, Boost]] = {"dense": (None, Boost())}
    if tuned:
        sla = replace(resolve(tuned / "preset.json"), min_tokens=0)
        name = f"sla {sla.method.keep:.0%}, fine-tuned, warm-up 0"
        found[name] = sla, Boost(lora=f"{tuned}/lora")
    for warmup in (0, 1):
        for name, method in methods.items():
            config = AccelConfig(method, Schedule(warmup=warmup), min_tokens=0)
            found[f"{name}, warm-up {warmup}"] = config, Boost()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--full", type=int, default=0, help="steps of the clip to compare with")
    parser.add_argument("--tuned", type=Path, help="folder of a fine-tuned SLA with its LoRA")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    pipe, defaults = load_pipeline(None, asked.device, "fp32" if asked.device == "cpu" else "bf16")
    judge = recogniser(None, asked.device)
    assert not isinstance(judge, str), judge
    data: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "machine": describe(asked.device),
        "clips": [],
    }
    if asked.output.is_file():
        data = json.loads(asked.output.read_text())
    known = {(c["prompt"], c["steps"], c["row"]) for c in data["clips"]}
    prompts = read_prompts(EMBEDDED.parent / "prompts-tuning.txt")[: asked.prompts]
    for prompt in prompts:
        best = None
        for steps in asked.steps:
            dense = None
            for name, (config, boost) in rows(asked.tuned).items():
                if (prompt, steps, name) in known:
                    continue
                if asked.full and best is None:
                    best = generate(pipe, defaults, Request(prompt, steps=asked.full))
                dense = dense or generate(pipe, defaults, Request(prompt, steps=steps))
                clip, kept = dense, 1.0
                if config is not None:
                    with boost.adapted(pipe), accelerated(pipe, config) as handle:
                        clip = generate(pipe, defaults, Request(prompt, steps=steps))
                        kept = handle.report().kept
                line = {"prompt": prompt, "steps": steps, "row": name, "kept": kept}
                line["psnr"] = (
                    None if clip is dense else quality(dense.frames, clip.frames).psnr_mean
                )
                if best is not None:
                    line["psnr_full"] = quality(best.frames, clip.frames).psnr_mean
                line |= judge.judge([prompt], [torch.as_tensor(clip.frames)])[0]
                data["clips"].append(line)
                asked.output.write_text(json.dumps(data, indent=1) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
