import pytest

from dit_accel import Schedule
from dit_accel.schedule import Plan, count_steps


def plan(layers=4, keep=0.25, **options):
    return Plan(Schedule(**options), keep, layers)


def kinds(p, steps, layer=0):
    return ["d" if p.action(s, steps, layer).keep is None else "s" for s in range(steps)]


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"warmup": 0.25}, 8, "ddssssss"),
        ({"warmup": 0.15}, 4, "dsss"),
        ({"warmup": 2, "cooldown": 1}, 6, "ddsssd"),
        ({"warmup": 0}, 3, "sss"),
        ({"warmup": 0, "cooldown": 0.5}, 4, "ssdd"),
    ],
)
def test_dense_steps(options, steps, expected):
    assert "".join(kinds(plan(**options), steps)) == expected
    assert Schedule(**options, dense_layers=(0,)).dense_steps(steps) == expected.count("d")


@pytest.mark.parametrize("share,steps,count", [(0.14, 50, 7), (0.28, 25, 7), (0.07, 100, 7)])
def test_a_share_is_not_rounded_up_for_what_floating_point_adds(share, steps, count):
    assert share * steps > count and count_steps(share, steps) == count


def test_dense_layers_count_from_both_ends():
    p = plan(warmup=0, dense_layers=(0, -1))
    assert [p.action(0, 4, i).keep is None for i in range(4)] == [True, False, False, True]
    assert p.action(0, 4, 0).reason == "dense layer"


def test_layers_that_keep_less_at_some_step_have_a_state():
    whole = Plan(Schedule(warmup=0, dense_layers=(0,)), 1.0, 3)
    assert whole.sparse_layers() == ()
    falling = Plan(Schedule(warmup=0, dense_layers=(0,), step_keep=((0, 1.0), (2, 0.1))), 1.0, 3)
    assert falling.sparse_layers() == (1, 2)


def test_layer_keep_replaces_the_methods():
    p = plan(warmup=0, layer_keep=((1, 0.5), (-1, 1.0)))
    assert [p.action(0, 4, i).keep for i in range(4)] == [0.25, 0.5, 0.25, None]


def test_refresh_opens_the_sparse_part_and_recurs():
    p = plan(warmup=1, refresh=3)
    assert [p.action(s, 9, 0).refresh for s in range(9)] == [
        False, True, False, False, True, False, False, True, False,
    ]  # fmt: skip


def test_keep_falls_with_the_steps_and_a_layers_own_alike():
    curve = ((0.2, 0.5), (0.6, 0.1), (0.4, 1.0))
    p = plan(warmup=1, step_keep=curve, layer_keep=((1, 0.5), (2, 0.1)))
    assert [p.action(s, 10, 0).keep for s in range(10)] == [None, 0.25, 0.5, 0.5, None, None] + [
        0.1
    ] * 4
    assert [p.action(s, 10, 1).keep for s in (1, 2, 6)] == [0.5, None, 0.2]
    assert [p.action(s, 10, 2).keep for s in (1, 4, 6)] == pytest.approx([0.1, 0.4, 0.04])
    assert [p.action(s, None, 0).keep for s in (1, 6)] == [0.25, 0.25]
    assert plan(warmup=0, step_keep=((3, 0.5),)).action(3, None, 0).keep == 0.5


def test_refresh_at_given_steps():
    p = plan(warmup=2, refresh=(0.3, 5, 0.75))
    assert [s for s in range(10) if p.action(s, 10, 0).refresh] == [2, 3, 5, 8]
    assert [s for s in range(10) if p.action(s, None, 0).refresh] == [2, 5]


def test_unknown_number_of_steps_runs_sparse_after_counted_warmup():
    assert plan(warmup=0.5).action(0, None, 0).keep == 0.25
    assert plan(warmup=2).action(1, None, 0).keep is None


@pytest.mark.parametrize(
    "options",
    [
        {"warmup": -1},
        {"warmup": 1.5},
        {"cooldown": True},
        {"layer_keep": ((0, 0.0),)},
        {"refresh": 0},
        {"refresh": (0.5, -1)},
        {"step_keep": ((0.5, 0.0),)},
        {"step_keep": ((1.5, 0.5),)},
    ],
)
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Schedule(**options)


def test_layers_outside_the_model_are_refused():
    with pytest.raises(ValueError, match="layers 0 to 3"):
        plan(dense_layers=(4,))


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="10 dense warm-up steps in a run of 4"):
        plan(warmup=10).action(0, 4, 0)
