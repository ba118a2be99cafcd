"""Every supported transformer class, tiny and random, with the inputs of one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

TEXT = 20


@dataclass(frozen=True)
class Case:
    """One transformer class: its constructor arguments, the inputs of a forward, what to expect.

    family: the models it stands for. axes: of its latents. grid: tokens (T, H, W); where latents
    are packed ("N") one row is one token, elsewhere a token is 2 × 2 latent pixels of one frame.
    layers: attention modules to be patched. mask: what the calls see. history: tokens in front of
    the latents. ahead: rows of packed latents in front, that stand for text. mixes: blocks in front
    of the first patched one let visual tokens attend. note: what a user of this model should know.
    """

    name: str
    family: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    axes: str
    grid: tuple[int, int, int]
    layers: int = 2
    mask: str = "none"
    history: int = 0
    ahead: int = 0
    mixes: bool = False
    note: str = ""

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():  # zero gates and zero outputs would hide the attention
                torch.nn.init.normal_(parameter, std=0.05)
        return model

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        torch.manual_seed(seed)
        return {**self.inputs(), "return_dict": False}

    def nudged(self, t: int, h: int, w: int, token: int) -> dict[str, Any]:
        """`arguments` with the latents of one token of the first sample changed."""
        arguments = self.arguments()
        latents = arguments["x"][0] if "x" in arguments else arguments["hidden_states"]
        where = {"B": 0, "T": t, "H": 2 * h, "W": 2 * w, "N": self.ahead + token}
        latents[tuple(where.get(axis, slice(None)) for axis in self.axes)] += 1
        return arguments


class Pipe:
    """As much of a pipeline as `accelerate` looks at."""

    def __init__(self, transformer: torch.nn.Module, steps: int = 0) -> None:
        self.transformer = transformer
        clock = SimpleNamespace(step_index=0, begin_index=None, timesteps=torch.arange(steps))
        self.scheduler = clock if steps else None

    def steps(self, arguments: Callable[[], dict[str, Any]]) -> list[torch.Tensor]:
        """The transformer's output at each step of a run."""
        out = []
        for step in range(len(self.scheduler.timesteps)):
            self.scheduler.step_index = step
            out.append(forward(self.transformer, arguments()))
        return out


def forward(model: torch.nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """The main output of one forward."""
    out = model(**arguments)
    while isinstance(out, (tuple, list)):
        out = out[0]
    return out


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def at(*times: float) -> torch.Tensor:
    return torch.tensor(times)


def padding(*lengths: int, of: int = TEXT) -> torch.Tensor:
    """Bool [B, of]: the valid text tokens."""
    return torch.arange(of) < torch.tensor(lengths)[:, None]


def image_ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.view(-1, axes)


Video = partial(Case, axes="BCTHW", grid=(3, 8, 8))
Image = partial(Case, axes="BCHW", grid=(1, 16, 16))
Packed = partial(Case, axes="BNC", grid=(1, 16, 16))


def zoo() -> dict[str, Case]:
    """Class name → case."""
    from zoo_cog import COGS
    from zoo_hunyuan import HUNYUANS
    from zoo_image import IMAGES
    from zoo_packed import PACKS
    from zoo_video import VIDEOS
    from zoo_wan import WANS

    return {case.name: case for case in (*WANS, *HUNYUANS, *COGS, *VIDEOS, *PACKS, *IMAGES)}
