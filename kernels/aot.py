"""Compile kernels for a GPU that is not there, and read what the compiler made of them.

Registers, bytes of stack, and whether loads are asynchronous (cp.async, TMA) and products use the
tensor cores. Inputs may be on the meta device: only their shapes, strides and dtypes count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from triton import JITFunction
    from triton.compiler import CompiledKernel


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel.

    kernel: its name.
    capability: compute capability times ten.
    registers: of a thread.
    stack, shared: bytes of stack and of shared memory.
    cp_async, tma, wgmma, mma: instructions.
    """

    kernel: str
    capability: int
    registers: int
    stack: int
    shared: int
    cp_async: int
    tma: int
    wgmma: int
    mma: int


def _specialize(
    value: Any, path: tuple[int, ...], fixed: bool, constants: dict, attrs: dict
) -> Any:
    if isinstance(value, tuple):
        return tuple(
            _specialize(item, (*path, i), fixed, constants, attrs) for i, item in enumerate(value)
        )
    if value is None or (isinstance(value, int) and value == 1 and not fixed):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attrs[path] = [["tt.divisibility", 16]]
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor | HopperDescriptor):
        shape = ",".join(str(size) for size in value.block_shape)
        layout = f",{value.layout!r}" if isinstance(value, HopperDescriptor) else ""
        return f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]{layout}>"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0 and not fixed:
        attrs[path] = [["tt.divisibility", 16]]
    return "i32" if abs(value) < 2**31 else "i64"


def compile_for(
    kernel: JITFunction, arguments: dict[str, object], capability: int, options: dict[str, int]
) -> CompiledKernel:
    """Compile a `triton.jit` or `gluon.jit` function as a launch with these arguments would."""
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    signature = {}
    for i, param in enumerate(kernel.params):
        if param.is_constexpr:
            signature[param.name], constants[(i,)] = "constexpr", arguments[param.name]
        else:
            signature[param.name] = _specialize(
                arguments[param.name], (i,), param.do_not_specialize, constants, attrs
            )
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(
    kernel: JITFunction, arguments: dict[str, object], capability: int, options: dict[str, int]
) -> Report:
    """Compile and read the result; raises RuntimeError when the binary cannot be read."""
    compiled = compile_for(kernel, arguments, capability, options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(
            f"expected a resource report of {kernel.__name__}, got {usage!r}; check {tool}"
        )
    ptx = compiled.asm["ptx"]
    return Report(
        kernel.__name__,
        capability,
        int(found[1]),
        int(found[2]),
        compiled.metadata.shared,
        len(re.findall(r"cp\.async\.c[ag]", ptx)),
        len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", ptx)),
        len(re.findall(r"\bmma\.sync", ptx)),
    )
