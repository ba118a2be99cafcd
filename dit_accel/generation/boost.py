"""What goes beside sparse attention: compiled blocks, CUDA graphs, linear layers in eight bits, a
step cache, a LoRA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dit_accel.api import check_threshold, graphed, step_cached
from dit_accel.generation import quantize
from dit_accel.generation.quantize import check_kind
from dit_accel.inputs import fields
from dit_accel.inputs.tensors import open_tensors
from dit_accel.machine import is_out_of_memory
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


_HELD = "_dit_accel_boosts"  # where a pipeline keeps what was switched on
_ADAPTER = "dit_accel"  # the LoRA's name in peft


@dataclass(frozen=True)
class Boost:
    """What runs beside the attention method.

    Args:
        compile: torch.compile for the blocks of the transformer, each kind of them once.
        step_cache: threshold of `dit_accel.step_cached`: a step whose first block does what was
            expected of it but for so much (relative) skips the others. None: no cache.
        lora: folder or file of the LoRA that fine-tuning wrote beside SLA's weights.
        quantize: "int8" or "fp8": the blocks' linear layers in eight bits (torchao).
        graphs: replay the transformer's forwards as CUDA graphs, see `dit_accel.graphed`.

    Raises ValueError for a threshold that is not positive, for an unknown number format, and for a
    LoRA with compiled or quantised blocks.
    """

    compile: bool = False
    step_cache: float | None = None
    lora: str | None = None
    quantize: str | None = None
    graphs: bool = False

    def __post_init__(self) -> None:
        fields.check(self)
        if self.step_cache is not None:
            check_threshold(self.step_cache)
        if self.lora is not None and self.compile:
            raise ValueError("a LoRA changes the compiled blocks: fuse it first, pipe.fuse_lora()")
        check_kind(self.quantize)
        if self.lora is not None and self.quantize is not None:
            raise ValueError("a LoRA cannot join weights in eight bits: fuse it, pipe.fuse_lora()")

    def check(self, pipe: DiffusionPipeline) -> None:
        """ValueError where the pipeline cannot have the step cache, take the LoRA, which is tried,
        or be quantised."""
        with self.adapted(pipe):
            pass
        self._check_rest(pipe)

    def _check_rest(self, pipe: DiffusionPipeline) -> None:
        if self.graphs:
            with graphed(pipe):
                pass
        for transformer in transformers_of(pipe) if self.quantize is not None else ():
            quantize.check(str(self.quantize), transformer, _blocks(transformer))
        with self.cached(pipe):
            pass

    def switch_on(self, pipe: DiffusionPipeline) -> ExitStack:
        """All of it, until the returned stack is closed, or as long as the pipeline lives.

        ValueError as `check`."""
        self._check_rest(pipe)
        with ExitStack() as stack:
            stack.enter_context(self.adapted(pipe))
            stack.enter_context(self.quantized(pipe))
            stack.enter_context(self.compiled(pipe))
            stack.enter_context(self.cached(pipe))
            own = stack.pop_all()
        # a block that nobody refers to ends, and what it switched on with it
        vars(pipe).setdefault(_HELD, Held()).append(own)
        own.callback(_let_go, pipe, own)
        return own

    @contextmanager
    def beside(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """All but compiled blocks, for the length of a block."""
        with self.adapted(pipe), self.quantized(pipe), self.cached(pipe):
            yield

    @contextmanager
    def compiled(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """Compiled blocks and CUDA graphs, as they are wanted, for the length of a block."""
        with ExitStack() as stack:
            for transformer in transformers_of(pipe) if self.compile else ():
                stack.enter_context(compiled_blocks(transformer))
            if self.graphs:
                stack.enter_context(graphed(pipe))
            yield

    @contextmanager
    def quantized(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """Linear layers in eight bits, if they are wanted, for the length of a block."""
        with ExitStack() as stack:
            kind = self.quantize
            for transformer in transformers_of(pipe) if kind is not None else ():
                stack.enter_context(quantize.quantized(str(kind), _blocks(transformer)))
            yield

    @contextmanager
    def adapted(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """The LoRA, if there is one, for the length of a block. ValueError for one that does not
        suit; adapters that are loaded inside stay."""
        if self.lora is None:
            yield
            return
        _check_lora(pipe, Path(self.lora))
        try:
            _load_lora(pipe, self.lora)
            yield
        finally:
            _unload_lora(pipe)

    @contextmanager
    def cached(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """The step cache, if it is wanted, for the length of a block."""
        with ExitStack() as stack:
            if self.step_cache is not None:
                try:
                    stack.enter_context(step_cached(pipe, self.step_cache))
                except ValueError as error:
                    raise ValueError(
                        f"{error}; every speed has a step cache, and method shared:balanced goes "
                        "without"
                    ) from None
            yield


class Held(list[ExitStack]):
    """What was switched on in a pipeline; a copy of it holds nothing of that."""

    def __reduce__(self) -> tuple[object, ...]:
        return Held, ()


def _let_go(pipe: DiffusionPipeline, stack: ExitStack) -> None:
    held = vars(pipe)[_HELD]
    held[:] = [other for other in held if other is not stack]
    if not held:
        del vars(pipe)[_HELD]


def lora_files(path: Path) -> list[Path]:
    """The files of a LoRA, which is one or a folder; ValueError where there is none."""
    if not path.exists():
        raise ValueError(f"there is no LoRA at {path}: give the folder that fine-tuning wrote")
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def _check_lora(pipe: DiffusionPipeline, path: Path) -> None:
    """ValueError with the reason why this LoRA cannot be loaded."""
    files = lora_files(path)
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA in diffusers: leave it out")
    if not find_spec("peft"):
        raise ValueError("a LoRA needs peft: pip install peft")
    for file in files if not str(path).endswith(".bin") else ():
        with open_tensors(file, "LoRA"):
            pass
    if any(getattr(t, "peft_config", None) for t in transformers_of(pipe)):
        raise ValueError("the pipeline has a LoRA already: fuse or unload it first")
    if len(transformers_of(pipe)) > 1:
        raise ValueError(
            f"{type(pipe).__name__} has two transformers, and a LoRA is for one: load it by "
            "pipe.load_lora_weights, with load_into_transformer_2=True for the second"
        )


def _load_lora(pipe: DiffusionPipeline, path: str) -> None:
    """ValueError where it does not suit the model, or adapts nothing of it."""
    try:
        pipe.load_lora_weights(path, adapter_name=_ADAPTER)
    except Exception as error:  # peft, diffusers and PyTorch each have their own
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = " ".join(line.strip() for line in lines[:2])
        raise ValueError(f"the LoRA {path} does not suit this model: {why}") from error
    if not any(_ADAPTER in _adapters(part) for part in pipe.components.values()):
        raise ValueError(
            f"the LoRA {path} adapts nothing of {type(pipe).__name__}: the names of its tensors "
            "are another model's or do not begin with 'transformer.'"
        )


def _unload_lora(pipe: DiffusionPipeline) -> None:
    """Ours; others that the user has loaded since stay."""
    if sys.is_finalizing():
        return  # nothing runs any more, and no module can be imported
    found = {name for part in pipe.components.values() for name in _adapters(part)}
    if found - {_ADAPTER}:
        pipe.delete_adapters(_ADAPTER)
    else:
        pipe.unload_lora_weights()


def _adapters(part: object) -> dict[str, object]:
    return getattr(part, "peft_config", None) or {}


@contextmanager
def compiled_blocks(transformer: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Regional compilation (fullgraph) for the length of a block.

    backend: torch.compile's. Of a block that has hooks of diffusers', those of context parallelism,
    it is what they call, for hooks break graphs.
    """
    compiled = partial(torch.compile, fullgraph=True, backend=backend)
    blocks = _blocks(transformer)
    with ExitStack() as undo:
        if not any(block._compiled_call_impl for block in blocks):
            undo.callback(torch._dynamo.reset)  # the user has compiled none of them
        for block in blocks:
            hooks = getattr(getattr(block, "_diffusers_hook", None), "_fn_refs", None)
            if hooks:
                inner = hooks[0]  # the first one attached calls the block itself
                name = "forward" if inner.original_forward is None else "original_forward"
                forward = getattr(inner, name)
                undo.callback(setattr, inner, name, forward)
                setattr(inner, name, compiled(forward))
            else:
                undo.callback(setattr, block, "_compiled_call_impl", block._compiled_call_impl)
                block.compile(fullgraph=True, backend=backend)
        yield


def _blocks(transformer: nn.Module) -> list[nn.Module]:
    """The modules that repeat: those diffusers names, else the longest list of modules."""
    names = getattr(transformer, "_repeated_blocks", None) or ()
    found = [m for m in transformer.modules() if type(m).__name__ in names]
    lists = [list(m) for m in transformer.children() if isinstance(m, nn.ModuleList)]
    return found or max(lists, key=len)


STOCK = Boost()
