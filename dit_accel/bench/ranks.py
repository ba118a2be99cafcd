"""What one of several processes has of an attention call: the share that is timed in its place.

Nothing is sent here: a share is cut out of the whole and run alone, and what would travel is
computed. A measured call on several GPUs is that of benchmarks/multi_gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dit_accel.parallel.sharded import part_bounds
from dit_accel.table import BlockTable, block_count

WAYS = ("ulysses", "gather")


@dataclass(frozen=True)
class Way:
    """How a call is shared: by heads (ulysses), or by queries to which all keys come (gather)."""

    name: str
    ranks: int

    @classmethod
    def all_of(cls, ranks: int) -> tuple[Way, ...]:
        """Those for so many processes; one alone has everything. ValueError for fewer."""
        if ranks < 1:
            raise ValueError(f"ranks are numbers of processes ≥ 1, not {ranks}")
        return tuple(cls(name, ranks) for name in WAYS) if ranks > 1 else (cls("alone", 1),)

    def shares(self, heads: int, n: int, block: int) -> list[Share]:
        """What each process has; by heads as many, filled up, so that the last may have none."""
        if self.name == "ulysses":
            most = -(-heads // self.ranks)
            firsts = [min(heads, rank * most) for rank in range(self.ranks + 1)]
            pairs = zip(firsts, firsts[1:], strict=False)
            return [Share(slice(a, b), slice(0, n)) for a, b in pairs if a < b]
        if block_count(n, block) < self.ranks:
            raise ValueError(f"{n} tokens in blocks of {block} are too few for {self.ranks} ranks")
        ends = part_bounds(n, block, self.ranks)
        pairs = zip(ends, ends[1:], strict=False)
        return [Share(slice(0, heads), slice(a, b)) for a, b in pairs]

    def received(self, q: Tensor) -> int:
        """Bytes that come to one process, for q, k, v and the output [B, H, N, D] by heads, filled
        up, for k and v by queries."""
        batch, heads, n, d = q.shape
        if self.name == "ulysses":
            heads = -(-heads // self.ranks) * self.ranks
            moved = 4 * (self.ranks - 1) / self.ranks**2
        else:
            moved = 2 * (self.ranks - 1) / self.ranks
        return round(moved * batch * heads * n * d) * q.element_size()


@dataclass(frozen=True)
class Share:
    """Some heads, and some whole blocks of queries, of a call."""

    heads: slice
    queries: slice

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This part of q, k, v [B, H, N, D]; views."""
        return q[:, self.heads, self.queries], k[:, self.heads], v[:, self.heads]

    def table(self, whole: BlockTable) -> BlockTable:
        """This part of the table."""
        indices, counts = whole.indices[:, self.heads], whole.counts[:, self.heads]
        part = replace(whole, indices=indices.contiguous(), counts=counts.contiguous(), bits=None)
        first, last = self.queries.start, self.queries.stop
        return part if last - first == whole.n_q else part.rows(first, last - first)


def fullest(shares: list[Share], whole: BlockTable, ranks: int) -> tuple[int, float]:
    """The process with the most kept blocks, for whom the others wait, and how much more it has
    than the mean of all `ranks`."""
    kept = [int(share.table(whole).counts.sum()) for share in shares]
    most = max(range(len(kept)), key=kept.__getitem__)
    return most, kept[most] * ranks / max(1, sum(kept))
