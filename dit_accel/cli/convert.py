"""`dit-accel convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.options import checked, option
from dit_accel.generation.options import WHAT

Files = Annotated[
    list[str], typer.Argument(help="File, folder or hub id; Wan 2.2's two experts together.")
]
Output = Annotated[Path, option("Folder to write.", WHAT, "--output", "-o")]
Dtype = Annotated[str, option("Of the weights: bf16, fp16, fp32, or kept. \\[bf16]", WHAT)]


def convert(files: Files, output: Output, dtype: Dtype = "bf16") -> None:
    """Write what others have trained as a folder for load_checkpoint and --method.

    dit-accel convert TurboWan2.1-T2V-1.3B-480P.pth -o turbowan

    dit-accel convert TurboWan2.2-I2V-A14B-high-720P.pth TurboWan2.2-I2V-A14B-low-720P.pth -o i2v
    """
    import torch

    from dit_accel.checkpoints import convert
    from dit_accel.cli.screen import screen
    from dit_accel.generation.loading import pick_dtype

    with checked():
        kind = None if dtype == "kept" else getattr(torch, pick_dtype(dtype, torch.device("cpu")))
        account = convert(*files, out=output, dtype=kind)
    out = screen()
    for slot, part in account["parts"].items():
        what = "weights" if part["whole"] else "changes of weights"
        out.print(f"{output / slot}: {account['family']}, {what}, {len(part['used'])} tensors read")
        for name in part["unused"]:
            out.print(f"  unused: {name}")
    if (output / "preset.json").exists():
        out.print(f"--method {output / 'preset.json'}")
    if account["sampler"]:
        out.print(f"--sampler {account['sampler']}")
    for note in account.get("notes", ()):
        out.print(f"note: {note}")
