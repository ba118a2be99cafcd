"""Which heads each process takes, where a budget for each head makes some heavier than others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

Held = tuple[tuple[int, ...], ...]


def in_turn(heads: int, ranks: int) -> Held:
    """The heads of each of `ranks` processes, in their order: as many, of the last fewer where they
    do not divide."""
    most = -(-heads // ranks)
    return tuple(tuple(range(heads))[rank * most : (rank + 1) * most] for rank in range(ranks))


@lru_cache(1024)
def dealt(budget: tuple[float, ...], ranks: int) -> Held:
    """As many for each as in_turn, with a small largest sum of budgets, for which all wait.

    The heaviest head first, to whom has least and has room; then exchanges of two heads as long as
    one lowers it."""
    held = [list(row) for row in in_turn(len(budget), ranks)]
    room, before = [len(row) for row in held], loads(budget, held)
    held = [[] for _ in held]
    for head in sorted(range(len(budget)), key=lambda head: (-budget[head], head)):
        free = [rank for rank in range(ranks) if len(held[rank]) < room[rank]]
        held[min(free, key=lambda rank: sum(budget[i] for i in held[rank]))].append(head)
    while _exchange(budget, held):
        pass
    if max(loads(budget, held)) > max(before) - 1e-9:
        return in_turn(len(budget), ranks)
    return tuple(tuple(sorted(row)) for row in held)


def loads(budget: Sequence[float], held: Sequence[Sequence[int]]) -> list[float]:
    """The sum of the budgets of each process's heads."""
    return [sum(budget[head] for head in row) for row in held]


def _exchange(budget: Sequence[float], held: list[list[int]]) -> bool:
    """Exchange the two heads, one of the fullest, that lower the larger of two sums most."""
    sums = loads(budget, held)
    full = max(range(len(held)), key=sums.__getitem__)
    best, change = sums[full] - 1e-9, None
    for rank, row in enumerate(held):
        for i, mine in enumerate(held[full]):
            for j, other in enumerate(row):
                moved = budget[mine] - budget[other]
                larger = max(sums[full] - moved, sums[rank] + moved)
                if rank != full and larger < best:
                    best, change = larger, (rank, i, j)
    if change is None:
        return False
    rank, i, j = change
    held[full][i], held[rank][j] = held[rank][j], held[full][i]
    return True
