"""RMS norm and rotary embedding on CUDA, in Triton: q and k are read from memory once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch, capability_of, find, padded, run, too_old


@triton.jit
def _normed_and_turned(
    x, weight, out, b_cos, b_sin, m_n, eps,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """x, out: pointers to the channels of rows [ROWS, 1, 1] of H · D; HEADS of P ≥ D at a time."""
    o_h = tl.arange(0, HEADS)[None, :, None]
    o_d = tl.arange(0, P)[None, None, :]
    b_r = tl.full(m_n.shape, 1.0, tl.float32)
    if weight is not None:
        b_s = tl.zeros([m_n.shape[0], HEADS, P], tl.float32)
        for i in range(0, H, HEADS):
            m_x = m_n & (i + o_h < H) & (o_d < D)
            b_x = tl.load(x + (i + o_h) * D + o_d, mask=m_x, other=0.0).to(tl.float32)
            b_s += b_x * b_x
        b_s = tl.sum(tl.sum(b_s, 2), 1)[:, None, None]
        b_r = 1.0 / tl.sqrt_rn(b_s / (H * D) + eps)
    for i in range(0, H, HEADS):
        o_x = (i + o_h) * D + o_d
        m_x = m_n & (i + o_h < H) & (o_d < D)
        b_y = tl.load(x + o_x, mask=m_x, other=0.0)
        if weight is not None:
            # for each row, in the layout of x: the cache is faster than shared memory in between
            p_w = weight + tl.broadcast_to(o_x, m_x.shape)
            b_w = tl.load(p_w, mask=m_x, other=0.0).to(tl.float32)
            b_y = (b_y.to(tl.float32) * b_r * b_w).to(x.dtype.element_ty)
        b_y = tl.reshape(b_y.to(tl.float32), (m_n.shape[0], HEADS, P // 2, 2))
        b_0, b_1 = tl.split(b_y)
        b_y = tl.join(b_0 * b_cos - b_1 * b_sin, b_0 * b_sin + b_1 * b_cos)
        b_y = tl.reshape(b_y, (m_n.shape[0], HEADS, P)).to(out.dtype.element_ty)
        tl.store(out + o_x, b_y, mask=m_x)


@triton.jit(do_not_specialize=["n"])
def _norm_rope_fwd_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, s_q, s_k, s_c, s_s, n, eps,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    m_n = o_n < n
    o_p = tl.arange(0, P // 2)[None, None, :]
    m_p = m_n & (2 * o_p < D)
    b_cos = tl.load(cos + i_b * s_c[0] + o_n * s_c[1] + 2 * o_p * s_c[2], mask=m_p, other=0.0)
    b_sin = tl.load(sin + i_b * s_s[0] + o_n * s_s[1] + (2 * o_p + 1) * s_s[2], mask=m_p, other=0.0)
    b_cos, b_sin = b_cos.to(tl.float32), b_sin.to(tl.float32)
    o_out = (i_b * n + o_n) * (H * D)
    p_q, p_k = q + i_b * s_q[0] + o_n * s_q[1], k + i_b * s_k[0] + o_n * s_k[1]
    _normed_and_turned(p_q, q_weight, q_out + o_out, b_cos, b_sin, m_n, eps, H, D, HEADS, P)
    _normed_and_turned(p_k, k_weight, k_out + o_out, b_cos, b_sin, m_n, eps, H, D, HEADS, P)


def supports(q: Tensor, heads: int) -> str | None:
    """Why no kernel serves q [B, N, H · D], or None."""
    if old := too_old(q):
        return old
    if max(heads, q.shape[2] // heads) > 128:
        return f"it has up to 128 heads of 128 channels, not {heads} of {q.shape[2] // heads}"
    return None


def norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.norm_rope; launch None is the table's row."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    shape = (*q.shape[:2], heads, q.shape[2] // heads)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    other = torch.empty_like(out)
    launch = launch or find("norm_rope", capability_of(q), shape[3], heads)
    asked = arguments(q, k, cos, sin, out, other, (q_weight, k_weight), eps, launch)
    run(_norm_rope_fwd_kernel, (triton.cdiv(q.shape[1], asked["ROWS"]), q.shape[0]), asked, launch)
    return out, other


def arguments(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    launch: Launch,
) -> dict[str, object]:
    """Of the kernel. A step takes 16 · launch.tile channels: all heads of some tokens, or where
    they are more, some heads of one."""
    _, n, heads, head_dim = q_out.shape
    width, step = padded(head_dim), 16 * launch.tile
    some = min(padded(heads), step // width)
    return {
        "q": q, "k": k, "q_weight": weights[0], "k_weight": weights[1], "cos": cos, "sin": sin,
        "q_out": q_out, "k_out": k_out, "s_q": q.stride()[:2], "s_k": k.stride()[:2],
        "s_c": _steps(cos), "s_s": _steps(sin), "n": n, "eps": eps, "H": heads, "D": head_dim,
        "ROWS": step // (some * width), "HEADS": some, "P": width,
    }  # fmt: skip


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and channel of cosines or sines [1 or B, N, 1, D]."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(3))
