"""What an adapter tells about a model family: which modules attend, how its tokens are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn


class Geometry(NamedTuple):
    """The tokens of one transformer forward.

    Args:
        grid: (T, H, W) visual tokens.
        n_text: text tokens in the joint sequence; None: whatever else an attention call brings.
        text_first: they stand before the visual ones.
        fixed_order: why permuted tokens cannot pass through the model, or "": then each attention
            call permutes its own.
        same_mask: all layers get the same key padding, perhaps as a fresh tensor or as the product
            of valid queries and valid keys, so it is read once.
        segments: attention comes in several calls, of which only that with the visual queries and
            all keys (n_text is a number) is this one; the others are the text's own and run dense,
            unbooked.
        dense: why this forward must stay dense, or "".
        one_row: devices share text and visual tokens as one row; otherwise each has its part of
            both.
        sections: lengths of the parts of the other tokens (text, references, sound), where known.
    """

    grid: tuple[int, int, int]
    n_text: int | None = 0
    text_first: bool = False
    fixed_order: str = ""
    same_mask: bool = False
    segments: bool = False
    dense: str = ""
    one_row: bool = False
    sections: tuple[int, ...] = ()

    @property
    def n_visual(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def n_tokens(self) -> int:
        return self.n_visual + (self.n_text or 0)


NOWHERE = Geometry((0, 0, 0))  # no forward runs


class Site(NamedTuple):
    """A sub-module whose output holds a row for each token.

    Args:
        module: its name.
        dim: where the rows are.
        flat: they are flattened from `dim` on (a patch convolution's [B, C, T, H, W]).
        text: rows of text stand before them and are left alone.
    """

    module: str
    dim: int
    flat: bool = False
    text: bool = False


@dataclass(frozen=True)
class SpanSite:
    """What token pruning must know of a model's blocks.

    Args:
        blocks: names of the module lists the forward loops over, one after the other.
        hidden: the blocks' argument with the visual tokens [B, N, C], which a block also returns.
        rows: per-token arguments as (name, dim, rank), or name.key for a part of a tuple or dict:
            tensors of that rank are gathered along dim; where they have rows for text too, those
            stay.
        probes: sub-modules of a block whose input and output its transition is measured by.
        text: the argument with the text tokens [B, T, C], returned beside the visual ones; "":
            blocks return the visual tokens alone.
        visual: where the visual tokens stand in that pair.
        single: those of `blocks` whose `hidden` holds text and visual tokens in one row, and is all
            they return.
        tokens_first: that row is [N, B, C].
        keys: the argument with text tokens that blocks read and do not return.
        apart: `text` is attended by itself, as sound is.
        readers: patterns of other attention modules whose keys are the visual tokens.
        count: the argument that says how many visual tokens there are.
        whole: something is added to all tokens between blocks, so that they stay together there and
            each block takes its own; True, or the forward's arguments of which one must be given.
        leave: the projection whose output is the model's; where that has fewer tokens than the
            blocks, those of history in front are missing.
        references_last: there those of references behind are missing instead.
        refuses: (transformer, forward arguments by name) → why this forward cannot be pruned, or
            "".
    """

    blocks: tuple[str, ...]
    hidden: str = "hidden_states"
    rows: tuple[tuple[str, int, int], ...] = ()
    probes: tuple[str, ...] = ()
    text: str = ""
    visual: int = 0
    single: tuple[str, ...] = ()
    tokens_first: bool = False
    keys: str = ""
    apart: bool = False
    readers: tuple[str, ...] = ()
    count: str = ""
    whole: bool | tuple[str, ...] = False
    leave: str = "proj_out"
    references_last: bool = False
    refuses: Callable[[nn.Module, dict[str, Any]], str] | None = None

    @property
    def joint(self) -> bool:
        """Visual tokens attend to text beside themselves."""
        return bool(self.text or self.single or self.keys) and not self.apart

    def lists(self, transformer: nn.Module) -> list[nn.ModuleList]:
        """The module lists themselves. TypeError where one is something else."""
        found: list[nn.ModuleList] = []
        for name in self.blocks:
            blocks = transformer.get_submodule(name)
            if not isinstance(blocks, nn.ModuleList):
                raise TypeError(f"{name} is no ModuleList of blocks but {type(blocks).__name__}")
            found.append(blocks)
        return found

    def stays_whole(self, args: dict[str, object]) -> bool:
        """Do the tokens of a forward with these arguments stay together between blocks?"""
        if isinstance(self.whole, bool):
            return self.whole
        return any(args.get(name) is not None for name in self.whole)


def matching(transformer: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """Name → sub-module of those whose name fits one of the patterns (fnmatch), in order."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


class unless_given:
    """A `refuses` for forward arguments with rows of all tokens that are added between blocks."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, transformer: nn.Module, args: dict[str, object]) -> str:
        given = [name for name in self.names if args.get(name) is not None]
        return f"{given[0]} acts between blocks, on all tokens" if given else ""


class StandIn(NamedTuple):
    """A function in place of the `__call__` of diffusers' own processor.

    Args:
        call: the function; where it returns NotImplemented, the processor's own code runs.
        names: what the code it was written for names, with spaces between: code that names more
            runs itself.
    """

    call: Callable[..., Any]
    names: str


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
        stand_in: what serves attention in place of diffusers' own processor.
        norm_rope: its processor norms queries and keys over all heads and turns them as Wan's does,
            so that accelerated methods have both as one operator (runtime/norm_rope.py).
        span: what token pruning needs; None refuses it for this model, and no_span says why.
    """

    classes: tuple[str, ...]
    attention: tuple[str, ...]
    geometry: Callable[[nn.Module, dict[str, Any]], Geometry]
    enter: tuple[Site, ...] = ()
    leave: Site | None = None
    stand_in: StandIn | None = None
    norm_rope: bool = False
    span: SpanSite | None = None
    no_span: str = "its adapter does not know its per-token arguments"

    def attentions(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Name → attention module, in the order in which the layers run."""
        return matching(transformer, self.attention)


def head_dim(module: nn.Module) -> int | None:
    """Channels of one head, where the attention module's query projection tells."""
    out = getattr(getattr(module, "to_q", None), "out_features", None)
    heads = getattr(module, "heads", None)
    return out // heads if out and heads else None
