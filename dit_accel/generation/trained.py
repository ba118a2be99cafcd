"""A public checkpoint in a pipeline, as options, recipes and metadata know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.config import AccelConfig
from dit_accel.inputs.fields import expect


@dataclass(frozen=True)
class Trained:
    """A checkpoint that a pipeline's weights are of.

    Args:
        files: what `load_checkpoint` was given.
        family: what they are.
        sampler: the grid of steps that came with them, in words; None: another one runs.
        config: the acceleration they were trained for; None: dense attention.
    """

    files: tuple[str, ...]
    family: str
    sampler: str | None
    config: AccelConfig | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; learned tensors stay in the files."""
        config = None if self.config is None else self.config.to_dict()
        return {**vars(self), "files": list(self.files), "config": config}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Trained | None:
        """Inverse of `to_dict`; ValueError for what is none."""
        if data is None:
            return None
        expect("checkpoint", data, Mapping)
        expect("the files of the checkpoint", data.get("files"), list[str])
        expect("the family of the checkpoint", data.get("family"), str)
        expect("the sampler of the checkpoint", data.get("sampler"), str | None)
        config = data.get("config")
        return cls(
            tuple(data["files"]),
            data["family"],
            data.get("sampler"),
            None if config is None else AccelConfig.from_dict(config),
        )

    def __str__(self) -> str:
        sampled = f", sampler {self.sampler}" if self.sampler else ""
        return f"{', '.join(self.files)} ({self.family}{sampled})"
