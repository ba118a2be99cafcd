"""What the compiler makes of kernels for GPUs that are not there, by processes of their own: in the
tests' one kernels are interpreted. `python -m compiling` prints a listing."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def fresh(*arguments: str) -> str:
    """The output of `python -m` with these arguments."""
    import forked

    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = forked.run([sys.executable, "-m", *arguments], environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compiled(*wanted: str) -> list[dict]:
    """What the compiler made of the cases `op@capability`."""
    lines = fresh("dit_accel.kernels.aot_cases", *wanted).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def listing(module: str, *extra: str, candidate: int = 0) -> list[str]:
    """PTX and machine code of a candidate of a module."""
    return fresh("compiling", module, str(candidate), *extra).split("\n=====\n")


def loops(code: str) -> list[str]:
    """The loops of machine code that multiply, inner ones of up to 1200 instructions."""
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    places = {int(at, 16): i for i, (at, _) in enumerate(instructions)}
    found = []
    for i, (at, text) in enumerate(instructions):
        back = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < int(at, 16) and int(back[1], 16) in places:
            body = [text for _, text in instructions[places[int(back[1], 16)] : i]]
            if len(body) < 1200 and any("GMMA" in text for text in body) and "NOP " not in body:
                found.append("\n".join(body))
    return found


def count(name: str, body: str) -> int:
    """How many instructions of a kind a loop has."""
    return len(re.findall(rf"\b{name}", body))


def main(module: str, candidate: str, *extra: str) -> None:
    """Print the PTX of a candidate of a module, with an extra, a line, and its machine code."""
    import torch
    import triton

    from dit_accel.kernels.aot import compile_for
    from dit_accel.kernels.aot_cases import CASES

    row = importlib.import_module(module).CANDIDATES[int(candidate)]
    kernel, arguments = CASES[row.op](row, 128, torch.bfloat16, *extra)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    asm = compile_for(kernel, arguments, 90, options).asm
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
    print(asm["ptx"], code, sep="\n=====\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
