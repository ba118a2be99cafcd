"""Processes that need not import torch and diffusers anew: forked from one that has done so."""

import multiprocessing
from collections.abc import Callable

from torch.multiprocessing import start_processes

_KNOWN = (
    "dit_accel.batch.worker",
    "dit_accel.parallel.sharing",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.wan.pipeline_wan",
    "torch.distributed.tensor",
    "transformers.models.clip.modeling_clip",
    "transformers.models.umt5.modeling_umt5",
)


def spawn(work: Callable[..., None], arguments: tuple, count: int) -> None:
    """work(rank, *arguments) in `count` processes; raises what one of them raised."""
    multiprocessing.set_forkserver_preload(list(_KNOWN))
    start_processes(work, arguments, count, start_method="forkserver")
