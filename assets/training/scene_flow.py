"""Transformer and text encoder that learn scenes: their loss, guidance distilled, and a sampler."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import prompt_keys
import torch
from diffusers import WanPipeline
from models import build_scheduler, build_word_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from dit_accel.inputs.scene import Vocabulary

SHIFT = 3.0
LAYOUT = 0.85  # noise level above which words decide, and data teach
OBJECTS = 3.0  # how much more an object's latents weigh than the backdrop's
DROPPED = 0.1


def noise_levels(count: int, device: torch.device, near: float = 0.5) -> Tensor:
    """[B] in [0, 1]: logit-normal with the scheduler's time shift, but this share of them above
    0.85 and densest at 1.

    What stands where, and which way a ramp runs, is seen in the noisy latents at all but the
    highest levels: only there must the words tell it.
    """
    uniform = torch.randn(count, device=device).sigmoid()
    usual = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    high = 1 - (1 - LAYOUT) * torch.rand(count, device=device).square()
    return torch.where(torch.rand(count, device=device) < near, high, usual)


def with_vocabulary(
    encoder: UMT5EncoderModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase
) -> UMT5EncoderModel:
    """The same encoder with the words of `new`; a word that `old` lacks starts at random."""
    config = UMT5Config.from_dict(encoder.config.to_dict() | {"vocab_size": len(new)})
    made = UMT5EncoderModel(config)
    state = {
        k: v for k, v in encoder.state_dict().items() if "embed" not in k and "shared" not in k
    }
    made.load_state_dict(state, strict=False)
    rows, known = encoder.shared.weight.data, old.get_vocab()
    made.shared.weight.data.normal_(0, float(rows.std()))
    for word, row in new.get_vocab().items():
        if word in known:
            made.shared.weight.data[row] = rows[known[word]]
    return made


@dataclass(frozen=True)
class Batch:
    """Scenes: latents [B, Z, t, h, w] and cover [B, t, h, w] float32; owner [B, t, h/2, w/2] and
    ids [B, 32] int64; lengths [B]; places [B, 32, 3] (pool.py)."""

    latents: Tensor
    cover: Tensor
    owner: Tensor
    ids: Tensor
    lengths: Tensor
    places: Tensor


class Flow:
    """The trained parts; every cross-attention reads packed prompts (prompt_keys)."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module) -> None:
        self.transformer, self.text_encoder = transformer, text_encoder
        self.bias = prompt_keys.install(transformer)
        self.parts = {"transformer": transformer, "text_encoder": text_encoder}
        self.hidden = self.lengths = torch.empty(0)  # of the last prompts: [B, L, C] and [B]
        self.level = torch.empty(0)  # of noise, in the last loss: [B]

    @classmethod
    def of(cls, folder: Path, vocabulary: Vocabulary) -> tuple[Flow, WanPipeline]:
        """From a pipeline folder, with this vocabulary; also the pipeline, in float32."""
        pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        tokenizer = build_word_tokenizer(vocabulary.words())
        encoder = with_vocabulary(pipe.text_encoder.float(), pipe.tokenizer, tokenizer)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
        return cls(pipe.transformer, encoder), pipe

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters, named `part.name`, each once."""
        return [(f"{k}.{n}", p) for k, m in self.parts.items() for n, p in m.named_parameters()]

    def frozen(self) -> Flow:
        """A copy that is not trained: the teacher of a distillation."""
        parts = [copy.deepcopy(m).requires_grad_(False).eval() for m in self.parts.values()]
        return Flow(*parts)

    def velocity(self, x: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """x: [B, Z, t, h, w], sigma: [B] in [0, 1], ids: [B, L], lengths: [B], 0 for no prompt."""
        place = torch.arange(ids.shape[1], device=ids.device)
        mask = (place < lengths[:, None]).long()
        hidden = self.text_encoder(ids, mask).last_hidden_state
        self.hidden, self.lengths = hidden, lengths
        packed, self.bias.value = prompt_keys.pack(hidden, lengths)
        return self.transformer(x, sigma * 1000, packed, return_dict=False)[0]

    def guided(
        self, x: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor, guidance: float
    ) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598); one forward where it is 1."""
        asked = self.velocity(x, sigma, ids, lengths).float()
        if guidance == 1:
            return asked
        free = self.velocity(x, sigma, ids, torch.zeros_like(lengths)).float()
        return free + guidance * (asked - free)

    def loss(
        self, batch: Batch, teacher: Flow | None = None, guidance: float = 1.0, near: float = 0.5
    ) -> Tensor:
        """Weighted squared error of the velocity, 10 % of the prompts dropped.

        The target is noise - latents; with a teacher its guided velocity (arXiv 2210.03142) below
        the level LAYOUT, since guidance harms above it (arXiv 2404.07724).
        """
        latents, ids = batch.latents, batch.ids
        dropped = torch.rand(len(ids), device=ids.device) < DROPPED
        lengths = torch.where(dropped, 0, batch.lengths)
        sigma = self.level = noise_levels(len(ids), ids.device, near)
        noise = torch.randn_like(latents)
        level = sigma.view(-1, 1, 1, 1, 1)
        mixed, target = (1 - level) * latents + level * noise, noise - latents
        if teacher is not None:
            with torch.no_grad():
                taught = teacher.guided(mixed, sigma, ids, lengths, guidance)
            target = torch.where(level < LAYOUT, taught, target)
        error = (self.velocity(mixed, sigma, ids, lengths).float() - target).square().mean(1)
        weight = 1 + (OBJECTS - 1) * batch.cover
        return (error * weight).sum() / weight.sum()

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        ids: Tensor,
        lengths: Tensor,
        guidance: float,
        steps: int = 20,
        shift: float = SHIFT,
    ) -> Tensor:
        """Latents by Euler steps at the stock scheduler's noise levels, guided below LAYOUT."""
        scheduler = build_scheduler(shift)
        scheduler.set_timesteps(steps)
        sigmas, x = scheduler.sigmas.tolist(), noise
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            level = torch.full((len(x),), now, device=x.device)
            scale = guidance if now < LAYOUT else 1.0
            x = x + (then - now) * self.guided(x, level, ids, lengths, scale)
        return x
