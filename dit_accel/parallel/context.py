"""How diffusers has a sequence shared: by which processes, and which tokens each of them holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dit_accel.parallel.launcher import KV
from dit_accel.pipelines.base import Geometry

if TYPE_CHECKING:
    import torch.distributed as dist
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig


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
    """Whether each process keeps its queries, and keys travel."""
    return (context_of(config).ring_degree or 1) > 1


def ring_group(config: ParallelConfig) -> dist.ProcessGroup:
    """The processes among which keys travel."""
    mesh = context_of(config)._ring_mesh
    assert mesh is not None, "diffusers has set it up"
    return mesh.get_group()


def group_of(config: ParallelConfig) -> dist.ProcessGroup:
    """All processes that share the sequence."""
    mesh = context_of(config)._flattened_mesh
    assert mesh is not None, "diffusers has set it up"
    return mesh.get_group()


def kv_of(config: ParallelConfig) -> str:
    """How keys travel in a ring: "gather" (all to everyone at once) or "ring" (in turn)."""
    return getattr(context_of(config), "kv", KV[0])


def obstacle(config: ParallelConfig, mask: Tensor | None) -> str:
    """Why an attention call cannot be sparse under this ParallelConfig, or ""."""
    context = context_of(config)
    if is_ring(config) and (context.ulysses_degree or 1) > 1:
        return "ring_degree and ulysses_degree are both above 1: set one of them"
    if mask is not None and (mask.ndim != 4 or mask.shape[2] > 1):
        return "the attention mask of a shared sequence is more than key padding"
    return ""


class Split(NamedTuple):
    """A sequence over `ranks` processes, of which the first hold one token more where it does not
    divide. Text and visual tokens are split apart, unless they come as one row."""

    n_text: int
    n_visual: int
    text_first: bool
    one_row: bool
    ranks: int

    @classmethod
    def of(cls, geometry: Geometry, n: int, ranks: int) -> Split:
        """That of n tokens, those of all processes together."""
        n_text = n - geometry.n_visual
        return cls(n_text, geometry.n_visual, geometry.text_first, geometry.one_row, ranks)

    @property
    def n(self) -> int:
        return self.n_text + self.n_visual

    @property
    def visual(self) -> int:
        """Where the visual tokens begin on one device."""
        return self.n_text if self.text_first else 0

    def held(self) -> list[Tensor]:
        """int64 on the CPU: for each process the places on one device of the tokens it holds, in
        the order in which it holds them."""
        if self.one_row or not self.n_text:
            return list(torch.arange(self.n, device="cpu").tensor_split(self.ranks))
        parts = [torch.arange(n, device="cpu") for n in (self.n_text, self.n_visual)]
        shift = (0, self.n_text) if self.text_first else (self.n_visual, 0)
        whole = (at + part for at, part in zip(shift, parts, strict=True))
        text, visual = (part.tensor_split(self.ranks) for part in whole)
        first, second = (text, visual) if self.text_first else (visual, text)
        return [torch.cat(pair) for pair in zip(first, second, strict=True)]
