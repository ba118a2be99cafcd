"""Weights on the host, and on the GPU what runs: whole parts of a pipeline, or single blocks.

A window of blocks is TPI-LLM's (arXiv 2410.00531): while one runs, the next one's weights arrive.
It is diffusers' group offload.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.pages import figures
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Asked = bool | str  # True or "model", "blocks", "blocks:4"
_MOST = 1000


@dataclass(frozen=True)
class Offload:
    """What of a pipeline is on the GPU at a time.

    blocks: so many blocks of each transformer, and of the other parts the layer that runs. One is
    followed by the next while it runs; more are waited for, and copied back, which is slow, as
    diffusers prefetches single ones. None: the whole part that runs.
    """

    blocks: int | None = None

    @classmethod
    def named(cls, asked: Asked) -> Offload | None:
        """Of what an option says; None for False. ValueError for another word."""
        if isinstance(asked, bool):
            return cls() if asked else None
        word, colon, number = asked.partition(":")
        if asked == "model":
            return cls()
        if word == "blocks" and not colon:
            return cls(1)
        known = word == "blocks" and number.isascii() and number.isdecimal()
        if not known or not 1 <= int(number) <= _MOST:
            raise ValueError(
                f"offload is model, blocks, or so many blocks as in blocks:4, not {asked!r}"
            )
        return cls(int(number))

    def check(self, device: torch.device) -> None:
        """ValueError where there is no other memory than the host's."""
        if device.type == "cpu":
            raise ValueError(
                "offload moves parts of a model on and off a GPU: it needs --device cuda"
            )

    def switch_on(self, pipe: DiffusionPipeline, device: torch.device) -> None:
        """Keep the weights of a pipeline that is in host memory there, as long as it is used.

        Raises ValueError for a transformer whose blocks diffusers does not move.
        """
        if self.blocks is None:
            pipe.enable_model_cpu_offload(device=device)
            return
        from dit_accel.generation.arrival import watch

        own: list[Any] = transformers_of(pipe)
        for part in own:
            if not _moved(part):
                raise ValueError(
                    f"diffusers does not move the blocks of {type(part).__name__}: take --offload"
                )
        for part in own:
            watch(part)
            part.enable_group_offload(
                onload_device=device,
                offload_type="block_level",
                num_blocks_per_group=self.blocks,
                use_stream=device.type == "cuda" and self.blocks == 1,
            )
        for part in dict.fromkeys(pipe.components.values()):
            if isinstance(part, nn.Module) and part not in own:
                _by_layers(part, device)


def _moved(part: nn.Module) -> bool:
    return bool(getattr(part, "_supports_group_offloading", True))


def _by_layers(part: nn.Module, device: torch.device) -> None:
    """Only the layer that runs is on the GPU; all of it where diffusers cannot do that."""
    from diffusers.hooks import apply_group_offloading

    if _moved(part):
        apply_group_offloading(part, device, offload_type="leaf_level")
    else:
        part.to(device)


def by_blocks(transformer: nn.Module) -> bool:
    """Whether the weights of a transformer come to the GPU block by block."""
    from dit_accel.generation.arrival import waits_of

    return waits_of(transformer) is not None


@dataclass(frozen=True)
class Memory:
    """What a run took of the GPU's memory.

    peak_gib: the most that PyTorch had allocated; None on other devices. waiting: share of the
    denoising in which blocks waited for their weights; None where they are not offloaded.
    """

    peak_gib: float | None = None
    waiting: float | None = None

    def __str__(self) -> str:
        return figures.memory(asdict(self))


class Meter:
    """Measures the Memory of a run from when it is made."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        from dit_accel.generation.arrival import waits_of

        self._device: torch.device | None = None
        device = pipe._execution_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._device = device
        self._waits = [w for t in transformers_of(pipe) if (w := waits_of(t)) is not None]
        for waits in self._waits:
            waits.seconds = 0.0

    def read(self, denoise: float) -> Memory:
        """What it was, of a denoising of so many seconds."""
        peak = self._device and torch.cuda.max_memory_allocated(self._device) / 2**30
        waited = sum(waits.seconds for waits in self._waits)
        return Memory(peak or None, waited / denoise if self._waits and denoise > 0 else None)
