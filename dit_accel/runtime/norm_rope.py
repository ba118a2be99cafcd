"""Wan's self-attention with the norm and rotary embedding of q and k as one operator.

Stock, these are some thirty passes over the tokens and a tenth of a sparse step that is not
compiled: see kernels/norm_rope. What cannot take the operator runs diffusers' own code.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit_accel import ops
from dit_accel.pipelines.base import StandIn


def with_norm_rope(
    self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
):
    """The processor's `__call__`; NotImplemented where its own is to run."""
    x, plain = hidden_states, encoder_hidden_states is None and isinstance(rotary_emb, tuple)
    if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    norm_q, norm_k = attn.norm_q, attn.norm_k
    if not (_is_plain(norm_q, x) and _is_plain(norm_k, x) and norm_q.eps == norm_k.eps):
        return NotImplemented
    if attn.fused_projections:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    cos, sin = rotary_emb
    norms = norm_q.weight, norm_k.weight, norm_q.eps
    q, k = ops.norm_rope(q, k, cos, sin, attn.heads, *norms)
    out = dispatch_attention_fn(
        q,
        k,
        v.unflatten(2, (attn.heads, -1)),
        attn_mask=attention_mask,
        backend=self._attention_backend,
        parallel_config=self._parallel_config,
    )
    out = out.flatten(2, 3).to(q.dtype)
    for layer in attn.to_out:
        out = layer(out)
    return out


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    """Is this torch's RMS norm with a weight like x, and nothing hung on it?"""
    if type(norm) is not nn.RMSNorm or norm.weight is None or norm.eps is None:
        return False
    hooked = "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks
    return not hooked and (norm.weight.dtype, norm.weight.device) == (x.dtype, x.device)


NORM_ROPE = StandIn(
    with_norm_rope,
    """
    Tensor _attention_backend _get_added_kv_projections _get_qkv_projections _parallel_config
    add_k_proj dispatch_attention_fn empty_like flatten heads norm_added_k norm_k norm_q shape
    to_out torch type_as unbind unflatten
    """,
)
