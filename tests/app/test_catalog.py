"""What the page knows of both kinds of model, from their folders."""

import json

import pytest

from dit_accel.app import catalog
from dit_accel.app.catalog import card
from dit_accel.generation.loading import EMBEDDED
from dit_accel.inputs.scene import Vocabulary


@pytest.fixture(params=[False, True], ids=["words", "scenes"])
def folder(tmp_path, request):
    names = dict.fromkeys(("rocket", "ghost", "owl", "unicorn", "red heart", "cat"), "red")
    colours = {name: [0, 0, 0] for name in ("red", "blue", "pink", "green")}
    facts = {"held_out": names, "colours": colours, "scenes": request.param}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    size = {"width": 384, "height": 384, "num_frames": 33, "guidance_scale": 1.0}
    (tmp_path / "generation.json").write_text(json.dumps(size))
    return tmp_path


def test_vocabulary_examples_and_sizes_come_from_the_models_folder(folder):
    found = card(str(folder))
    facts = found.facts()
    assert [name for name, _ in facts["draws"]] == list(found.words.names)
    assert facts["defaults"]["size"] == "384x384" and facts["defaults"]["frames"] == 33
    prompts = [prompt for _, prompt in facts["draws"]] + found.words.examples(3)
    assert len(prompts) == 9 and len(set(found.words.examples(3))) == 3
    for prompt in prompts:
        assert found.words.trouble(prompt) is None
        if facts["scenes"]:
            Vocabulary.load(folder).read(prompt)
    assert any("moving up" in line for line in facts["grammar"]) == facts["scenes"]
    assert any("pink" in line for line in facts["grammar"])
    assert ("an owl on a" in dict(facts["draws"])["owl"]) == facts["scenes"]


def test_a_model_may_name_its_examples(folder):
    file = folder / "training.json"
    prompts = ["a ghost on a pink background", "a cat on a red background", "an owl on a red one"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "examples": prompts}))
    assert card(str(folder)).words.examples(2) == prompts[:2]


def test_a_word_that_the_model_does_not_know_is_named(folder):
    trouble = card(str(folder)).words.trouble("a spaceship on a blue background")
    assert "spaceship" in trouble


def test_the_embedded_model_says_what_it_draws_and_its_presets_are_offered():
    facts = card(None).facts()
    assert len(facts["draws"]) > 20 and facts["grammar"]
    assert set(catalog.PRESETS) == {p.parent.name for p in EMBEDDED.parent.glob("*/preset.json")}
    assert card("no/such-model").words is None
