"""Where a token stands and what stands there, taught to the first blocks by heads on them.

Rotary positions are relative, so in pure noise nothing tells a token where on the canvas it is but
this: an average over all tokens on one side of it is the smaller, the more of them there are. "On
the left" and the order of a ramp's colours need it: two heads learn row, column and frame. And the
velocity tells only slowly which of the words a token is to show, since in noise its error hardly
falls by it: two further heads name the emoji that stands there, or the backdrop. All are linear,
learn along with the model, and are thrown away with this file's part of the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LEARNING_RATE = 2e-3
OBJECTS = 3.0  # how much more a token of an object counts in the names


def _head(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, out))


class Whereabouts(nn.Module):
    """Heads on blocks of a Wan transformer; make it after the blocks were compiled.

    classes: how many emoji there are, and one for the backdrop.
    """

    def __init__(self, transformer: nn.Module, classes: int, patch: int = 2) -> None:
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        count = len(transformer.blocks)
        self.placed = sorted({count // 5, 2 * count // 5})  # blocks whose output is read
        self.named = sorted({2 * count // 5, 3 * count // 5})
        self.places = nn.ModuleList(_head(width, 3) for _ in self.placed)
        self.names = nn.ModuleList(_head(width, classes) for _ in self.named)
        self.patch = patch
        self.read: dict[int, Tensor] = {}
        for number in {*self.placed, *self.named}:
            self._tap(transformer.blocks[number], number)

    def _tap(self, block: nn.Module, number: int) -> None:
        """Keep what the block puts out, outside of its compiled graph."""
        inner = block._compiled_call_impl or block._call_impl

        def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
            out = inner(*args, **kwargs)
            if torch.is_grad_enabled():
                self.read[number] = out
            return out

        block._compiled_call_impl = call

    def where(self, latents: Tensor) -> Tensor:
        """Squared error of (frame, row, column), each in [-1, 1], in the last call, [heads, 3].

        latents: [B, Z, t, h, w] of that call; 1/3 is what knowing nothing gives.
        """
        t, h, w = latents.shape[2], latents.shape[3] // self.patch, latents.shape[4] // self.patch
        ends = [torch.linspace(-1, 1, n, device=latents.device) if n > 1
                else torch.zeros(1, device=latents.device) for n in (t, h, w)]  # fmt: skip
        grid = torch.stack(torch.meshgrid(*ends, indexing="ij"), -1).flatten(0, 2)
        errors = [(head(self.read[n]).float() - grid).square().mean((0, 1))
                  for head, n in zip(self.places, self.placed, strict=True)]  # fmt: skip
        return torch.stack(errors)

    def what(self, owner: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of the names in the last call, [heads], and for the last head the share of
        objects' tokens that it names right in each scene, [B] (nan where there are none).

        owner: [B, t, h/2, w/2] int64, of compose.owners; told: [B] bool, which had a prompt.
        """
        wanted = owner.flatten(1)
        thing = wanted > 0
        weight = (1 + (OBJECTS - 1) * thing) * told[:, None]
        losses, right = [], thing
        for head, n in zip(self.names, self.named, strict=True):
            logits = head(self.read[n]).float()
            error = functional.cross_entropy(logits.mT, wanted, reduction="none")
            losses.append((error * weight).sum() / weight.sum().clamp(min=1))
            right = (logits.argmax(-1) == wanted) & thing
        return torch.stack(losses), right.sum(1) / thing.sum(1)
