"""What `dit-accel doctor` predicts from one layer, beside the steps of the whole model.

    PYTHONPATH=. python benchmarks/doctor_check.py --out doctor.json      three minutes on an H100
    PYTHONPATH=. python benchmarks/doctor_check.py --out /tmp/x.json --tiny --device cpu

Both on the same device, in one run: seconds of a dense denoising step, and by how much a run of 50
steps is faster with each method as it comes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from dit_accel.bench.end_to_end import Benchmark
from dit_accel.bench.models import MODELS, Model
from dit_accel.bench.rows import Row
from dit_accel.doctor.diagnosis import Diagnosis
from dit_accel.doctor.run import examine
from dit_accel.doctor.sample import from_config
from dit_accel.machine import describe

STEPS = 50


def diagnosis(model: Model, device: torch.device, tiny: bool) -> tuple[Diagnosis, int]:
    """What doctor says of the model's configuration, and its transformer forwards in a step."""
    small = model.tiny if tiny else {}
    with torch.device("meta"):
        kind = getattr(diffusers, model.transformer)
        config = dict(kind(**{**model.config, **small.get("config", {})}).config)
    height, width, *frames = small.get("size", model.size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    asked = (frames[0] if frames else 1, height, width)
    patient = from_config({**config, "_class_name": model.transformer}, asked, device, dtype)
    return examine(patient, steps=STEPS), patient.passes


def compared(found: Diagnosis, passes: int, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Predicted, measured, and the one over the other minus one."""
    stock = rows["stock"]["seconds"]["dense"]
    pairs = {"dense step s": (found.forward_seconds * passes, stock)}
    for outlook in found.outlook:
        measured = rows.get(f"{outlook.method}@{outlook.keep:g}", {}).get("speedup")
        if measured and outlook.predicted:
            pairs[f"{outlook.method}@{outlook.keep:g} speed-up"] = (outlook.predicted, measured)
    return {
        name: {"predicted": p, "measured": m, "error": round(p / m - 1, 4)}
        for name, (p, m) in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    usual = ["wan1.3b-480p", "cogvideox-5b", "flux-1024"]
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=usual)
    parser.add_argument("--rows", nargs="*", default=["pooled@0.25", "rectified@0.25"])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the path")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device, models = torch.device(given.device), [MODELS[name] for name in given.model]
    rows = [Row.parse(name) for name in ("stock", *given.rows)]
    benchmark = Benchmark(device, 2, STEPS, tiny=given.tiny, minutes=given.minutes, min_tokens=0)
    record: dict[str, Any] = {
        "machine": describe(),
        "command": " ".join(["doctor_check.py", *given.model]),
    }
    for model in models:
        found, passes = diagnosis(model, device, given.tiny)
        benchmark.run([model], rows)
        mine = {r["row"]: r for r in benchmark.rows if r["model"] == model.name and "seconds" in r}
        record[model.name] = compared(found, passes, mine) if "stock" in mine else "not timed"
        print(model.name, json.dumps(record[model.name]), flush=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
