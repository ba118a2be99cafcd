"""Values of presets, generation.json, job files and options: key, expected, what came."""

import json
import math

import pytest

import dit_accel
from dit_accel.batch import Job, Settings
from dit_accel.config import resolve
from dit_accel.evaluate.run import Budget
from dit_accel.evaluate.tune import Goal
from dit_accel.finetune.config import Settings as Training
from dit_accel.generation import Boost, Defaults, Request
from dit_accel.generation.options import How
from dit_accel.inputs.fields import shown

WRONG = [None, [], {}, "x", 1.5, -1, True, math.inf, [[1]], ["x"], {"a": 1}, 10**400, [None]]
PRESET = {
    "method": {"name": "topk", "keep": 0.5, "block_q": 64, "block_k": 64, "precision": "int8"},
    "schedule": {
        "warmup": 0.1,
        "cooldown": 0,
        "dense_layers": [0],
        "layer_keep": [[0, 0.5]],
        "refresh": 2,
    },
    "prune": {"keep": 0.5, "first": 1, "last": -1, "criterion": "drift", "threshold": 0.1},
    "order": "tile",
    "tile": [1, 8, 8],
    "min_tokens": 3,
    "strict": False,
}
PLACES = [(key,) for key in PRESET] + [
    (part, key) for part in ("method", "schedule", "prune") for key in PRESET[part]
]


def test_presets_of_wrong_types_name_file_key_expected_and_given(tmp_path):
    """Every key with every kind of value: accepted, or refused by the file's name and the key."""
    path, refused = tmp_path / "preset.json", 0
    for *parents, key in PLACES:
        for value in WRONG:
            data = json.loads(json.dumps(PRESET))
            place = data[parents[0]] if parents else data
            place[key] = value
            path.write_text(json.dumps(data))
            try:
                assert resolve(path).to_dict()
            except ValueError as error:
                said, refused = str(error), refused + 1
                assert said.startswith(f"preset file {path}: ") and "\n" not in said
                own_words = ("object is not", "argument", "unsupported", "must be", "invalid lit")
                assert not any(words in said for words in own_words), said
                finite = value != math.inf  # JSON's Infinity is refused as such
                assert key in said or not finite or key == "name", (key, value, said)
    assert refused > 150


def test_generation_defaults(tmp_path):
    path = tmp_path / "generation.json"
    for key, value, says in (
        ("height", "tall", "height is a whole number, not 'tall'"),
        ("fps", 0, "fps lies from 1 to 240, not 0"),
        ("num_frames", 10**9, "num_frames lies from 1 to 1025"),
        ("guidance_scale", "7", "guidance_scale is a number"),
        ("negative_prompt", 3, "negative_prompt is a text"),
        ("speed", 3, "has no option 'speed'"),
    ):
        path.write_text(json.dumps({key: value}))
        with pytest.raises(ValueError, match=f"generation defaults {path}: .*{says}"):
            Defaults.from_file(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dit_accel.Schedule(warmup=math.nan),
        lambda: dit_accel.Schedule(cooldown="1"),
        lambda: dit_accel.TopK(keep=True),
        lambda: dit_accel.TopK(block_k=64.0),
        lambda: dit_accel.TokenPruning(keep="half"),
        lambda: dit_accel.TokenPruning(threshold=math.nan, criterion="drift"),
        lambda: dit_accel.SLA(weights=3),
        lambda: Boost(step_cache=math.inf),
        lambda: Request("a", guidance=math.nan),
        lambda: Request("a", seed=1.0),
        lambda: Request("half a letter \ud800"),
        lambda: Request("a" * 10_000),
        lambda: Job("a", negative_prompt="\udcff"),
        lambda: Settings(timeout=math.nan),
        lambda: Settings(retries=0.5),
        lambda: How(warmup="soon").config(),
        lambda: Budget(limit=-5),
        lambda: Budget(minutes=math.nan),
        lambda: Goal(psnr=math.nan),
        lambda: Training("out", lr_projection=math.inf),
        lambda: Training("out", weight_decay=math.nan),
        lambda: Training("out", lr=math.nan, train="full"),
        lambda: Training("out", size=(1,)),
    ],
)
def test_no_number_no_text(make):
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value).count("\n") == 0


def test_a_preset_is_named_to_its_end():
    for text in ("topk:", "dense:", "topk:fast:"):
        with pytest.raises(ValueError, match="has no preset"):
            resolve(text)


def test_errors_are_short():
    assert len(shown("x" * 10**6)) < 80
    assert len(shown({"a": ["x" * 10**5] * 99})) < 500
    assert len(shown(10**5000)) < 80
