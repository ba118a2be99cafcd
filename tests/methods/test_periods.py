"""When the methods that remember take a full step."""

import pytest
from runs import on, run
from tiny import tiny_wan

from dit_accel import Rettention, Schedule, SharedResidual
from dit_accel.config import AccelConfig


@pytest.mark.parametrize(
    ("period", "first", "steps", "full"),
    [
        (5, 3, 20, [3, 8, 13, 18]),
        (0.25, 8, 50, [8, 21, 34, 47]),
        (0.25, 0, 4, [0, 2]),
        ((0.25, 0.4, 0.65), 3, 20, [3, 5, 8, 13]),
        ((0.25, 0.4, 0.65), 8, 50, [8, 13, 20, 33]),
        ((0.25, 0.4, 0.65), 0, 8, [0, 2, 4, 6]),
        ((0.25, 0.4, 0.65), 1, 8, [1, 4, 6]),
        ((0.25, 0.4, 0.65), 0, 4, [0, 2]),
        ((0.25, 0.4, 0.65), 1, 4, [1]),  # of the last step nothing is used
        (0.25, 0, 5, [0, 2]),
        (3, 0, 7, [0, 3]),
        ((12,), 3, 13, [3]),
        ((12,), 3, 10, [3]),
        ((1, 4, 5), 0, 10, [0, 4]),
        (5, 10, 10, []),
    ],
)
def test_the_full_steps_of_a_run(period, first, steps, full):
    assert Rettention(period=period).full_steps(first, steps) == full


def test_a_place_that_a_step_cache_skipped_is_made_up_for():
    method = SharedResidual(period=(0.5,))
    assert not method.due(9, 3, 20)
    assert method.due(12, 3, 20) and not method.due(13, 12, 20)
    assert SharedResidual(period=5).due(19, 13, 20)  # that of 18, at the last step
    assert not SharedResidual(period=5).due(19, 14, 20)


@pytest.mark.parametrize("steps", [4, 10])
def test_the_default_has_them_early_and_runs_so(steps):
    pipe = tiny_wan()
    with on(pipe, SharedResidual(keep=0.3), schedule=Schedule(warmup=1)) as handle:
        run(pipe, steps=steps, guidance=1.0)
        ran = handle.report().steps
    full = [n for n, step in enumerate(ran) if step["kept"] == 1]
    assert full == [0, *SharedResidual().full_steps(1, steps)]


def test_a_schedule_makes_the_last_step_full_where_it_asks():
    pipe, asked = tiny_wan(), Schedule(warmup=1, refresh=2)
    with on(pipe, SharedResidual(keep=0.3), schedule=asked) as handle:
        run(pipe, steps=4, guidance=1.0)
        assert [step["kept"] == 1 for step in handle.report().steps] == [True, True, False, True]


@pytest.mark.parametrize("period", [0, 1.5, True, (), (0.5, 0), (0.5, "2")])
def test_what_is_no_place_in_a_run_is_refused(period):
    with pytest.raises((TypeError, ValueError), match="period"):
        SharedResidual(period=period)


def test_places_come_back_from_a_file(tmp_path):
    config = AccelConfig(SharedResidual(period=(0.2, 7)))
    config.save(tmp_path / "mine.json")
    assert AccelConfig.from_dict(config.to_dict()) == config
