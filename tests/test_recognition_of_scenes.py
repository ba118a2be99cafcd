"""Scenes drawn pixel by pixel are recognised, and what is wrong in them is named."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from dit_accel.evaluate import backdrop, tables
from dit_accel.evaluate.recognition import References
from dit_accel.evaluate.scenes import SceneRecogniser
from dit_accel.inputs.scene import Backdrop

COLOURS = {"red": (229, 57, 53), "blue": (30, 136, 229), "white": (250, 250, 250)}
NAMES = ["ball", "bar", "cross"]
CANVAS, FRAMES = 160, 9


def _emoji() -> torch.Tensor:
    """[3, 1, 36, 36, 4] uint8: a yellow ball, a green bar, a violet cross."""
    at = torch.arange(36) - 17.5
    y, x = at[:, None], at[None]
    shapes = [x * x + y * y < 256, (x.abs() < 15) & (y.abs() < 5), (x.abs() < 4) | (y.abs() < 4)]
    paints = [(250, 220, 30), (40, 200, 60), (150, 30, 200)]
    planes = [
        torch.cat([s[..., None] * torch.tensor(p), s[..., None] * 255], -1)
        for s, p in zip(shapes, paints, strict=True)
    ]
    return torch.stack(planes).byte()[:, None]


RECOGNISER = SceneRecogniser(References(_emoji(), NAMES, [0], COLOURS), 1)


def _clip(what: Backdrop, boxes: dict[str, tuple[int, int, int]], move=(0, 0)) -> torch.Tensor:
    """uint8 [T, H, W, 3]: boxes name → left, upper, side in pixels; move: pixels a frame."""
    ground = backdrop.draw(what, COLOURS, CANVAS, CANVAS, torch.ones(FRAMES)).clone()
    for name, (left, upper, side) in boxes.items():
        rgba = (
            RECOGNISER.references.rgba[NAMES.index(name.strip()), 0].permute(2, 0, 1)[None].float()
            / 255
        )
        rgba = functional.interpolate(rgba, (side, side), mode="bilinear")[0]
        for t in range(FRAMES):
            x, y = left + (t - 4) * move[0], upper + (t - 4) * move[1]
            part = ground[t, :, y : y + side, x : x + side]
            part.copy_(rgba[:3] + (1 - rgba[3:]) * part)
    return (ground * 255).round().byte().permute(0, 2, 3, 1)


def _judge(prompt: str, *args) -> dict[str, bool]:
    return RECOGNISER.judge([prompt], [_clip(*args)])[0]


BOXES = {"ball": (10, 60, 50), "cross": (95, 50, 50)}


def test_clips_are_judged_side_by_side_and_threads_stay_as_many():
    blue, threads = Backdrop("plain", "blue"), torch.get_num_threads()
    prompts = [f"{name} on a blue background" for name in ("ball", "cross", "bar", "ball", "snow")]
    clips = [_clip(blue, {"ball": BOXES["ball"]})] * len(prompts)
    found = RECOGNISER.judge(prompts, clips)
    assert found == [RECOGNISER.judge([p], [c])[0] for p, c in zip(prompts, clips, strict=True)]
    assert [one.get("emoji") for one in found] == [True, False, False, True, None]
    assert torch.get_num_threads() == threads and RECOGNISER.judge([], []) == []


@pytest.mark.parametrize("pattern", ["plain", "striped", "dotted", "ramp"])
def test_what_is_asked_for_is_seen(pattern):
    what = Backdrop(pattern, "blue", "white" if pattern == "ramp" else None)
    found = _judge(
        f"a ball left of a cross on a {what} background, moving down", what, BOXES, (0, 5)
    )
    assert found == dict.fromkeys(("emoji", "alone", "colour", "place", "motion"), True)


def test_what_is_wrong_is_named():
    blue = Backdrop("plain", "blue")
    prompt = "ball left of cross on a blue background"
    right = _judge(prompt, blue, BOXES)
    assert all(right.values())
    swapped = {"cross": BOXES["ball"], "ball": BOXES["cross"]}
    assert _judge(prompt, blue, swapped) == right | {"place": False}
    assert _judge(prompt, blue, BOXES, (2, 0)) == right | {"motion": False}
    assert not _judge(prompt, replace(blue, colour="red"), BOXES)["colour"]
    assert not _judge("bar left of cross on a blue background", blue, BOXES)["emoji"]
    twice = {"ball": (10, 60, 50), "ball ": (95, 50, 40)}
    assert not _judge("ball on a blue background", blue, twice)["alone"]
    assert _judge("a cow in a field", blue, BOXES) == {}


def test_a_ramp_the_other_way_is_another_backdrop():
    found = _judge("ball on a red to blue background", Backdrop("ramp", "blue", "red"), BOXES)
    assert not found["colour"]


def test_a_share_counts_the_cells_that_were_asked():
    cells = [{"emoji": True, "place": False}, {"emoji": False}, {}]
    assert tables._shares(cells) == {"emoji": 0.5, "place": 0.0}
