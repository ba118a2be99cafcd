"""What an accelerated transformer costs on the host at each forward, beside its attention.

python benchmarks/forward_cost.py [--out FILE]     microseconds of a forward, on a CPU, as JSON
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
from tiny import tiny_wan  # noqa: E402

import dit_accel  # noqa: E402
from dit_accel.forward import clock  # noqa: E402
from dit_accel.runtime.engine import Engine  # noqa: E402
from dit_accel.runtime.patch import Patch  # noqa: E402

STEPS = 50
CLIP = {"height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 16}
PARTS = {
    "caller": (clock, "caller"),
    "bind": (Patch, "bind"),
    "tick": (clock.Clock, "tick"),
    "begin": (Engine, "begin"),
    "before": (Patch, "before"),
}


@contextmanager
def watched() -> Iterator[dict[str, list[float]]]:
    """Name → seconds of each call of PARTS: `before` holds all others, `tick` holds `caller`."""
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    real = {name: getattr(*where) for name, where in PARTS.items()}

    def wrapped(name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return real[name](*args, **kwargs)
            finally:
                times[name].append(time.perf_counter() - start)

        return timed

    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, wrapped(name))
    try:
        yield times
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, real[name])


def pipeline(pipe: Any) -> None:
    pipe(
        "a rocket",
        **CLIP,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )


def loop(pipe: Any) -> None:
    """A loop of one's own over a pipeline's transformer."""
    own(pipe.transformer)


def own(transformer: Any) -> None:
    """A loop of one's own; where nothing else is accelerated, no frame names a pipeline."""
    latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 16, 32)
    with torch.no_grad():
        for step in range(STEPS):
            transformer(latents, torch.tensor([1000.0 - step]), text)


def deep(call: Callable[[], Any], frames: int) -> None:
    """`call`, so many frames further down: servers and notebooks have some."""
    local = list(range(10))
    if frames:
        deep(call, frames - 1)
    else:
        call()
    del local


def measure(layers: int, how: str, frames: int) -> dict[str, Any]:
    """The median microseconds of each part over the forwards after the first.

    how: who calls. The pipeline; a loop beside it; a loop over a transformer that was accelerated
    by itself; a loop over one whose pipeline is gone, which is searched for at each forward.
    """
    pipe = tiny_wan(layers=layers, heads=1, head_dim=64)
    run = {"pipeline": pipeline, "loop": loop, "transformer": own, "orphan": own}[how]
    pipe = pipe.transformer if how == "transformer" else pipe
    with watched() as times:
        dit_accel.accelerate(pipe, "topk", min_tokens=0)
        pipe = pipe.transformer if how == "orphan" else pipe
        deep(lambda: run(pipe), frames)
    row = {name: round(statistics.median(x[1:]) * 1e6, 1) for name, x in times.items()}
    return {"layers": layers, "how": how, "frames": frames, "us": row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = [
        measure(layers, how, frames)
        for layers in (2, 30, 60)
        for how in ("pipeline", "loop", "transformer", "orphan")
        for frames in (0, 40)
    ]
    found = {
        "command": "python benchmarks/forward_cost.py",
        "machine": f"{platform.machine()}, {platform.processor() or 'CPU'}, one thread",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "dit-accel")},
        "forwards": STEPS - 1,
        "rows": rows,
    }
    for row in rows:
        print(row)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
