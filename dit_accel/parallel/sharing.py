"""Spread the generations of a pipeline over processes: by heads (Ulysses), or by queries."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.parallel import plans
from dit_accel.parallel.launcher import check_kv
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ContextParallelConfig
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def share(
    pipe: DiffusionPipeline,
    degree: int | None = None,
    *,
    kv: str | None = None,
    anything: bool = False,
) -> None:
    """Spread every generation of `pipe` over the processes that a launcher has started.

    Args:
        pipe: a diffusers pipeline, the same in every process, accelerated or not.
        degree: number of processes; None takes all of them.
        kv: None: each process has all tokens of some heads (Ulysses, arXiv 2309.14509). "gather" or
            "ring": each keeps its queries, and keys and values of all come to it, at once or in
            turn (LASP-2, arXiv 2502.07563; Ring Self-Attention, arXiv 2105.13120).
        anything: also where tokens or, without kv, heads do not divide by `degree`.

    Raises RuntimeError outside of `torchrun` or `accelerate launch`, ValueError for another kv and
    a model that cannot be split.
    """
    from diffusers.models._modeling_parallel import ContextParallelConfig

    check_kv(kv)
    world = _join(pipe._execution_device)
    degree = degree or world
    if degree != world:
        raise ValueError(f"degree is the number of processes, {world} here, not {degree}")
    models: list[Any] = transformers_of(pipe)
    for model in models:
        if not plans.plan_of(model):
            raise ValueError(f"there is no plan to split the tokens of {type(model).__name__}")
    for model in models:
        if kv is None:
            config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=anything)
        else:
            config = ContextParallelConfig(ring_degree=degree, ring_anything=anything)
            vars(config)["kv"] = kv
        plans.prepare(model)
        if pipe._execution_device.type == "cpu":
            _share_on_cpu(model, config)
        else:
            model.enable_parallelism(config=config, cp_plan=plans.plan_of(model))


def _join(device: torch.device) -> int:
    """Join the other processes; how many there are."""
    import torch.distributed as dist

    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise RuntimeError(
                "one generation over several devices needs as many processes: "
                "start with `torchrun --nproc-per-node 2 script.py`"
            )
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_world_size()


def _share_on_cpu(model: ModelMixin, context: ContextParallelConfig) -> None:
    """What `enable_parallelism` does; that one counts accelerators and divides by none here."""
    import torch.distributed as dist
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    cpu = torch.device("cpu")
    mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    config = ParallelConfig(context_parallel_config=context)
    config.setup(dist.get_rank(), dist.get_world_size(), cpu, mesh=mesh)
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(model, context, plans.plan_of(model))
