"""What each model gives when two processes share its tokens by Ulysses (gloo), sparse attention on.

python tests/pipelines/shared.py     prints it
"""

from __future__ import annotations

import json
import socket
import tempfile
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import diffusers
import torch
from forked import spawn
from zoo import Case, Pipe, zoo

import dit_accel
from dit_accel import Schedule, TopK
from dit_accel.parallel import sharing

NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}


def planned() -> list[str]:
    """Classes whose tokens diffusers can split."""
    return [name for name in zoo() if getattr(getattr(diffusers, name), "_cp_plan", None)]


@cache
def observed() -> dict[str, str]:
    """Class → "yes" where two processes give what one gives, or why not."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        spawn(_work, (port, folder), 2)
        said = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    assert len(said) == 2
    return {name: next((s[name] for s in said if s[name] != "yes"), "yes") for name in said[0]}


def _work(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    wait = timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=wait
    )
    with torch.no_grad():
        found = {name: _one(name) for name in planned()}
    Path(folder, str(rank)).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _one(name: str) -> str:
    case = zoo()[name]
    if "Helios" in name:  # its plan names forty blocks
        case = replace(case, config={**case.config, "num_layers": 40})
    model = case.build()
    alone = [_run(model, case, sparse)[0] for sparse in (False, True)]
    config = diffusers.ContextParallelConfig(ulysses_degree=2, ulysses_anything=True)
    reasons: list[str] = []
    for sparse, expected in zip((False, True), alone, strict=True):
        whose = "" if sparse else "stock diffusers fails there, too: "
        try:
            if not sparse:
                sharing._share_on_cpu(model, config)
            together, reasons = _run(model, case, sparse)
        except RuntimeError as error:  # the same in both processes
            return f"no: {whose}{type(error).__name__}"
        far = max(map(_distance, together, expected))
        if far > 1e-4:
            return f"no: {whose}differs by {far:.0e}"
    return "; ".join(reasons) or "yes"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _run(model: torch.nn.Module, case: Case, sparse: bool) -> tuple[list[torch.Tensor], list[str]]:
    """The output of each of two steps, and why calls were dense."""
    pipe = Pipe(model, steps=2)
    if not sparse:
        return pipe.steps(case.arguments), []
    with dit_accel.accelerated(pipe, TopK(keep=0.3), **NOW) as handle:
        out = pipe.steps(case.arguments)
        return out, list(handle.report().fallbacks)


if __name__ == "__main__":
    for name, said in observed().items():
        print(f"{name:<36} {said}")
