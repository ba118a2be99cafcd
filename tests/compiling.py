"""What the compiler makes of kernels for GPUs that are not there, by processes of their own: in the
tests' one kernels are interpreted."""

import json
import os
import subprocess
import sys

# Prints the PTX of the first candidate of a module, with an extra, a line, and its machine code.
_LISTING = """
import importlib, subprocess, sys, tempfile, torch, triton
from pathlib import Path
from dit_accel.kernels.aot import compile_for
from dit_accel.kernels.aot_cases import CASES
row = importlib.import_module(sys.argv[1]).CANDIDATES[0]
kernel, arguments = CASES[row.op](row, 128, torch.bfloat16, *sys.argv[2:])
options = {"num_warps": 4, "enable_fp_fusion": False}
asm = compile_for(kernel, arguments, 90, options).asm
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(asm["cubin"])
    file.flush()
    code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
print(asm["ptx"], code, sep="\\n=====\\n")
"""


def fresh(*arguments: str) -> str:
    """The output of Python with these arguments."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compiled(*wanted: str) -> list[dict]:
    """What the compiler made of the cases `op@capability`."""
    lines = fresh("-m", "dit_accel.kernels.aot_cases", *wanted).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def listing(module: str, *extra: str) -> list[str]:
    """PTX and machine code of the first candidate of a module."""
    return fresh("-c", _LISTING, module, *extra).split("\n=====\n")
