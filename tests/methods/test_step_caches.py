"""Methods that remember a full step beside a cache that skips steps: guidance passes stay alike."""

import pytest
import torch
from runs import on, run
from tiny import tiny_wan

from dit_accel import Rettention, SharedResidual, step_cached
from dit_accel.methods import Call
from dit_accel.runtime.decision import Decision

BOTH = [SharedResidual(keep=0.2, period=6), Rettention(keep=0.2, period=6)]


def full_steps(method, ran):
    """Which calls are full: those that note no table. ran: (pass, step) in their order."""
    generator = torch.Generator().manual_seed(1)
    tokens = list(torch.randn(3, 1, 2, 300, 64, generator=generator))
    states: dict = {}
    together: dict = {}
    found = []
    for name, step in ran:
        noted: list = []
        where = {"step": step, "passname": name, "state": states.setdefault(name, {})}
        method(*tokens, Call(0.2, grid=(3, 10, 10), together=together, note=noted.append, **where))
        found += [(name, step)] * (noted == [None])
    return found


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
def test_full_steps_of_two_passes_stay_the_same(method):
    ran = [(name, step) for step in range(9) for name in "cu" if (name, step) != ("c", 6)]
    both = [(name, step) for step in (0, 7) for name in "cu"]
    assert full_steps(method, ran) == sorted([*both, ("u", 6)], key=lambda x: x[1])


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
@pytest.mark.parametrize("alike", [1, 2])
def test_passes_that_are_skipped_alike_are_full_no_more_often(method, alike):
    ran = [(name, step) for step in range(0, 13, alike) for name in "cu"]
    assert full_steps(method, ran) == [(name, step) for step in (0, 6, 12) for name in "cu"]


def test_a_pass_that_has_ended_does_not_hold_up_the_other():
    ran = [("c", 0), ("u", 0), *(("c", step) for step in range(1, 13))]
    assert full_steps(BOTH[0], ran) == [("c", 0), ("u", 0), ("c", 6), ("c", 12)]


def test_beside_a_cache_no_step_takes_one_pass_full_and_the_other_partial(monkeypatch):
    skipped = {("cond", 3), ("uncond", 4), ("cond", 4), ("uncond", 6)}
    known = iter([(name, step) for step in range(1, 9) for name in ("cond", "uncond")])
    monkeypatch.setattr(Decision, "decide", lambda self, _: next(known) not in skipped)
    pipe = tiny_wan(layers=3)
    with step_cached(pipe, 0.1), on(pipe, SharedResidual(keep=0.2, period=3)) as handle:
        run(pipe, steps=9)
    kept = {}
    for row in handle.report().steps:
        if row["sparse"] == 3:  # not skipped
            kept.setdefault(row["step"], []).append(row["kept"] > 0.5)
    both = [step for step, passes in kept.items() if len(passes) == 2]
    assert both == [0, 1, 2, 5, 7, 8]
    apart = [step for step in both if len(set(kept[step])) == 2]
    assert apart == []
    assert sum(any(passes) for passes in kept.values()) < len(kept)
