"""Watching a model attend: a method that runs dense and shows every call to a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.api import accelerated
from dit_accel.config import AccelConfig
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.generation.run import warm_up
from dit_accel.methods import Call, Method
from dit_accel.methods.dense import Dense
from dit_accel.pipelines.denoisers import transformers_of
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


See = Callable[[Tensor, Tensor, Tensor, Tensor, Call], None]


@dataclass(frozen=True)
class Probe(Dense):
    """Dense attention; `see(q, k, v, out, call)` is called after each call, all [B, H, N, D]."""

    see: See = field(default=lambda q, k, v, out, call: None, compare=False)

    always: ClassVar[bool] = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        out = super().__call__(q, k, v, call)
        call.note(None)
        self.see(q, k, v, out, call)
        return out


def error_of(
    method: Method, name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, call: Call
) -> float:
    """‖O − O_dense‖ / ‖O_dense‖ of a watched call which `method` serves, too, unnoted.

    name: what its state is kept by, beside those of others.
    """
    state = call.state.setdefault(name, {})
    mine = replace(call, state=state, together=state, across={}, note=lambda table: None)
    tried = method(q, k, v, mine).float()
    return float((tried - out.float()).norm() / out.float().norm())


def watching(see: See) -> AccelConfig:
    """The configuration that shows every attention call of every step, whatever its size."""
    return AccelConfig(Probe(see=see), Schedule(warmup=0), min_tokens=0)


def attention_share(pipe: DiffusionPipeline, defaults: Defaults, request: Request) -> float:
    """Share of self-attention (QKᵀ and PV) in the FLOPs of one transformer forward, counted.

    Runs one denoising step. Convolutions and matrix products are counted by PyTorch.
    """
    counter, attended = FlopCounterMode(display=False), [0]
    seen: list[float] = []

    def see(q: Tensor, k: Tensor, v: Tensor, out: Tensor, call: Call) -> None:
        attended[0] += 2 * q[..., 0].numel() * k.shape[2] * (q.shape[3] + v.shape[3])

    def begin(module: torch.nn.Module, inputs: object) -> None:
        if not seen:
            attended[0] = 0
            counter.__enter__()

    def end(module: torch.nn.Module, inputs: object, output: object) -> None:
        if not seen:
            counter.__exit__(None, None, None)
            counts = counter.get_flop_counts()["Global"].items()
            other = sum(n for op, n in counts if "attention" not in str(op))
            seen.append(attended[0] / (attended[0] + other))

    transformer = transformers_of(pipe)[0]
    with accelerated(pipe, watching(see)):
        hooks = (
            transformer.register_forward_pre_hook(begin),
            transformer.register_forward_hook(end),
        )
        try:
            warm_up(pipe, defaults, request)
        finally:
            for hook in hooks:
                hook.remove()
    return seen[0]
