"""One attention whose queries stay where they are: keys and values come to them.

LASP-2 (arXiv 2502.07563) gathers keys and values in every process, Ring Self-Attention (arXiv
2105.13120) hands them round in parts, whose outputs are merged by their log-sum-exp. Neither asks
the heads to divide. Queries move only as far as whole query blocks need it, so that blocks, and
what is chosen for them, are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors
from dit_accel.parallel import collectives
from dit_accel.parallel.context import Split, context_of, kv_of, ring_group
from dit_accel.pipelines.base import Geometry
from dit_accel.table import block_count

if TYPE_CHECKING:
    import torch.distributed as dist
    from diffusers.models._modeling_parallel import ParallelConfig


class Route(NamedTuple):
    """The way of this process's tokens to those that want them.

    send: int64, its tokens in the order of their receivers. sent, got: how many go to each process
    and come from it. place: int64, what came in the order of the sequence, which for this process
    begins at `first`. bounds: where every process's part begins, and the end. stays: no token of
    any process goes to another.
    """

    send: Tensor
    sent: list[int]
    got: list[int]
    place: Tensor
    first: int
    bounds: list[int]
    stays: bool

    def go(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """x [B, n, …] of the tokens held → [B, n', …] of those wanted."""
        x = x.index_select(1, self.send)
        if self.stays:
            return x
        return _exchange(x, self.sent, self.got, group).index_select(1, self.place)

    def back(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """What was made of the tokens wanted, in the order of `send`."""
        if self.stays:
            return x
        return _exchange(x.index_select(1, self.place.argsort()), self.got, self.sent, group)


def _exchange(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    return collectives.exchanged(x.transpose(0, 1), sent, got, group).transpose(0, 1)


@cached_tensors(64)
def route(
    split: Split, order: Tensor | None, keys: bool, block: int, rank: int, device: torch.device
) -> Route:
    """To where each process has whole blocks of consecutive tokens.

    keys: of all tokens, otherwise of the visual ones. order: int64, that of the visual tokens.
    """
    visual = torch.arange(split.n_visual, device="cpu") if order is None else order.cpu()
    wanted = torch.arange(split.n, device="cpu")
    at = slice(split.visual, split.visual + split.n_visual)
    wanted[at] = split.visual + visual
    wanted = wanted if keys else wanted[at]
    place = torch.full((split.n,), -1, device="cpu")
    place[wanted] = torch.arange(len(wanted), device="cpu")
    bounds = part_bounds(len(wanted), block, split.ranks)
    ends = torch.tensor(bounds[1:], device="cpu")
    goals = [place[tokens] for tokens in split.held()]
    mine, came = goals[rank], [_among(goal, bounds, rank).sort().values for goal in goals]
    send = mine.argsort()[(mine < 0).sum() :]
    own = [_among(goal, bounds, n) for n, goal in enumerate(goals)]
    receiver = torch.bucketize(mine[send], ends, right=True)
    return Route(
        send.to(device),
        torch.bincount(receiver, minlength=split.ranks).tolist(),
        [len(x) for x in came],
        torch.cat(came).argsort().to(device),
        bounds[rank],
        bounds,
        all(len(part) == int((goal >= 0).sum()) for part, goal in zip(own, goals, strict=True)),
    )


def _among(places: Tensor, bounds: list[int], number: int) -> Tensor:
    """Those of the places that lie in part `number`."""
    return places[(places >= bounds[number]) & (places < bounds[number + 1])]


def part_bounds(n: int, block: int, ranks: int) -> list[int]:
    """Where each part of n tokens begins, in whole blocks, and the end."""
    blocks = torch.arange(block_count(n, block), device="cpu").tensor_split(ranks)
    ends = torch.tensor([len(part) for part in blocks]).cumsum(0) * block
    return [0, *ends.clamp(max=n).tolist()]


@cached_tensors(64)
def _arrival(split: Split, device: torch.device) -> tuple[int, Tensor | None]:
    """(tokens that each process gives, filled up, and where those of the sequence are among them);
    None where they come as they are wanted."""
    held = split.held()
    most = max(map(len, held))
    filled = torch.cat([rank * most + torch.arange(len(x)) for rank, x in enumerate(held)])
    index = filled[torch.cat(held).argsort()]
    still = torch.equal(index, torch.arange(split.ranks * most, device="cpu"))
    return most, None if still else index.to(device)


def gathered(tensors: list[Tensor], split: Split, group: dist.ProcessGroup) -> list[Tensor]:
    """[B, n, …] of this process's tokens → [B, N, …] of all, in the order of one device."""
    import torch.distributed as dist

    most, index = _arrival(split, tensors[0].device)
    begun = []
    for x in tensors:  # the next one is copied while one travels
        mine = x.new_zeros(most, x.shape[0], *x.shape[2:])
        mine[: x.shape[1]] = x.transpose(0, 1)
        if collectives.learned(mine):
            begun.append((collectives.gathered(mine, group), None))
            continue
        whole = x.new_empty(split.ranks * most, *mine.shape[1:])
        begun.append((whole, dist.all_gather_into_tensor(whole, mine, group=group, async_op=True)))
    found = []
    for whole, work in begun:
        if work is not None:
            work.wait()
        found.append((whole if index is None else whole.index_select(0, index)).transpose(0, 1))
    return found


@dataclass(frozen=True)
class Ring:
    """The processes that hand keys and values round; each holds the part of its number first.

    bounds: where each part of the keys begins, in whole key blocks, and the end.
    """

    group: dist.ProcessGroup
    rank: int
    bounds: list[int]

    @property
    def n(self) -> int:
        """Keys of all processes."""
        return self.bounds[-1]

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    def parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first key, k, v) [B, H, n, D] of every part, from this process's own on. The next part
        travels while one is worked on."""
        import torch.distributed as dist

        at_hand = torch.stack([k, v])
        after, before = (
            dist.get_global_rank(self.group, (self.rank + step) % self.ranks) for step in (1, -1)
        )
        for step in range(self.ranks):
            number, coming = ((self.rank - step - i) % self.ranks for i in (0, 1))
            works, room = [], at_hand
            if step + 1 < self.ranks:
                n = self.bounds[coming + 1] - self.bounds[coming]
                room = at_hand.new_empty(*at_hand.shape[:3], n, at_hand.shape[4])
                works = dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, at_hand, after, self.group),
                        dist.P2POp(dist.irecv, room, before, self.group),
                    ]
                )
            yield self.bounds[number], at_hand[0], at_hand[1]
            for work in works:
                work.wait()
            at_hand = room

    def blocks(self, x: Tensor, size: int) -> Tensor:
        """x [B, H, m, D] of this process's blocks of `size` keys → those of all processes."""
        import torch.distributed as dist

        ends = zip(self.bounds, self.bounds[1:], strict=False)
        counts = [block_count(end - start, size) for start, end in ends]
        mine = x.new_zeros(max(counts), *x.shape[:2], x.shape[3])
        mine[: x.shape[2]] = x.permute(2, 0, 1, 3)
        whole = x.new_empty(self.ranks, *mine.shape)
        dist.all_gather_into_tensor(whole.flatten(0, 1), mine, group=self.group)
        return torch.cat([x[:n] for x, n in zip(whole, counts, strict=True)]).permute(1, 2, 0, 3)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all processes' x."""
        import torch.distributed as dist

        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x


@dataclass(frozen=True)
class Shard:
    """What this process has of an attention call.

    heads: their numbers in the model. first, rows, queries: its `rows` visual queries begin at
    `first` of `queries`. None where it has all of them. ring: by which the keys come, which else
    are here.
    """

    heads: tuple[int, ...] | None = None
    first: int = 0
    rows: int | None = None
    queries: int | None = None
    ring: Ring | None = None


ALL = Shard()  # all of it


class Merged:
    """Attention to all keys from that to parts of them: out = Σ_p e^{LSE_p − LSE} out_p."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """out [B, H, N, D] and its LSE [B, H, N]; −inf for a row without keys."""
        if self.out is None or self.lse is None:
            self.out, self.lse = out.float(), lse
            return
        both = torch.logaddexp(self.lse, lse)
        old, new = ((x - both).exp().nan_to_num(0.0)[..., None] for x in (self.lse, lse))
        self.out.mul_(old).add_(out * new)
        self.lse = both


def obstacle(
    by_rows: bool, name: str, geometry: Geometry, block: int, config: ParallelConfig
) -> str:
    """Why a method cannot run on a process's own queries, in blocks of `block`, or ""."""
    ranks = context_of(config).ring_degree or 1
    if not by_rows:
        return f"{name} lays a whole clip out: set ulysses_degree instead of ring_degree"
    blocks = block_count(geometry.n_visual, block)
    return "" if blocks >= ranks else f"{blocks} blocks of queries are fewer than {ranks} processes"


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    config: ParallelConfig,
    geometry: Geometry,
    run: Callable[..., Tensor],
) -> Tensor:
    """`run` on this process's queries as they are and the keys of all, [B, n, H, D]."""
    return run(q, *_keys(k, v, mask, *_whole(k, config, geometry)))


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    config: ParallelConfig,
    geometry: Geometry,
    order: Tensor | None,
    sizes: tuple[int, int],
    inner: Callable[..., Tensor],
    rounds: Callable[[Tensor | None, int], bool],
) -> Tensor:
    """Run `inner` on this process's queries and the keys of all.

    q, k, v, result [B, n, H, D] of the tokens it holds; mask [B, 1, 1, n] or of all keys. inner
    (q, k, v, mask, shard=) is given its text queries and whole blocks of visual ones, in `order`,
    and all keys in the order of one device or, where they go round and `rounds` (of the mask and
    the number of all keys) allows it, this process's part of them, in `order`; with gradients they
    are gathered, for the merge of parts has none. sizes: tokens in a query and a key block.
    """
    import torch.distributed as dist

    split, group = _whole(k, config, geometry)
    rank = dist.get_rank(group)
    there = route(split, order, False, sizes[0], rank, q.device)
    text = _text_of(split, rank, q.device)
    rows = there.bounds[rank + 1] - there.first
    shard = Shard(first=there.first, rows=rows, queries=split.n_visual)
    parts = [q.index_select(1, text), there.go(q, group)]
    queries = torch.cat(parts if split.text_first else parts[::-1], 1)
    whole_mask = _mask(mask, k, split, group)
    enough = block_count(split.n, sizes[1]) >= split.ranks
    goes = kv_of(config) == "ring" and enough and not collectives.learned(q, k, v)
    if goes and rounds(whole_mask, split.n):
        ways = route(split, order, True, sizes[1], rank, q.device)
        shard = replace(shard, ring=Ring(group, rank, ways.bounds))
        out = inner(queries, *(ways.go(x, group) for x in (k, v)), None, shard=shard)
    else:
        out = inner(queries, *_keys(k, v, mask, split, group), shard=shard)
    n_text = text.numel()
    visual = slice(n_text, None) if split.text_first else slice(0, rows)
    beside = slice(0, n_text) if split.text_first else slice(rows, None)
    whole = torch.empty_like(q)
    whole[:, there.send] = there.back(out[:, visual], group)
    whole[:, text] = out[:, beside]
    return whole


def _mask(mask: Tensor | None, k: Tensor, split: Split, group: dist.ProcessGroup) -> Tensor | None:
    """The mask of all keys, of one of this process's keys k."""
    if mask is None or mask.shape[-1] != k.shape[1]:
        return mask
    return gathered([mask.transpose(1, 3)], split, group)[0].transpose(1, 3)


def _keys(
    k: Tensor, v: Tensor, mask: Tensor | None, split: Split, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of all processes."""
    k_whole, v_whole = gathered([k, v], split, group)
    return k_whole, v_whole, _mask(mask, k, split, group)


def _whole(
    k: Tensor, config: ParallelConfig, geometry: Geometry
) -> tuple[Split, dist.ProcessGroup]:
    """How the sequence is split of which this process has the keys k, and among whom."""
    import torch.distributed as dist

    group = ring_group(config)
    n = _total(k, config, geometry, group)
    return Split.of(geometry, n, dist.get_world_size(group)), group


def _total(k: Tensor, config: ParallelConfig, geometry: Geometry, group: dist.ProcessGroup) -> int:
    """Keys of all processes: in parts that do not divide, unless the model's geometry says it, all
    tell theirs."""
    import torch.distributed as dist

    if geometry.n_text is not None:
        return geometry.n_tokens
    if not context_of(config).ring_anything:
        return k.shape[1] * dist.get_world_size(group)
    count = torch.tensor(k.shape[1], device=k.device)
    dist.all_reduce(count, group=group)
    return int(count)


@cached_tensors(64)
def _text_of(split: Split, rank: int, device: torch.device) -> Tensor:
    """int64: where this process's text is among its tokens."""
    mine = split.held()[rank]
    text = (mine < split.visual) | (mine >= split.visual + split.n_visual)
    return text.nonzero()[:, 0].to(device)
