"""Linear layers in eight bits, by torchao: what attention leaves of a step is mostly these.

Int8 multiplies rows of activations, scaled as they come, by weights scaled per output channel;
fp8 the same in float8_e4m3. Only the linear layers of the repeated blocks are changed: embeddings,
modulation and the last projection are a sliver of the work and where error shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dit_accel.generation.offload import by_blocks

KINDS = ("int8", "fp8")
_MULTIPLE = 16  # of what matrix units of eight bits take
_FP8_SINCE = (8, 9)


def check_kind(kind: str | None) -> None:
    """ValueError unless `kind` is None or one of KINDS."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"quantize is {' or '.join(KINDS)}, not {kind!r}")


def check(kind: str, transformer: nn.Module, blocks: list[nn.Module]) -> None:
    """ValueError where these blocks cannot be quantised, with what to do."""
    name = type(transformer).__name__
    if not find_spec("torchao"):
        raise ValueError('quantize needs torchao: pip install "dit-accel[quantize]"')
    if kind == "fp8" and not _has_fp8():
        raise ValueError(
            "fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell): take int8"
        )
    if getattr(transformer, "peft_config", None):
        raise ValueError(
            f"{name} has a LoRA beside its weights: fuse it before quantize, pipe.fuse_lora() and "
            "then pipe.unload_lora_weights()"
        )
    if by_blocks(transformer):
        raise ValueError(
            f"the blocks of {name} are offloaded, and weights in eight bits would not be what is "
            "kept of them: take --offload without blocks, or leave quantize out"
        )
    found = [layer for block in blocks for layer in _layers(block).values()]
    if any(layer.weight.is_meta for layer in found):
        raise ValueError(
            f"the weights of {name} are offloaded one by one: take model offload, "
            "pipe.enable_model_cpu_offload(), or none"
        )
    if any(type(layer.weight) is not nn.Parameter for layer in found):
        raise ValueError(f"{name} is quantised already: leave quantize out")
    if not found:
        raise ValueError(
            f"{name} has no linear layers of whole {_MULTIPLE} columns: leave quantize out"
        )


@contextmanager
def quantized(kind: str, blocks: list[nn.Module]) -> Iterator[None]:
    """The blocks' linear layers in eight bits for the length of a block.

    The weights that were wait in host memory and are put back as they were, the same objects with
    the same bits; what a fused LoRA was is not known any more, as ever.
    """
    from torchao.quantization import quantize_

    found = [(layer, layer.weight) for block in blocks for layer in _layers(block).values()]
    try:
        for layer, _ in found:
            quantize_(layer, _config(kind), filter_fn=lambda module, name: True)
        for _, weight in found:
            weight.data = weight.data.to("cpu")
        yield
    finally:
        for layer, weight in found:
            weight.data = weight.data.to(layer.weight.device)
            layer.weight = weight


def _layers(block: nn.Module) -> dict[str, nn.Linear]:
    """Name → the linear layers of a block that see a row for each token."""
    return {
        name: module
        for name, module in block.named_modules()
        if type(module) is nn.Linear
        and "norm" not in name
        and module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
    }


def _config(kind: str) -> Any:
    from torchao import quantization

    if kind == "int8":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    rows = quantization.PerRow()
    return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=rows)


def _has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FP8_SINCE
