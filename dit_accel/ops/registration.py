"""The operators as torch.library sees them: tensors and numbers in, tensors out.

dit_accel.ops checks the arguments and calls these; torch.compile keeps each as one node. A kv_len
is two arguments here, `length` (a tensor [B]) or `limit` (an int), at most one of them given.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.ops import dispatch
from dit_accel.table import (
    BlockBits,
    BlockMeans,
    BlockTable,
)


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides of torch.empty_like(like), as the fake functions promise."""
    wanted = torch.empty_like(like)
    return x if x.stride() == wanted.stride() else wanted.copy_(x)


def _gradient_op(name: str) -> torch.library.CustomOpDef:
    """The op that gives dq, dk, dv from kernels/<name>'s `backward`."""

    @torch.library.custom_op(f"dit_accel::{name}_backward", mutates_args=())
    def op(
        grad_out: Tensor,
        grad_lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        indices: Tensor,
        counts: Tensor,
        block_q: int,
        block_k: int,
        scale: float,
        length: Tensor | None,
        limit: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        table = BlockTable(indices, counts, block_q, block_k, q.shape[2], k.shape[2])
        kv_len = limit if length is None else length
        fn = dispatch.select(f"{name}.backward", q, block_q=block_q, block_k=block_k).fn
        dq, dk, dv = fn(grad_out, grad_lse, q, k, v, out, lse, table, scale, kv_len)
        return _laid_out_as(q, dq), _laid_out_as(k, dk), _laid_out_as(v, dv)

    @op.register_fake
    def _(
        grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
    ) -> tuple[Tensor, ...]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    return op


def _attention_op(name: str) -> torch.library.CustomOpDef:
    """The op (q, k, v, table, scale, kv_len) → (out, LSE) of kernels/<name>."""

    @torch.library.custom_op(f"dit_accel::{name}", mutates_args=())
    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        counts: Tensor,
        block_q: int,
        block_k: int,
        scale: float,
        length: Tensor | None,
        limit: int | None,
        uneven: bool = False,
    ) -> tuple[Tensor, Tensor]:
        sizes = (block_q, block_k, q.shape[2], k.shape[2])
        table = BlockTable(indices, counts, *sizes, uneven=uneven)
        kv_len = limit if length is None else length
        fn = dispatch.select(name, q, block_q=block_q, block_k=block_k).fn
        out, lse = fn(q, k, v, table, scale, return_lse=True, kv_len=kv_len)
        return _laid_out_as(q, out), lse

    @op.register_fake
    def _(q: Tensor, *rest: object) -> tuple[Tensor, ...]:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    return op


def _with_gradient(op: torch.library.CustomOpDef, name: str) -> torch.library.CustomOpDef:
    """The op (q, k, v, indices, counts, …, block_q, block_k, scale, kv_len) → (out, LSE) of
    kernels/<name>, differentiable."""
    gradient = _gradient_op(name)

    def keep(ctx, inputs, output):
        *tensors, ctx.block_q, ctx.block_k, ctx.scale, length, ctx.limit, _ = inputs
        ctx.save_for_backward(*tensors[:5], length, *output)
        ctx.inputs = len(inputs)

    def backward(ctx, grad_out, grad_lse):
        q, k, v, indices, counts, length, out, lse = ctx.saved_tensors
        numbers = (ctx.block_q, ctx.block_k, ctx.scale, length, ctx.limit)
        grads = gradient(grad_out, grad_lse, q, k, v, out, lse, indices, counts, *numbers)
        return *grads, *[None] * (ctx.inputs - 3)

    op.register_autograd(backward, setup_context=keep)
    return op


block_sparse_attention = _with_gradient(
    _attention_op("block_sparse_attention"), "block_sparse_attention"
)
int8_attention = _attention_op("int8_attention")


@torch.library.custom_op("dit_accel::pooled_attention", mutates_args=())
def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    k_mean: Tensor | None,
    words: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    length: Tensor | None,
    limit: int | None,
    uneven: bool = False,
) -> tuple[Tensor, Tensor]:
    kv_len = limit if length is None else length
    bits = None if words is None else BlockBits(words, kv_len)
    table = BlockTable(indices, counts, block_q, block_k, q.shape[2], k.shape[2], bits, uneven)
    fn = dispatch.select("pooled_attention", q, block_q=block_q, block_k=block_k).fn
    out, lse = fn(q, k, v, table, scale, return_lse=True, kv_len=kv_len, k_mean=k_mean)
    return _laid_out_as(q, out), lse


@pooled_attention.register_fake
def _(q: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


_with_gradient(pooled_attention, "pooled_attention")


@torch.library.custom_op("dit_accel::rectified_attention", mutates_args=())
def rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    means: list[Tensor],
    words: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    gapr: bool,
    length: Tensor | None,
    limit: int | None,
    uneven: bool = False,
) -> Tensor:
    kv_len = limit if length is None else length
    bits = None if words is None else BlockBits(words, kv_len)
    table = BlockTable(indices, counts, block_q, block_k, q.shape[2], k.shape[2], bits, uneven)
    fn = dispatch.select("rectified_attention", q, block_q=block_q, block_k=block_k).fn
    known = replace(BlockMeans(*means), kv_len=kv_len) if means else None
    return _laid_out_as(q, fn(q, k, v, table, scale, gapr=gapr, kv_len=kv_len, means=known))


@rectified_attention.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("dit_accel::window_attention", mutates_args=())
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    length: Tensor | None,
    limit: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = BlockTable(indices, counts, block_q, block_k, q.shape[2], k.shape[2])
    kv_len = limit if length is None else length
    fn = dispatch.select("window_attention", q, block_q=block_q, block_k=block_k).fn
    full, window, lse, window_lse = fn(q, k, v, table, scale, kv_len=kv_len)
    return _laid_out_as(q, full), _laid_out_as(q, window), lse, window_lse


@window_attention.register_fake
def _(q: Tensor, *rest: object) -> tuple[Tensor, ...]:
    outs = (torch.empty_like(q) for _ in range(2))
    return *outs, *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("dit_accel::sparse_linear_attention", mutates_args=())
def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    weight: Tensor,
    bias: Tensor | None,
    feature_map: str,
    scale: float,
    length: Tensor | None,
    limit: int | None,
    uneven: bool = False,
) -> Tensor:
    chosen = dispatch.select("sparse_linear_attention", q, block_q=block_q, block_k=block_k)
    sizes = (block_q, block_k, q.shape[2], k.shape[2])
    table = BlockTable(indices, counts, *sizes, uneven=uneven)
    kv_len = limit if length is None else length
    options = (weight, bias, feature_map, None, scale, kv_len)
    return _laid_out_as(q, chosen.fn(q, k, v, table, *options))


@sparse_linear_attention.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


_BRANCH = "sparse_linear_attention.linear_branch"


def _excluded(
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    block_q: int,
    block_k: int,
) -> BlockTable | None:
    """The table of the blocks that the linear branch leaves out, if there is one."""
    if indices is None or counts is None:
        return None
    return BlockTable(indices, counts, block_q, block_k, q.shape[2], k.shape[2])


def _branch_op(name: str, in_place: bool) -> torch.library.CustomOpDef:
    """The op that adds the linear branch to `base`: in it, or as a tensor of its own."""

    def op(
        base: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor | None,
        counts: Tensor | None,
        block_q: int,
        block_k: int,
        weight: Tensor,
        bias: Tensor | None,
        feature_map: str,
        length: Tensor | None,
        limit: int | None,
    ) -> Tensor | None:
        excluded = _excluded(q, k, indices, counts, block_q, block_k)
        chosen = dispatch.select(_BRANCH, q, block_q=block_q, block_k=block_k)
        options = (weight, bias, feature_map, limit if length is None else length)
        into = base if in_place else None
        out = chosen.fn(base, q, k, v, excluded, *options, into=into)
        return None if in_place else _laid_out_as(q, out)

    op.__annotations__["return"] = None if in_place else Tensor  # the op's schema is read from it
    mutates = {"base"} if in_place else ()
    made = torch.library.custom_op(f"dit_accel::{name}", op, mutates_args=mutates)
    made.register_fake(lambda base, q, *rest: None if in_place else torch.empty_like(q))
    return made


linear_branch = _branch_op("linear_branch", in_place=False)
add_linear_branch = _branch_op("add_linear_branch", in_place=True)


@torch.library.custom_op("dit_accel::linear_branch_backward", mutates_args=())
def linear_branch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    block_q: int,
    block_k: int,
    weight: Tensor,
    feature_map: str,
    length: Tensor | None,
    limit: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    excluded = _excluded(q, k, indices, counts, block_q, block_k)
    chosen = dispatch.select(f"{_BRANCH}_backward", q, block_q=block_q, block_k=block_k)
    kv_len = limit if length is None else length
    dq, dk, dv, dw = chosen.fn(grad, q, k, v, excluded, weight, feature_map, kv_len)
    return (
        _laid_out_as(q, dq), _laid_out_as(k, dk), _laid_out_as(v, dv), _laid_out_as(weight, dw),
    )  # fmt: skip


@linear_branch_backward.register_fake
def _(grad, q, k, v, indices, counts, block_q, block_k, weight, *rest):
    return tuple(torch.empty_like(x) for x in (q, k, v, weight))


def _keep_for_branch(ctx, inputs, output):
    _, q, k, v, indices, counts, block_q, block_k, weight, bias, feature_map, length, limit = inputs
    ctx.save_for_backward(q, k, v, indices, counts, weight, length)
    ctx.numbers = (block_q, block_k)
    ctx.feature_map, ctx.limit = feature_map, limit
    ctx.bias_dtype = None if bias is None else bias.dtype


def _branch_backward(ctx, grad):
    q, k, v, indices, counts, weight, length = ctx.saved_tensors
    dq, dk, dv, dw = linear_branch_backward(
        grad, q, k, v, indices, counts, *ctx.numbers, weight, ctx.feature_map, length, ctx.limit
    )
    bias = None
    if ctx.bias_dtype is not None:
        bias = grad.sum((0, 1, 2), dtype=torch.float32).to(ctx.bias_dtype)
    return grad, dq, dk, dv, None, None, None, None, dw, bias, None, None, None


linear_branch.register_autograd(_branch_backward, setup_context=_keep_for_branch)
