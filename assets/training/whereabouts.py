"""Where a token stands, taught to the first blocks: absolute places out of relative positions.

Rotary positions are relative, so in pure noise nothing tells a token where on the canvas it is but
this: an average over all tokens on one side of it is the smaller, the more of them there are. "On
the left" and the order of a ramp's colours need it. A linear head on what a block puts out learns
row, column and frame along with the model, and is thrown away with this file's part of the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEARNING_RATE = 2e-3


class Whereabouts(nn.Module):
    """Heads on blocks of a Wan transformer; make it after the blocks were compiled."""

    def __init__(self, transformer: nn.Module, patch: int = 2) -> None:
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        count = len(transformer.blocks)
        after = sorted({count // 5, 2 * count // 5})  # blocks whose output is read
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 3))
            for _ in after
        )
        self.patch, self.read = patch, []
        for number in after:
            self._tap(transformer.blocks[number])

    def _tap(self, block: nn.Module) -> None:
        """Keep what the block puts out, outside of its compiled graph."""
        inner = block._compiled_call_impl or block._call_impl

        def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
            out = inner(*args, **kwargs)
            if torch.is_grad_enabled():
                self.read.append(out)
            return out

        block._compiled_call_impl = call

    def loss(self, latents: Tensor) -> Tensor:
        """Squared error of (frame, row, column), each in [-1, 1], since the last call, [heads, 3].

        latents: [B, Z, t, h, w] of the forward between; 1/3 is what knowing nothing gives.
        """
        t, h, w = latents.shape[2], latents.shape[3] // self.patch, latents.shape[4] // self.patch
        ends = [torch.linspace(-1, 1, n, device=latents.device) if n > 1
                else torch.zeros(1, device=latents.device) for n in (t, h, w)]  # fmt: skip
        grid = torch.stack(torch.meshgrid(*ends, indexing="ij"), -1).flatten(0, 2)
        read, self.read = self.read, []
        errors = [(head(x).float() - grid).square().mean((0, 1))
                  for head, x in zip(self.heads, read, strict=True)]  # fmt: skip
        return torch.stack(errors)
