"""Dense attention by a backend of one's choice, or by the fastest exact one at hand.

A backend is one of diffusers' ("native", "_native_cudnn", "_flash_3", …), "flash_4", which is the
package flash-attn-4 itself, or "kernel": our own block-sparse kernel with every block kept.
Tensors are [B, N, H, D], as diffusers has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.machine import Stopwatch, is_out_of_memory
from dit_accel.ops.operators import block_sparse_attention
from dit_accel.table import BlockTable, block_count

AUTO = "auto"
# Exact ones for each kind of device, the fastest on an H200 first, which is what is taken where
# nothing can be measured: FlashAttention-4 671, our kernel 579, cuDNN 572 TFLOP/s of
# [1, 40, 75600, 128] (bfloat16, torch 2.11).
EXACT = {
    "cuda": (
        *("flash_4", "flash_4_hub", "_flash_3", "_flash_3_hub", "kernel"),
        *("_native_cudnn", "flash", "flash_hub", "native"),
    )
}
_ROUNDS = 3
_LONG = 8192

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


@dataclass
class Choice:
    """Which backend computes dense attention of one kind of call.

    backend: its name; "" is the pipeline's own. kind: the call, in words. ms: milliseconds of
    those that were timed. refused: of the others, why not. calls: how many it has served.
    """

    backend: str
    kind: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    calls: int = 0


_MEASURED: dict[tuple[object, ...], Choice] = {}  # once in a process, as a compiled kernel is


def check(name: str) -> str:
    """The full name of a backend, or "auto"; ValueError for an unknown or a missing one."""
    known = ("kernel", "flash_4", *_of_diffusers())
    found = next((x for x in (name, f"_{name}") if x in known), None)
    if name == AUTO:
        return name
    if found is None:
        raise ValueError(
            f"there is no dense backend {name!r}: take auto, or one of {', '.join(known)}"
        )
    why = missing(found)
    if why:
        raise ValueError(
            f"the dense backend {name!r} is not at hand: {why}; auto takes the fastest that is"
        )
    return found


def missing(name: str) -> str:
    """What a known backend lacks on this machine, in a line, or ""."""
    if name == "kernel":
        return ""
    if name == "flash_4":
        found = find_spec("flash_attn") and find_spec("flash_attn.cute")
        return "" if found else "pip install flash-attn-4"
    from diffusers.models import attention_dispatch as diffusers

    try:
        diffusers._check_attention_backend_requirements(diffusers.AttentionBackendName(name))
    except RuntimeError as error:
        return str(error).splitlines()[0].rstrip(".")
    return ""


def at_hand(device: torch.device) -> list[str]:
    """The exact backends that a device can use without a download, the best guess first."""
    names = EXACT.get(device.type, ("native",))
    return [name for name in names if not missing(name) and _is_here(name)]


class Backends:
    """The dense attention of one accelerated pipeline. choices: of each kind of call, as it came.

    name: a backend, or "auto". ValueError as `check`.
    """

    def __init__(self, name: str) -> None:
        self.name = check(name)
        self.choices: dict[tuple[object, ...], Choice] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, own: Run
    ) -> Tensor:
        """q, k, v, result [B, N, H, D]; own: the pipeline's own attention, which serves what needs
        gradients and, where the backend takes no mask, what has one.

        RuntimeError where the backend of one's choice cannot serve the call.
        """
        key = _key(q, k, mask)
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if trained:
            key = (*key, "gradients")
        choice = self.choices.get(key)
        if choice is None:
            choice = self.choices[key] = self._choose(key, q, k, v, mask, trained)
        choice.calls += 1
        return (run(choice.backend) if choice.backend else own)(q, k, v, mask, scale)

    def _choose(
        self,
        key: tuple[object, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        trained: bool,
    ) -> Choice:
        kind = f"[{', '.join(map(str, q.shape))}] × {k.shape[1]} {str(q.dtype)[6:]} on {q.device}"
        kind += " with a mask" * (mask is not None) + " with gradients" * trained
        if trained:
            return Choice("", kind)
        if self.name != AUTO:
            return _named(self.name, kind, q, k, v, mask)
        if key not in _MEASURED:
            _MEASURED[key] = fastest(at_hand(q.device), q, k, v, mask)
        found = _MEASURED[key]
        return Choice(found.backend, kind, found.ms, found.refused)


def _key(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[object, ...]:
    """A kind of call: lengths within some 6 % are one, or pruning would measure at every step."""
    lengths = (n >> max(0, n.bit_length() - 5) for n in (q.shape[1], k.shape[1]))
    sizes = (n.bit_length() for n in (q.shape[1], k.shape[1]))
    rest = (q.shape[0], q.shape[2], q.shape[3], q.dtype, q.device, mask is not None)
    return (*lengths, *sizes, *rest)


def _named(name: str, kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Choice:
    """The backend that was asked for, seen to serve such a call."""
    try:
        run(name)(q, k, v, mask, None)
    except Exception as error:  # each package has its own
        if is_out_of_memory(error):
            raise
        if mask is not None:
            return Choice("", kind, refused={name: _line(error)})
        raise RuntimeError(
            f"the dense backend {name} cannot serve {kind}: {_line(error)}; take dense='auto' "
            "or another one"
        ) from error
    return Choice(name, kind)


@torch.no_grad()
def fastest(
    names: list[str], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Choice:
    """The fastest of the backends by a short measurement on these tensors, of those that agree
    with PyTorch's own attention within rounding; the first one where none can be measured."""
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if len(names) == 1 or capturing:
        return Choice(names[0], refused={} if len(names) == 1 else {"": "a CUDA graph is captured"})
    exact = run("native")(q, k, v, mask, None)
    ms: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in names:
        attend = partial(run(name), q, k, v, mask, None)
        try:
            error = _difference(attend(), exact)
            if error > _allowed(q.dtype):
                refused[name] = f"it differs from PyTorch's by {error:.1e}"
            else:
                ms[name] = _milliseconds(attend, q.device)
        except Exception as error_:  # each package has its own; the next one is tried
            refused[name] = _line(error_)
    if not ms:
        return Choice("", refused=refused)
    return Choice(min(ms, key=ms.__getitem__), ms=ms, refused=refused)


def _difference(out: Tensor, exact: Tensor) -> float:
    return ((out.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30)).item()


def _allowed(dtype: torch.dtype) -> float:
    """Relative RMS difference of two exact results: each is rounded, and sums in another order."""
    return max(torch.finfo(dtype).eps, 1e-5)


def _milliseconds(attend: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(_ROUNDS):
        watch = Stopwatch(device)
        attend()
        watch.stop()
        times.append(1e3 * watch.stopped())
    return min(times)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@lru_cache
def _of_diffusers() -> tuple[str, ...]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return tuple(backend.value for backend in AttentionBackendName)


def _is_here(name: str) -> bool:
    """Is a kernel of the Hub on this disk, or is the backend none of these?"""
    from diffusers.models import attention_dispatch as diffusers
    from huggingface_hub.constants import HF_HUB_CACHE

    if not name.endswith("_hub"):
        return True
    kernel = diffusers._HUB_KERNELS_REGISTRY[diffusers.AttentionBackendName(name)]
    folder = kernel.repo_id.replace("/", "--")
    return kernel.kernel_fn is not None or any(Path(HF_HUB_CACHE).glob(f"*--{folder}"))


@lru_cache
def run(name: str) -> Run:
    """The function of a backend that is at hand; one of the Hub is fetched."""
    if name == "kernel":
        return _every_block
    if name == "flash_4":
        return _flash_4()
    from diffusers.models import attention_dispatch as diffusers

    backend = diffusers.AttentionBackendName(name)
    diffusers._maybe_download_kernel_for_backend(backend)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        return diffusers.dispatch_attention_fn(
            q, k, v, attn_mask=mask, scale=scale, backend=backend
        )

    return attend


def _flash_4() -> Run:
    # of flash-attn-4 4.0.0b36
    flash_attn_func = import_module("flash_attn.cute").flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if mask is not None:
            raise ValueError("flash-attn-4 takes no mask")
        out = flash_attn_func(q, k, v, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _every_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    if mask is not None:
        raise ValueError("our kernel takes no mask")
    block = 128 if q.shape[1] >= _LONG else 64
    rows, blocks = block_count(q.shape[1], block), block_count(k.shape[1], block)
    shape = (q.shape[0], q.shape[2], rows)
    every = torch.arange(blocks, dtype=torch.int32, device=q.device).expand(*shape, blocks)
    counts = torch.full((1,), blocks, dtype=torch.int32, device=q.device).expand(shape)
    table = BlockTable(every, counts, block, block, q.shape[1], k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return block_sparse_attention(q, k, v, table, scale=scale).transpose(1, 2)
