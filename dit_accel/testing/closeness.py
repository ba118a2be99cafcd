"""The one comparison of the tests and benchmarks: an error is judged by that of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The next wider arithmetic, in which the reference counts as exact.
WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def references(fn: Callable, q: Tensor, *args: Any, **options: Any) -> tuple[Any, Any]:
    """fn(q, …) of a reference.py in the next wider arithmetic, and in that of q.dtype."""
    wide = fn(q, *args, dtype=WIDER[q.dtype], **options)
    return wide, fn(q, *args, dtype=q.dtype, **options)


def assert_close(
    name: str, out: Tensor, ref: Tensor, same_dtype: Tensor, *, rtol: float = 2.0
) -> None:
    """Largest error of `out` ≤ rtol · largest error of the same reference in out's dtype + 4 ulp.

    Args:
        name: what is compared, for the message.
        out: the result under test.
        ref: the reference in wider arithmetic (see `references`).
        same_dtype: the reference computed in the arithmetic of out.dtype.

    An ulp is eps(out.dtype) times the largest value of ref. Equal infinities agree; a NaN never
    does. Raises AssertionError naming the error, the bound, the RMS ratio and the worst places.
    """
    if out.shape != ref.shape:
        raise AssertionError(f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    error, allowed = _error(out, ref), _error(same_dtype, ref)
    finite = ref.double()[ref.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    bound = rtol * allowed.max().item() + 4 * torch.finfo(out.dtype).eps * size
    if error.numel() == 0 or (error <= bound).all():
        return
    bad = (~(error <= bound)).nonzero()
    rms = error.square().mean().sqrt() / finite.square().mean().sqrt().clamp(min=1e-30)
    raise AssertionError(
        f"{name}: largest error {error.max().item():.3g} > {bound:.3g} (the reference in "
        f"{same_dtype.dtype} errs by {allowed.max().item():.3g}), RMS ratio {rms.item():.3g}, "
        f"{len(bad)} of {error.numel()} wrong, first at {bad[:5].tolist()}"
    )


def _error(out: Tensor, ref: Tensor) -> Tensor:
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    return (out - ref).abs().masked_fill(out == ref, 0)
