"""Cached latents and text embeddings: a folder of safetensors shards and an index.

index.json      noise levels, time scale, and for each clip its shard, caption and shape
shard-*.safetensors   "<i>.latents" [1, …], "<i>.cond.<argument>"
negative.safetensors  "cond.<argument>" of the negative prompt
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.record import Conditions, batched
from dit_accel.inputs.data import read_object
from dit_accel.inputs.tensors import Tensors, open_tensors
from dit_accel.media.files import atomic, check_folder, check_own

INDEX, NEGATIVE = "index.json", "negative.safetensors"


@dataclass(frozen=True)
class Batch:
    """latents [B, …] fp32, noise like them, sigma [B] fp32, and the transformer's arguments.

    until [B]: the noise level that one step of a student of few steps goes to; None: the velocity
    at sigma is wanted. negative: `conditions` of the negative prompt, for guidance.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    time: Tensor
    conditions: dict[str, Any]
    until: Tensor | None = None
    negative: dict[str, Any] | None = None

    @property
    def noisy(self) -> Tensor:
        """x_t = (1 − σ) x0 + σ noise."""
        level = self.sigma.view(-1, *[1] * (self.latents.ndim - 1))
        return (1 - level) * self.latents + level * self.noise

    @property
    def velocity(self) -> Tensor:
        """noise − x0."""
        return self.noise - self.latents

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On `device`; floating-point conditions with a batch dimension in `dtype`."""

        def move(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            # position tables keep their precision
            cast = x.is_floating_point() and x.shape[:1] == self.latents.shape[:1]
            return x.to(device, dtype if cast else x.dtype)

        def moved(known: dict[str, Any]) -> dict[str, Any]:
            return {name: move(x) for name, x in known.items()}

        return Batch(
            self.latents.to(device),
            self.noise.to(device),
            self.sigma.to(device),
            self.time.to(device),
            moved(self.conditions),
            None if self.until is None else self.until.to(device),
            None if self.negative is None else moved(self.negative),
        )


class LatentData:
    """Random batches from a prepared folder; a batch is decided by its seed alone.

    Raises ValueError, in one sentence, for a folder that is missing or was made for another model.
    """

    def __init__(self, folder: str | Path, transformer: str) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if self.index["transformer"] != transformer:
            raise ValueError(
                f"{folder} was prepared for {self.index['transformer']}, not {transformer}: "
                "prepare it with this model"
            )
        groups: dict[str, list[int]] = {}
        for number, sample in enumerate(self.index["samples"]):
            alike = json.dumps([sample["shapes"], sample["static"]])
            groups.setdefault(alike, []).append(number)
        self._groups = list(groups.values())
        self._files: dict[str, Any] = {}
        self._open_files = ExitStack()

    def __len__(self) -> int:
        return len(self.index["samples"])

    def draw(
        self, size: int, seed: int, drop_prompt: float, grid: Sequence[float] | None = None
    ) -> Batch:
        """`size` clips of one shape at noise levels between those of the pipeline's own steps.

        grid: levels of few steps, falling to 0: each clip stands at the beginning of one of them.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor([float(len(group)) for group in self._groups])
        group = self._groups[int(torch.multinomial(weights, 1, generator=generator))]
        picked = [group[i] for i in torch.randint(len(group), (size,), generator=generator)]
        dropped = bool(torch.rand((), generator=generator) < drop_prompt)
        share = torch.rand(size, generator=generator)
        sigma, until = self._levels(share), None
        if grid is not None:
            levels = torch.tensor(grid)
            place = (share * (len(grid) - 1)).long().clamp(max=len(grid) - 2)
            sigma, until = levels[place], levels[place + 1]
        latents = torch.cat([self._tensor(n, "latents").float() for n in picked])
        noise = torch.randn(latents.shape, generator=generator)
        rows = [self._conditions(n, dropped) for n in picked]
        static = (self.index["negative"] if dropped else self.index["samples"][picked[0]])["static"]
        time = sigma * self.index["time_scale"]
        negative = None
        if grid is not None:
            negative = {**_stack([self._conditions(0, True)] * size)}
            negative |= self.index["negative"]["static"]
        known = {**_stack(rows), **static}
        return Batch(latents, noise, sigma, time, known, until, negative)

    def _levels(self, share: Tensor) -> Tensor:
        """Noise levels at these shares of the run, piecewise linear in the pipeline's own ones."""
        sigmas = torch.tensor(self.index["sigmas"])
        place = share * (len(sigmas) - 1)
        low = place.floor().long().clamp(max=len(sigmas) - 2)
        return sigmas[low].lerp(sigmas[low + 1], place - low)

    def _conditions(self, number: int, drop: bool) -> dict[str, Tensor]:
        names = self.index["conditions"]
        if drop:
            file = self._open(NEGATIVE)
            return {name: file.get_tensor(f"cond.{name}") for name in names}
        return {name: self._tensor(number, f"cond.{name}") for name in names}

    def _tensor(self, number: int, name: str) -> Tensor:
        sample = self.index["samples"][number]
        return self._open(sample["shard"]).get_tensor(f"{sample['place']}.{name}")

    def _open(self, name: str) -> Tensors:
        if name not in self._files:
            self._files[name] = self._open_files.enter_context(
                open_tensors(self.folder / name, "prepared data")
            )
        return self._files[name]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared folder; ValueError where there is none that can be used."""
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no prepared data: make it with --prepare CLIPS --data {folder}, "
            "or train on the model's own samples with --data self"
        )
    try:
        index = read_object(file)
        if not index["samples"]:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is no index of prepared data: prepare it again") from None
    return index


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One dictionary of batches; tensors without a batch dimension are the same for all."""
    first = rows[0]
    return {n: torch.cat([r[n] for r in rows]) if batched(x) else x for n, x in first.items()}


def save_shard(path: Path, latents: list[Tensor], conditions: list[Conditions], label: str) -> None:
    """Write one shard; `label` says what it was made from."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for place, (x, known) in enumerate(zip(latents, conditions, strict=True)):
        tensors[f"{place}.latents"] = x.detach().float().cpu().contiguous()
        for name, value in known.tensors.items():
            tensors[f"{place}.cond.{name}"] = value.clone()
    static = json.dumps([c.static for c in conditions])
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"label": label, "static": static})


def shard_label(path: Path) -> str | None:
    """What a shard was made from; None when there is none. ValueError for somebody else's file."""
    if not path.is_file():
        return None
    with open_tensors(path, "prepared data") as file:
        label = (file.metadata() or {}).get("label")
    if label is None:
        raise ValueError(f"{path} was not written by this command: choose another folder")
    return label


def check_data(folder: str | Path) -> Path:
    """`folder`, if data can be written there; ValueError where somebody else's file would go.

    A run of ours that was stopped among its shards has left no index, but their labels.
    """
    folder = check_folder(folder)
    begun = shard_label(folder / shard_name(0)) is not None
    if not begun or os.path.lexists(folder / INDEX):
        check_own(folder, INDEX, (NEGATIVE,), mark=b'"sigmas"')
    return folder


def save_index(folder: Path, transformer: str, captions: list[list[str]], base: Conditions) -> None:
    """Write the negative prompt's conditions and the index of all shards, the index last."""
    from safetensors.torch import save_file

    with atomic(folder / NEGATIVE) as temporary:
        save_file({f"cond.{n}": x.clone() for n, x in base.tensors.items()}, temporary)
    samples = []
    for number, texts in enumerate(captions):
        name = shard_name(number)
        with open_tensors(folder / name, "prepared data") as file:
            statics = json.loads((file.metadata() or {})["static"])
            for place, text in enumerate(texts):
                parts = ["latents", *(f"cond.{x}" for x in sorted(base.tensors))]
                shapes = [file.get_slice(f"{place}.{x}").get_shape() for x in parts]
                entry = {"shard": name, "place": place, "caption": text}
                samples.append({**entry, "shapes": shapes, "static": statics[place]})
    index = {
        "transformer": transformer,
        "sigmas": base.sigmas,
        "time_scale": base.time_scale,
        "conditions": sorted(base.tensors),
        "negative": {"static": base.static},
        "samples": samples,
    }
    with atomic(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
