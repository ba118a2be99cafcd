"""How a pipeline calls its transformer: recorded from the pipeline itself, so no model is special.

One forward of the stock pipeline is stopped at the transformer's door; its arguments are the text
embeddings and whatever else the model wants beside noisy latents and a time.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request, of_any_prompt
from dit_accel.pipelines.denoisers import call as call_pipeline
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


_OURS = ("hidden_states", "timestep", "return_dict")


@dataclass(frozen=True)
class Conditions:
    """Arguments of a transformer forward beside the latents and the time.

    tensors: by argument name, those with a batch dimension of 1 and those without.
    static: JSON values by argument name.
    shape: of the latents.
    sigmas: noise levels of the pipeline's steps, falling to 0.
    time_scale: what the model is told for noise level 1.
    """

    tensors: dict[str, Tensor]
    static: dict[str, Any]
    shape: tuple[int, ...]
    sigmas: list[float]
    time_scale: float


class _Stop(Exception):
    """Ends the pipeline's call at the transformer."""


def record(pipe: DiffusionPipeline, defaults: Defaults, prompt: str) -> Conditions:
    """The arguments of the first transformer forward that a prompt leads to, with no guidance.

    Raises ValueError, in one sentence, for a pipeline that cannot be fine-tuned this way.
    """
    transformer = _transformer(pipe)
    signature = inspect.signature(type(transformer).forward)
    seen: dict[str, Any] = {}

    def before(
        module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        seen.update(signature.bind_partial(module, *args, **kwargs).arguments)
        raise _Stop

    # Request refuses the empty prompt, which is a usual negative one
    call = of_any_prompt(pipe, defaults, Request("any")) | {"prompt": prompt}
    distilled = getattr(transformer.config, "guidance_embeds", False)
    if "guidance_scale" in inspect.signature(type(pipe).__call__).parameters and not distilled:
        call["guidance_scale"] = 1.0
    hook = transformer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        call_pipeline(pipe, **call, output_type="latent")
    except _Stop:
        pass
    finally:
        hook.remove()
    return _read(pipe, transformer, seen)


def _transformer(pipe: DiffusionPipeline) -> torch.nn.Module:
    found = transformers_of(pipe)
    if len(found) > 1:
        raise ValueError(f"{type(pipe).__name__} has two transformers: fine-tune takes one")
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no transformer to fine-tune")
    scheduler = pipe.scheduler
    flow = "FlowMatch" in type(scheduler).__name__
    if not flow and scheduler.config.get("prediction_type") != "flow_prediction":
        raise ValueError(
            f"fine-tuning is for flow-matching models, and {type(scheduler).__name__} "
            "is no flow-matching scheduler"
        )
    return found[0]


def _read(
    pipe: DiffusionPipeline, transformer: torch.nn.Module, seen: dict[str, Any]
) -> Conditions:
    kind = type(transformer).__name__
    sigmas = [float(x) for x in pipe.scheduler.sigmas]
    if sigmas[-1] != 0:
        sigmas.append(0.0)
    times = seen["timestep"]
    if times.ndim > 1:
        raise ValueError(f"{kind} is told one time per token here: this is not supported")
    scale = float(times.flatten()[0]) / sigmas[0]
    if scale <= 0:
        raise ValueError(f"{kind} counts time from data to noise: this is not supported")
    if seen["hidden_states"].shape[0] != 1:
        raise ValueError(f"{kind} runs prompt and negative prompt in one call: not supported")
    tensors, static = {}, {}
    for name, value in seen.items():
        if name in (*_OURS, "self") or value is None or value == {}:
            continue
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous()
            continue
        try:
            static[name] = json.loads(json.dumps(value))
        except TypeError:
            raise ValueError(
                f"{kind} takes a {type(value).__name__} as {name}: this cannot be stored"
            ) from None
    return Conditions(tensors, static, tuple(seen["hidden_states"].shape), sigmas, scale)


def batched(value: Tensor) -> bool:
    """Whether a recorded tensor has a batch dimension (position tables have none)."""
    return value.ndim > 0 and value.shape[0] == 1
