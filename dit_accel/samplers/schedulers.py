"""A Sampler's grid in the form that diffusers' pipelines run."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput as Output,
)
from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3Scheduler
from diffusers.utils.torch_utils import randn_tensor

from dit_accel.samplers.grids import MOST, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class GridScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow matching (x = (1 − σ)·clip + σ·noise, v = noise − clip) over a sampler's grid.

    Args:
        sampler: in words, as `Sampler.named` reads it.

    `pipe.scheduler = GridScheduler("dmd")` is all it takes where the grid starts at σ = 1;
    `install` also scales the first noise to another start and draws noise from the pipeline's
    generator.
    """

    @register_to_config
    def __init__(self, sampler: str = "flow", num_train_timesteps: int = MOST) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps)
        self.sampler = Sampler.named(sampler)
        self.generator: torch.Generator | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> GridScheduler:
        """A copy draws on from the same generator: pipelines copy it for each frame."""
        new = memo[id(self)] = object.__new__(type(self))
        memo[id(self.generator)] = self.generator
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    @property
    def init_noise_sigma(self) -> float:
        """The first noise level: what the pipeline's noise is multiplied by."""
        return float(self.sigmas[0])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """The grid of this many steps; of a pipeline's own levels only the number is heard.

        Raises ValueError for a number of steps that the sampler does not have.
        """
        given = timesteps if sigmas is None else sigmas
        steps = num_inference_steps or (self.sampler.steps if given is None else len(given))
        levels = torch.tensor(self.sampler.sigmas(steps), dtype=torch.float32, device=device)
        self.num_inference_steps = steps
        self.timesteps = levels * self.config["num_train_timesteps"]
        self.sigmas = torch.cat([levels, levels.new_zeros(1)])
        self._step_index = self._begin_index = None

    def step(
        self,
        model_output: Tensor,
        timestep: torch.FloatTensor | float,
        sample: Tensor,
        *churn: object,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **more: object,
    ) -> Output | tuple[Tensor]:
        """x at the next noise level, in float32 arithmetic and the dtype of `sample`.

        generator: of fresh noise; None takes the pipeline's (see `install`), else torch's own.
        Raises ValueError for a noise level to each token.
        """
        if more.get("per_token_timesteps") is not None:
            raise ValueError(
                "a sampler of few steps has one noise level for all tokens, and this pipeline "
                "gives each its own (per_token_timesteps): leave the sampler out"
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        now, then = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        x, v = sample.float(), model_output.float()
        if self.sampler.renoises:
            x = x - now * v
            if self.step_index + 1 < len(self.timesteps):
                source = self.generator if generator is None else generator
                noise = randn_tensor(x.shape, source, x.device, torch.float32)
                x = (1 - then) * x + then * noise
        else:
            x = x + (then - now) * v
        self._step_index = self.step_index + 1  # type: ignore[assignment] # diffusers: always None
        x = x.to(sample.dtype)
        return Output(prev_sample=x) if return_dict else (x,)


class H3GridScheduler(MiniMaxH3Scheduler):
    """MiniMax H3's scheduler over a sampler's grid: time 1 − σ, Euler steps.

    A pipeline of H3 counts grid points, one more than steps, so that `num_inference_steps=5` makes
    four. sampler: in words; "dmd:999,749,500,250" or "flow". shift: as H3 has it, 12 for the clip
    and 3 for its sound.
    """

    @register_to_config
    def __init__(self, sampler: str = "flow", shift: float = 12.0) -> None:
        super().__init__(shift=shift)
        self.sampler = Sampler.named(sampler)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | Tensor | None = None,
    ) -> None:
        """The grid of num_inference_steps − 1 steps; ValueError where the sampler has no such."""
        if sigmas is None:
            points = num_inference_steps or self.sampler.steps + 1
            sampler = replace(self.sampler, shift=self.shift)
            sigmas = [*sampler.sigmas(points - 1), 0.0]
        super().set_timesteps(None, device, sigmas)
