"""One generation over several devices: diffusers' context parallelism, sparse methods included.

Ulysses (arXiv 2309.14509) gives each rank all tokens of some heads, so a method runs there as it
does alone. Joint models concatenate text and picture on each rank before the exchange; the tokens
then come as [text₀, picture₀, text₁, picture₁ …] and are put in order here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors
from dit_accel.pipelines.base import Geometry
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


RING = (
    "ring attention hands over the keys in parts, and blocks are chosen among all of them: "
    "set ulysses_degree instead of ring_degree"
)
Inner = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def config_of(processor: object) -> ParallelConfig | None:
    """The ParallelConfig under which a processor shares its sequence with other ranks, or None."""
    config = getattr(processor, "_parallel_config", None)
    return config if getattr(config, "context_parallel_config", None) is not None else None


def context_of(config: ParallelConfig) -> ContextParallelConfig:
    """How the sequence is shared."""
    context = config.context_parallel_config
    assert context is not None, "see config_of"
    return context


def is_ring(config: ParallelConfig) -> bool:
    """Whether keys go round a ring."""
    return (context_of(config).ring_degree or 1) > 1


def obstacle(config: ParallelConfig, mask: Tensor | None) -> str:
    """Why an attention call cannot be sparse under this ParallelConfig, or ""."""
    if is_ring(config):
        return RING
    if mask is not None and (mask.ndim != 4 or mask.shape[2] > 1):
        return "the attention mask of a shared sequence is more than key padding"
    return ""


def place(config: ParallelConfig) -> tuple[int, int]:
    """(rank, ranks) of this process among those that share a sequence by Ulysses."""
    import torch.distributed as dist

    context = context_of(config)
    return dist.get_rank(context._ulysses_mesh.get_group()), context.ulysses_degree or 1


def gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    config: ParallelConfig,
    geometry: Geometry,
    inner: Inner,
    gate: Tensor | None = None,
) -> Tensor:
    """Run `inner` on all tokens of this rank's heads, in the order of one device.

    q, k, v [B, N_local, H, D] → [B, N_local, H, D]; `inner` gets [B, N, H_local, D], the mask of
    all keys [B, 1, 1, N] and the gate, like q. geometry: of all ranks together.
    """
    ranks = context_of(config).ulysses_degree or 1

    def ordered(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gate: Tensor | None = None
    ) -> Tensor:
        n_text = k.shape[1] - geometry.n_visual
        if geometry.one_row or n_text <= 0 or q.shape[1] != k.shape[1]:
            return inner(q, k, v, mask, gate)
        places = (n_text, geometry.n_visual, geometry.text_first, ranks, q.device)
        there, back = token_places(*places)
        mask = None if mask is None else mask.index_select(-1, there)
        gate = None if gate is None else gate.index_select(1, there)
        q, k, v = (x.index_select(1, there) for x in (q, k, v))
        out = inner(q, k, v, mask, gate)
        return out.index_select(1, back)

    even = not context_of(config).ulysses_anything
    learned = _differentiable(q, k, v)
    if even and q.shape == k.shape == v.shape and not learned:
        return _exchanged(q, k, v, mask, config, ordered, gate)
    if gate is not None and (even or learned):
        raise RuntimeError("a gated method is trained on one device, or data-parallel")
    from diffusers.models import attention_dispatch

    d = q.shape[-1]
    q = q if gate is None else torch.cat([q, gate.to(q.dtype)], -1)  # they travel together

    def forward_op(
        ctx: object,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *rest: object,
        **more: object,
    ) -> Tensor:
        return ordered(q[..., :d], k, v, mask, q[..., d:] if gate is not None else None)

    return attention_dispatch._templated_context_parallel_attention(
        q, k, v, mask, forward_op=forward_op, backward_op=None, _parallel_config=config
    )


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _exchanged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    config: ParallelConfig,
    attend: Inner,
    gate: Tensor | None,
) -> Tensor:
    """Ulysses where tokens and heads divide: exchanges by torch.distributed itself.

    diffusers makes four functional collectives, one after the other, each wrapped in a tensor of
    its own: Python that a step of a small model waits for, and one more copy. Here each of q, k and
    v is copied while the one before is sent.
    """
    import torch.distributed as dist

    context = context_of(config)
    group, ranks = context._ulysses_mesh.get_group(), context.ulysses_degree or 1
    batch, n, heads, d = q.shape

    def start(x: Tensor) -> tuple[Tensor, dist.Work]:
        """[ranks, …] of what goes to each rank → what comes from each, once it is there."""
        x, got = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        return got, dist.all_to_all_single(got, x, group=group, async_op=True)

    parts = (batch, n, ranks, heads // ranks, d)
    sent = (q, k, v) if gate is None else (q, k, v, gate.to(q.dtype))
    begun = [start(x.reshape(parts).permute(2, 1, 0, 3, 4)) for x in sent]
    if mask is not None and mask.shape[-1] == n:
        masks = [torch.empty_like(mask) for _ in range(ranks)]
        dist.all_gather(masks, mask.contiguous(), group=group)
        mask = torch.cat(masks, -1)
    for _, work in begun:
        work.wait()
    # [ranks, n, B, H_local, D] → [B, N, H_local, D] and back
    q, k, v, *rest = (got.flatten(0, 1).transpose(0, 1) for got, _ in begun)
    out = attend(q, k, v, mask, *rest)
    got, work = start(out.transpose(0, 1).unflatten(0, (ranks, n)))
    work.wait()
    return got.permute(2, 1, 0, 3, 4).reshape(batch, n, heads, d)


@cached_tensors(64)
def token_places(
    n_text: int, n_visual: int, text_first: bool, ranks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(there, back), int64 [N], N = n_text + n_visual: ordered = received[there], and back again.

    Each rank brings its share of the text and of the visual tokens; the first ranks bring one more
    where the numbers do not divide.
    """
    parts = [torch.arange(n, device="cpu").tensor_split(ranks) for n in (n_text, n_visual)]
    shift = (0, n_text) if text_first else (n_visual, 0)  # where text and picture begin on one
    whole = [[at + part for part in split] for at, split in zip(shift, parts, strict=True)]
    first, second = whole if text_first else reversed(whole)
    received = [piece for pair in zip(first, second, strict=True) for piece in pair]
    back = torch.cat(received)
    return torch.argsort(back).to(device), back.to(device)


def share(pipe: DiffusionPipeline, degree: int | None = None, *, anything: bool = False) -> None:
    """Spread every generation of `pipe` over the processes that a launcher has started.

    Args:
        pipe: a diffusers pipeline, the same in every process, accelerated or not.
        degree: number of processes; None takes all of them.
        anything: also where tokens or heads do not divide by `degree`.

    Raises RuntimeError outside of `torchrun` or `accelerate launch`, ValueError for a model that
    diffusers cannot split.
    """
    from diffusers.models._modeling_parallel import ContextParallelConfig

    world = _join(pipe._execution_device)
    degree = degree or world
    if degree != world:
        raise ValueError(f"degree is the number of processes, {world} here, not {degree}")
    models: list[Any] = transformers_of(pipe)
    for model in models:
        if not getattr(model, "_cp_plan", None):
            raise ValueError(f"diffusers has no plan to split the tokens of {type(model).__name__}")
    for model in models:
        config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=anything)
        if pipe._execution_device.type == "cpu":
            _share_on_cpu(model, config, degree)
        else:
            model.enable_parallelism(config=config)


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


def _share_on_cpu(model: ModelMixin, context: ContextParallelConfig, degree: int) -> None:
    """What `enable_parallelism` does; that one counts accelerators and divides by none here."""
    import torch.distributed as dist
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    cpu = torch.device("cpu")
    mesh = init_device_mesh("cpu", (1, degree), mesh_dim_names=("ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=context)
    config.setup(dist.get_rank(), degree, cpu, mesh=mesh)
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    assert model._cp_plan is not None, "share has seen to it"
    apply_context_parallel(model, context, model._cp_plan)
