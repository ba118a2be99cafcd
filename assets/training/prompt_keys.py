"""The stock pipeline's 512 text positions, computed with a few: exact, and much faster to train.

`WanPipeline` hands over the n embeddings of the prompt and 512 - n zero vectors, unmasked.
All zero vectors have one key k0 and one value v0, so in the softmax they add
(512 - n)·exp(q·k0), which is one key with log(512 - n) added to its logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional

POSITIONS = 512


@dataclass
class PromptBias:
    """The logit bias [B, 1, 1, L] of the batch in hand, shared by every cross-attention."""

    value: Tensor | None = None


def pack(embeddings: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Zero everything behind each prompt's end and make the last position the zero vector.

    embeddings: [B, L, C] with every length < L; lengths: [B] int. Returns the embeddings and the
    bias [B, 1, 1, L]: 0 for a word, -inf for the padding, log(512 - n) for the last position.
    """
    if int(embeddings.shape[1]) >= POSITIONS:
        raise ValueError(f"Expected fewer than {POSITIONS} positions, got {embeddings.shape[1]}.")
    place = torch.arange(embeddings.shape[1], device=embeddings.device)
    word = place < lengths[:, None]
    packed = torch.where(word[..., None], embeddings, 0.0)
    bias = torch.where(word, 0.0, -math.inf)
    bias[:, -1] = torch.log(POSITIONS - lengths.float())
    return packed, bias[:, None, None]


class PromptKeysProcessor:
    """Cross-attention of a Wan block over packed prompts."""

    def __init__(self, bias: PromptBias) -> None:
        self.bias = bias

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        split = (attn.heads, -1)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, split).transpose(1, 2)
        k = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, split).transpose(1, 2)
        v = attn.to_v(encoder_hidden_states).unflatten(2, split).transpose(1, 2)
        bias = self.bias.value.to(q.dtype).expand(-1, -1, q.shape[2], -1)
        out = functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), bias)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).type_as(hidden_states))


def install(transformer: WanTransformer3DModel) -> PromptBias:
    """Make every cross-attention read packed prompts; returns the bias holder."""
    bias = PromptBias()
    for block in transformer.blocks:
        block.attn2.processor = PromptKeysProcessor(bias)
    return bias
