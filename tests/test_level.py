"""Heads are dealt out so that no process waits longer than it must."""

import itertools

import pytest
import torch

from dit_accel.parallel.level import dealt, in_turn, loads


def least(budget, ranks):
    """The smallest largest sum of all ways to deal out, by trying each."""
    sizes = [len(row) for row in in_turn(len(budget), ranks)]
    ends = list(itertools.accumulate(sizes, initial=0))
    return min(
        max(sum(order[a:b]) for a, b in itertools.pairwise(ends))
        for order in itertools.permutations(budget)
    )


@pytest.mark.parametrize(("heads", "ranks"), [(6, 2), (7, 2), (6, 3), (7, 3), (4, 4)])
def test_the_fullest_is_nearly_as_full_as_it_must_be(heads, ranks):
    draw = torch.Generator().manual_seed(heads * ranks)
    for _ in range(6):
        budget = tuple(torch.rand(heads, generator=draw).tolist())
        held = dealt(budget, ranks)
        assert sorted(sum(held, ())) == list(range(heads))
        assert [len(row) for row in held] == [len(row) for row in in_turn(heads, ranks)]
        assert all(list(row) == sorted(row) for row in held)
        assert max(loads(budget, held)) <= max(loads(budget, in_turn(heads, ranks)))
        assert max(loads(budget, held)) <= 1.1 * least(budget, ranks)


def test_what_is_level_stays_in_turn():
    assert in_turn(5, 2) == ((0, 1, 2), (3, 4))
    assert dealt((0.25,) * 6, 3) == in_turn(6, 3)
    assert dealt((0.5, 0.1, 0.1, 0.5), 2) == in_turn(4, 2)
    assert dealt((0.5, 0.5, 0.1, 0.1), 2) == ((0, 2), (1, 3))
