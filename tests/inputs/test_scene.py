"""Prompts of scenes: read, written, and refused in one sentence."""

import json
from pathlib import Path

import pytest
from tiny import saved_tiny_wan

from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.request import Request, arguments
from dit_accel.inputs.scene import Backdrop, Object, Scene, UnknownWords, Vocabulary

WORDS = Vocabulary(("rocket", "red heart", "heart", "owl"), ("red", "blue"))
BLUE, RED = Backdrop("plain", "blue"), Backdrop("plain", "red")
RAMP, SMALL_ROCKET = Backdrop("ramp", "red", "blue"), Object("rocket", "small")


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("rocket on a blue background", Scene((Object("rocket"),), BLUE)),
        ("A Red  Heart, on a RED background.", Scene((Object("red heart"),), RED)),
        (
            "a small rocket left of an owl on a blue background, moving up",
            Scene((SMALL_ROCKET, Object("owl")), BLUE, ("left of",), motion="moving up"),
        ),
        (
            "large owl at the top on a red to blue background zooming in",
            Scene((Object("owl", "large"),), RAMP, (), "at the top", "zooming in"),
        ),
        (
            "heart and owl below rocket on a dotted red background",
            Scene(
                (Object("heart"), Object("owl"), Object("rocket")),
                Backdrop("dotted", "red"),
                ("and", "below"),
            ),
        ),
    ],
)  # fmt: skip
def test_a_prompt_is_read_and_written_again(prompt, scene):
    assert WORDS.read(prompt) == scene
    assert WORDS.read(scene.text()) == WORDS.read(scene.text(articles=False)) == scene


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("hot dog on a blue background", 'expected one of the 4 emoji .*, got "hot dog on"'),
        ("rocket", 'expected "on a <colour> background" after "rocket", got "the end"'),
        ("rocket on a mauve background", r'expected a colour \(red, blue\) after "rocket on a"'),
        ("rocket on a blue sky", 'expected "background" after "on a blue", got "sky"'),
        ("rocket on a blue background, dancing", 'expected nothing more, .*, got "dancing"'),
        ("owl and owl and owl and owl on a red background", "at most 3 emoji"),
        ("owl and heart on the left on a red background", 'expected "on a <colour> background"'),
        ("", 'expected one of the 4 emoji .*, got "the end"'),
    ],
)
def test_other_prompts_are_refused_in_a_sentence(prompt, sentence):
    with pytest.raises(UnknownWords, match=sentence):
        WORDS.read(prompt)


def test_a_model_without_scenes_has_no_vocabulary(tmp_path: Path):
    assert Vocabulary.load(tmp_path) is None
    facts = tmp_path / "training.json"
    facts.write_text('{"held_out": {"owl": "red"}, "colours": {"red": [1, 2, 3]}}')
    assert Vocabulary.load(tmp_path) is None
    facts.write_text('{"scenes": true, "held_out": {"owl": "red"}, "colours": {"red": [1, 2, 3]}}')
    assert Vocabulary.load(tmp_path) == Vocabulary(("owl",), ("red",))


def test_the_words_of_every_scene_are_in_the_vocabulary():
    scene = Scene(
        (Object("owl", "small"), Object("heart")), BLUE, ("right of",), None, "zooming out"
    )
    assert set(scene.text().replace(",", "").split()) <= WORDS.words()


def test_a_model_of_scenes_takes_scenes_only(tmp_path: Path):
    folder = saved_tiny_wan(tmp_path / "model")
    pipe, defaults = load_pipeline(folder)
    other = Request("a field of cows")
    assert arguments(pipe, defaults, other)["prompt"] == other.prompt
    facts = {"scenes": True, "held_out": {"rocket": "red"}, "colours": {"blue": [0, 0, 255]}}
    (folder / "training.json").write_text(json.dumps(facts))
    arguments(pipe, defaults, Request("rocket on a blue background"))
    with pytest.raises(ValueError, match='expected one of the 1 emoji .*, got "field of cows"'):
        arguments(pipe, defaults, other)
