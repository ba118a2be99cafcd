"""Scenes on one canvas, encoded on the device and renewed while training goes on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import scene_set
import torch
import whole_clip
import words
from compose import LENGTH, Composer, latent_cover, owners
from diffusers import AutoencoderKLWan
from layout import arrange
from scene_flow import Batch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from words import TEXT_POSITIONS, tokenize

from dit_accel.inputs.scene import Scene


@dataclass(frozen=True)
class Canvas:
    """One size of clip: how many scenes a step takes, and which share of the steps.

    One frame is the first of a clip of 33: an image, of which a step takes in many more.
    """

    side: int
    frames: int
    batch: int
    share: float

    @property
    def encode(self) -> int:
        """Scenes that the autoencoder takes at once."""
        return 64 if self.frames == 1 else 8

    @property
    def length(self) -> int:
        """Frames of the clip whose first ones these are."""
        return LENGTH if self.frames == 1 else self.frames

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, rows and columns of its latents."""
        return 1 + (self.frames - 1) // 4, self.side // 8, self.side // 8


class Pool:
    """latents: [P, Z, t, h, w] normalised; cover: [P, t, h, w], how much of a latent is objects;
    owner: [P, t, h/2, w/2], the number of the emoji at a token, from 1, or 0; places: [P, 32, 3],
    of words.places."""

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
        self.owner = torch.zeros(
            size, shape[1], shape[2] // 2, shape[3] // 2, dtype=torch.uint8, device=device
        )
        self.ids = torch.zeros(size, TEXT_POSITIONS, dtype=torch.long, device=device)
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.places = torch.zeros(size, TEXT_POSITIONS, 3, device=device)
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
        scenes = [
            scene_set.draw(self.rng, self.canvas.side, counts=scene_set.MANY) for _ in range(count)
        ]
        prompts = [s.text(articles=self.rng.random() < 0.5) for s in scenes]
        layouts = [arrange(s, self.canvas.side, self.canvas.length, self.rng) for s in scenes]
        places = [words.places(*row) for row in zip(scenes, layouts, prompts, strict=True)]
        video, cover = self.composer.draw(scenes, layouts, self.canvas.side, self.canvas.frames)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            moments = whole_clip.encode(self.vae, video, self.act).float()
        latents = (moments.chunk(2, dim=1)[0] - self.mean) / self.std
        ids, lengths = tokenize(self.tokenizer, prompts)
        rows = [(self.next + n) % len(self.latents) for n in range(count)]
        rows_on = torch.tensor(rows, device=device)
        self.latents[rows_on] = latents.to(self.dtype)
        cover = latent_cover(cover)
        self.cover[rows_on] = cover.amax(1).to(self.dtype)
        self.owner[rows_on] = owners(cover, self._classes(scenes, cover.shape[1]))
        self.ids[rows_on], self.lengths[rows_on] = ids.to(device), lengths.to(device)
        self.places[rows_on] = torch.stack(places).to(device)
        self.next = (self.next + count) % len(self.latents)
        self.filled = min(len(self.latents), self.filled + count)

    def owe(self, scenes: float) -> None:
        """Renew this many scenes, as soon as they make an encoder's batch."""
        self.owed += scenes
        if self.owed >= self.canvas.encode:
            self.owed -= self.canvas.encode
            self.renew(self.canvas.encode)

    def _classes(self, scenes: list[Scene], most: int) -> Tensor:
        """[B, O]: the number of each object's emoji, from 1; 0 where a scene has fewer."""
        names = [[1 + scene_set.EMOJI.index(t.name) for t in s.objects] for s in scenes]
        rows = [row + [0] * (most - len(row)) for row in names]
        return torch.tensor(rows, device=self.latents.device)

    def draw(self, count: int, frames: int) -> Batch:
        """Random scenes, cut to their first frames."""
        rows = torch.randint(self.filled, (count,), device=self.latents.device)
        return Batch(
            self.latents[rows, :, :frames].float(), self.cover[rows, :frames].float(),
            self.owner[rows, :frames].long(), self.ids[rows], self.lengths[rows],
            self.places[rows],
        )  # fmt: skip
