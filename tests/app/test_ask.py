"""Requests and their limits."""

from dataclasses import replace

import pytest
from asks import ASK, DEFAULTS

from dit_accel.app.ask import Ask, Limits, Side


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": None}, "empty"),
        ({"prompt": "x" * 501}, "501 characters"),
        ({"steps": 0}, "Steps is a whole number from 1 to 100"),
        ({"steps": 101}, "from 1 to 100"),
        ({"width": 1281}, "Width is a whole number from 16 to 1280"),
        ({"height": 8}, "Height"),
        ({"frames": 130}, "Frames is a whole number from 1 to 129"),
        ({"frames": 4.5}, "Frames"),
        ({"frames": True}, "Frames"),
        ({"seed": -1}, "Seed"),
        ({"seed": None}, "Seed"),
    ],
)
def test_a_request_outside_the_limits_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(ASK, **change)


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"method": "topk:insane"}, "no preset"),
        ({"method": "topk", "keep": 0.0}, "keep is the share"),
        ({"method": "topk", "keep": 2.0}, "keep is the share"),
        ({"warmup": -0.1}, "warm-up"),
        ({"method": "topk", "order": "zigzag"}, "unknown token order|unknown order"),
    ],
)
def test_a_bad_side_is_refused(side, words):
    with pytest.raises(ValueError, match=words):
        Side(**side)


def test_a_public_page_runs_only_the_operators_models():
    limits = Limits.for_public(("name/model",))
    assert Ask("a cat", limits=limits, model="name/model").model == "name/model"
    for model in ("other/model", "/etc", "../secret"):
        with pytest.raises(ValueError, match="public"):
            Ask("a cat", limits=limits, model=model)
    with pytest.raises(ValueError, match="from 16 to 512"):
        Ask("a cat", limits=limits, width=1280)


def test_a_models_own_defaults_are_held_to_the_limits():
    big = replace(DEFAULTS, num_frames=257)
    with pytest.raises(ValueError, match="257 is more than 129"):
        ASK.request(big)
    assert replace(ASK, frames=9).request(big).frames == 9
