"""What a worker gives up, one thing after another, when memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_accel.generation.offload import Offload

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


OFFLOADING = ("cuda",)  # devices whose memory is not the host's


class Savings:
    """The measures against running out of memory, taken in order and kept to the end.

    Smaller calls, tiled decoding, then (on a GPU) keeping only the running part of the model there,
    then only the running layer. `taken` lists what is in force.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        device: torch.device,
        batch: int = 1,
        offload: bool | str = False,
    ) -> None:
        self.pipe, self.device, self.batch = pipe, device, batch
        self.taken: list[str] = []
        asked = Offload.named(offload)
        self._left = [self._tile]
        if asked is None or asked.blocks is None:  # diffusers does not change from blocks to layers
            self._left += [*([] if asked else [self._offload]), self._offload_layers]

    def more(self) -> str | None:
        """Take the next measure and say which; None when there is none left."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.batch > 1:
            self.batch //= 2
            self.taken = [f"calls of {self.batch} clip(s)"]
            return self.taken[0]
        while self._left:
            said = self._left.pop(0)()
            if said:
                self.taken.append(said)
                return said
        return None

    def _tile(self) -> str | None:
        vae: Any = getattr(self.pipe, "vae", None)
        if not hasattr(vae, "enable_tiling") or getattr(vae, "use_tiling", False):
            return None
        vae.enable_tiling()
        if hasattr(vae, "enable_slicing"):
            vae.enable_slicing()
        return "tiled decoding"

    def _offload(self) -> str | None:
        if self.device.type not in OFFLOADING:
            return None
        self.pipe.enable_model_cpu_offload(device=self.device)
        return "parts of the model kept off the GPU while they do not run"

    def _offload_layers(self) -> str | None:
        if self.device.type not in OFFLOADING:
            return None
        self.pipe.remove_all_hooks()
        self.pipe.to("cpu")
        self.pipe.enable_sequential_cpu_offload(device=self.device)
        return "layers kept off the GPU while they do not run"
