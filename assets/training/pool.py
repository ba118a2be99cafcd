"""Scenes on one canvas, encoded on the device and renewed while training goes on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import scene_set
import torch
import whole_clip
from compose import Composer, latent_cover
from diffusers import AutoencoderKLWan
from layout import arrange
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dit_accel.inputs.scene import split

TEXT_POSITIONS = 32


@dataclass(frozen=True)
class Canvas:
    """One size of clip: how many scenes a step takes, and which share of the steps."""

    side: int
    frames: int
    batch: int
    share: float
    encode: int = 8

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, rows and columns of its latents."""
        return 1 + (self.frames - 1) // 4, self.side // 8, self.side // 8


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids [P, 32] and lengths [P]; ValueError for an unknown word or more than 31 words."""
    vocabulary = tokenizer.get_vocab()
    ids = torch.zeros(len(prompts), TEXT_POSITIONS, dtype=torch.long)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens = [vocabulary.get(word, -1) for word in split(prompt)]
        if len(tokens) >= TEXT_POSITIONS or -1 in tokens:
            raise ValueError(f"Expected at most 31 words of the vocabulary, got {prompt!r}.")
        ids[row, : len(tokens)] = torch.tensor(tokens)
        lengths[row] = len(tokens)
    return ids, lengths


class Pool:
    """latents: [P, Z, t, h, w] normalised; cover: [P, t, h, w], how much of a latent is objects."""

    def __init__(
        self,
        canvas: Canvas,
        size: int,
        composer: Composer,
        vae: AutoencoderKLWan,
        tokenizer: PreTrainedTokenizerBase,
        act: whole_clip.Activation,
        seed: int,
    ) -> None:
        device = composer.clips.rgba.device
        self.canvas, self.composer, self.vae, self.act = canvas, composer, vae, act
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (size, *canvas.latent)
        self.latents = torch.empty(
            size, vae.config.z_dim, *canvas.latent, dtype=self.dtype, device=device
        )
        self.cover = torch.empty(shape, dtype=self.dtype, device=device)
        self.ids = torch.zeros(size, TEXT_POSITIONS, dtype=torch.long, device=device)
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.filled = self.next = 0
        self.owed = 0.0
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    @torch.no_grad()
    def renew(self, count: int) -> None:
        """Encode `count` new scenes over the oldest ones."""
        device = self.latents.device
        scenes = [scene_set.draw(self.rng, self.canvas.side) for _ in range(count)]
        drawn = []
        for scene in scenes:
            layout = arrange(scene, self.canvas.side, self.canvas.frames, self.rng)
            drawn.append(self.composer.draw(scene, layout, self.canvas.side, self.canvas.frames))
        video = torch.stack([v for v, _ in drawn])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            moments = whole_clip.encode(self.vae, video, self.act).float()
        latents = (moments.chunk(2, dim=1)[0] - self.mean) / self.std
        prompts = [s.text(articles=self.rng.random() < 0.5) for s in scenes]
        ids, lengths = tokenize(self.tokenizer, prompts)
        rows = [(self.next + n) % len(self.latents) for n in range(count)]
        rows_on = torch.tensor(rows, device=device)
        self.latents[rows_on] = latents.to(self.dtype)
        self.cover[rows_on] = torch.stack([latent_cover(c) for _, c in drawn]).to(self.dtype)
        self.ids[rows_on], self.lengths[rows_on] = ids.to(device), lengths.to(device)
        self.next = (self.next + count) % len(self.latents)
        self.filled = min(len(self.latents), self.filled + count)

    def owe(self, scenes: float) -> None:
        """Renew this many scenes, as soon as they make an encoder's batch."""
        self.owed += scenes
        if self.owed >= self.canvas.encode:
            self.owed -= self.canvas.encode
            self.renew(self.canvas.encode)

    def draw(self, count: int, frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, cover, ids and lengths of random scenes, cut to their first latent frames."""
        rows = torch.randint(self.filled, (count,), device=self.latents.device)
        latents, cover = self.latents[rows, :, :frames].float(), self.cover[rows, :frames].float()
        return latents, cover, self.ids[rows], self.lengths[rows]
