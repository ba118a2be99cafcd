"""What an adapter tells about a model family: which modules attend, how its tokens are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn


class Geometry(NamedTuple):
    """The tokens of one transformer forward.

    grid: (T, H, W) visual tokens. n_text: text tokens in the joint sequence, before the visual
    ones if `text_first`; None: whatever else an attention call brings. fixed_order: why permuted
    tokens cannot pass through the model, or "": then each attention call permutes its own.
    same_mask: all layers get the same key padding, perhaps as a fresh tensor or as the product of
    valid queries and valid keys, so it is read once.
    dense: why this forward must stay dense, or "".
    """

    grid: tuple[int, int, int]
    n_text: int | None = 0
    text_first: bool = False
    fixed_order: str = ""
    same_mask: bool = False
    dense: str = ""

    @property
    def n_visual(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def n_tokens(self) -> int:
        return self.n_visual + (self.n_text or 0)


class Site(NamedTuple):
    """A sub-module whose output holds per-token rows: along `dim`, or flattened from `dim` on
    when `flat` (a patch convolution's [B, C, T, H, W]). `text` rows before them are left alone."""

    module: str
    dim: int
    flat: bool = False
    text: bool = False


class SpanSite(NamedTuple):
    """What token pruning must know of a model's blocks.

    blocks: names of the module lists the forward loops over, one after the other. hidden: the
    blocks' argument with the visual tokens [B, N, C], which a block also returns. rows: per-token
    arguments as (name, dim, rank), or name.0 for the first of a tuple: tensors of that rank are
    gathered along dim; where they have rows for text too, those stay. probes: sub-modules of a
    block whose input and output its transition is measured by. text: the argument with the text
    tokens [B, T, C], returned beside the visual ones; "": blocks return the visual tokens alone.
    visual: where they stand in that pair. leave: the projection whose output is the model's.
    refuses: (transformer, forward arguments by name) → why this forward cannot be pruned, or "".
    """

    blocks: tuple[str, ...]
    hidden: str
    rows: tuple[tuple[str, int, int], ...] = ()
    probes: tuple[str, ...] = ()
    text: str = ""
    visual: int = 0
    leave: str = "proj_out"
    refuses: Callable[[nn.Module, dict[str, Any]], str] | None = None

    def lists(self, transformer: nn.Module) -> list[nn.ModuleList]:
        """The module lists themselves."""
        return [transformer.get_submodule(name) for name in self.blocks]

    def split(self, out: Any) -> tuple[Tensor, Tensor | None]:
        """(visual, text) tokens of what a block returned."""
        return (out[self.visual], out[1 - self.visual]) if self.text else (out, None)

    def join(self, visual: Tensor, text: Tensor | None) -> Any:
        """What a block returns."""
        if not self.text:
            return visual
        return (text, visual) if self.visual else (visual, text)


def unless_given(*names: str) -> Callable[[nn.Module, dict[str, Any]], str]:
    """A `refuses` for forward arguments with rows of all tokens that are added between blocks."""

    def refuses(transformer: nn.Module, args: dict[str, Any]) -> str:
        given = [name for name in names if args.get(name) is not None]
        return f"{given[0]} acts between blocks, on all tokens" if given else ""

    return refuses


@dataclass(frozen=True)
class Adapter:
    """One model family.

    Args:
        classes: names of the diffusers transformer classes it serves.
        attention: patterns (fnmatch) of the module names of visual self- or joint attention.
        geometry: (transformer, forward arguments by name) → Geometry.
        enter: where tokens come in; reordering gathers there.
        leave: where they go out; reordering scatters there. None: permuted tokens cannot pass
            through the model, each attention call permutes its own.
        processor: a processor class that stands in for the model's own one.
        span: what token pruning needs; None refuses it for this model.
    """

    classes: tuple[str, ...]
    attention: tuple[str, ...]
    geometry: Callable[[nn.Module, dict[str, Any]], Geometry]
    enter: tuple[Site, ...] = ()
    leave: Site | None = None
    processor: type | None = None
    span: SpanSite | None = None

    def attentions(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Name → attention module, in the order in which the layers run."""
        return {
            name: module
            for name, module in transformer.named_modules()
            if any(fnmatchcase(name, pattern) for pattern in self.attention)
        }
