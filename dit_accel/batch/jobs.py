"""What to generate: one Job per clip, checked, with an id made of its content alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dit_accel.batch.model import config_of, listed
from dit_accel.config import DEFAULT, AccelConfig, resolve
from dit_accel.generation.boost import STOCK, Boost, lora_files
from dit_accel.generation.options import How
from dit_accel.generation.request import Request
from dit_accel.inputs.fields import check, shown
from dit_accel.media import names
from dit_accel.media.pictures import read_picture
from dit_accel.pruning.config import resolve as pruning

DENSE, TRAINED = "dense", "trained"
INTEGERS = ("seed", "steps", "height", "width", "frames")
NUMBERS = ("guidance", "step_cache")
_REQUEST = ("prompt", "negative_prompt", "guidance", "sampler", *INTEGERS)


@dataclass(frozen=True)
class Job:
    """One clip; None takes the model's default.

    Args:
        prompt, negative_prompt, seed, steps, height, width, frames, guidance: as in Request.
        sampler: a grid of few steps ("dmd", "flow:5"), see `samplers.Sampler`; None is the model's.
        image: path of the picture that image-to-video starts from.
        method: "dense", a method, "method:preset" or a preset file (.json); with a checkpoint also
            "trained", which is then the default.
        checkpoint: trained weights over the model's, the same in all jobs of a batch; " + " stands
            between the files of two experts.
        prune: share of the tokens that run in most steps, or a preset of token pruning.
        step_cache: threshold of a step cache, see `dit_accel.step_cached`.
        speed: a profile, "conservative", "balanced" or "fast": the method and the step cache that
            it stands for take its place; a step_cache beside it replaces the profile's.
        lora: folder or file of the LoRA that fine-tuning wrote beside SLA's weights.
        quantize: "int8" or "fp8", the blocks' linear layers in eight bits.
        name: of the file to write, without folder and suffix; None makes one from the content.

    Raises ValueError, in one sentence, for a value that no pipeline could take, an unknown method,
    a picture that cannot be read and a LoRA that is not there.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    image: str | None = None
    method: str | None = None
    checkpoint: str | None = None
    prune: float | str | None = None
    step_cache: float | None = None
    speed: str | None = None
    lora: str | None = None
    quantize: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check(self)
        self._unfold()
        if self.method is None:
            usual = DEFAULT if self.checkpoint is None else TRAINED
            object.__setattr__(self, "method", usual)
        if self.name is not None:
            object.__setattr__(self, "name", names.check_name(self.name))
        self.request(load=False)
        _ = self.config, self.boost
        if self.image is not None:
            _digest(self.image)
        if self.lora is not None:
            _bytes_of(self.lora)

    def _unfold(self) -> None:
        """What the profile stands for, in its place."""
        how = How(method=self.method, step_cache=self.step_cache, speed=self.speed).at_speed()
        for key in ("method", "step_cache", "speed"):
            object.__setattr__(self, key, getattr(how, key))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """A job from a mapping; ValueError names an unknown or a missing key."""
        check_keys(values)
        if "prompt" not in values:
            raise ValueError("there is no prompt")
        return cls(**values)

    def to_dict(self) -> dict[str, object]:
        """The keys that are set; `from_dict` reads them back."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @property
    def config(self) -> AccelConfig | None:
        """The method's configuration; None leaves the pipeline as it is."""
        return _configuration(self.method or DEFAULT, self.prune, self.checkpoint)

    @property
    def boost(self) -> Boost:
        """What runs beside the method."""
        return Boost(step_cache=self.step_cache, lora=self.lora, quantize=self.quantize)

    @property
    def accelerated(self) -> bool:
        """Is anything of it not the stock pipeline's?"""
        return self.config is not None or self.boost != STOCK

    @cached_property
    def id(self) -> str:
        """16 hex digits over everything that decides the pixels, the bytes of the picture, of the
        LoRA and of what the method has learned included."""
        later = ("sampler", "checkpoint", "step_cache", "speed", "lora", "quantize")
        newer = [key for key in later if getattr(self, key) is None]
        apart = ("name", "prune", *newer)
        content = {k: v for k, v in asdict(self).items() if k not in apart}
        content["method"] = self.config.to_dict() if self.config else DENSE
        content["guidance"] = None if self.guidance is None else float(self.guidance)
        content["image"] = _digest(self.image) if self.image else None
        if self.lora is not None:
            content["lora"] = _bytes_of(self.lora)
        if self.config is not None and (read := self.config.method.files):
            content["read"] = _joined(tuple(map(_dated, read)))
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def output(self) -> str:
        """File name without suffix (which is known once there is a clip or a picture)."""
        if self.name is not None:
            return self.name
        method = self.method or DEFAULT
        method = Path(method).stem if _is_file(method) else method
        method += "" if self.prune is None else f" prune {self.prune}"
        method += "" if self.step_cache is None else f" cache {self.step_cache:g}"
        method += "" if self.quantize is None else f" {self.quantize}"
        words = [names.from_text(self.prompt, 40) or "clip", names.from_text(method, 60)]
        return "-".join([*words, f"s{self.seed}", self.id[:8]])

    @property
    def shape(self) -> str:
        """Jobs of equal shape can share one call of the pipeline: which takes one picture, and in
        which a step cache would decide for all of them."""
        other = ("guidance", "negative_prompt", "sampler", "method", "prune", "lora", "quantize")
        same = (*INTEGERS[1:], *other)
        alone = self.id if self.image or self.step_cache is not None else ""
        return json.dumps([alone, *(getattr(self, key) for key in same)])

    def request(self, load: bool = True) -> Request:
        """What the pipeline is asked; `load` opens the picture."""
        values = {key: getattr(self, key) for key in _REQUEST}
        return Request(**values, image=read_picture(self.image) if load and self.image else None)


KEYS = tuple(f.name for f in fields(Job))


def check_keys(values: Mapping[str, object]) -> None:
    """ValueError for a key that no job has, with the nearest one that it has."""
    for key in values:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"a job has {', '.join(KEYS)}"
            raise ValueError(f"unknown key {shown(key)}: {hint}")


def _is_file(method: str) -> bool:
    return method.endswith(".json")


def _configuration(
    method: str, prune: float | str | None, checkpoint: str | None
) -> AccelConfig | None:
    if method == TRAINED:
        return _trained(checkpoint, prune)
    if method == DENSE and prune is None:
        return None
    stamp = os.stat(method).st_mtime_ns if _is_file(method) and os.path.isfile(method) else 0
    return _resolved(method, prune, stamp)


def _trained(checkpoint: str | None, prune: float | str | None) -> AccelConfig | None:
    if checkpoint is None:
        raise ValueError(f"method {TRAINED!r} is a checkpoint's, and there is none: name one")
    config = config_of(tuple(listed(checkpoint)))
    if config is None:
        return _configuration(DENSE, prune, None)
    return config if prune is None else resolve(config, prune=pruning(prune))


@lru_cache(maxsize=256)
def _resolved(method: str, prune: float | str | None, stamp: int) -> AccelConfig:
    try:
        return resolve(method, prune=pruning(prune))
    except TypeError as error:
        raise ValueError(str(error)) from None


def _digest(path: str) -> str:
    """sha256 of a picture's bytes, once it has been seen to be a picture."""
    stat = os.stat(path) if os.path.isfile(path) else None
    return _hashed(path, (stat.st_size, stat.st_mtime_ns) if stat else None)


@lru_cache(maxsize=4096)
def _hashed(path: str, stamp: tuple[int, int] | None) -> str:
    read_picture(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _bytes_of(lora: str) -> str:
    """sha256 of a LoRA's files; ValueError where there is none."""
    return _joined(tuple(map(_dated, lora_files(Path(lora)))))


def _dated(file: Path) -> tuple[str, int, int]:
    """A file as it is now; ValueError where there is none."""
    if not file.is_file():
        raise ValueError(
            f"there is no file {file}, which the method reads: it was moved or removed"
        )
    found = file.stat()
    return str(file), found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _joined(stamps: tuple[tuple[str, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for file, _, _ in stamps:
        whole.update(Path(file).read_bytes())
    return whole.hexdigest()
