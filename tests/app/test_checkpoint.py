"""The checkpoint field: its weights, attention and sampler on the page; what is asked for wins."""

import json
import threading

import pytest
from diffusers import WanPipeline

import dit_accel
from dit_accel.app import form, outcome, views
from dit_accel.app.ask import BadField, Limits
from dit_accel.app.cost import told
from dit_accel.app.studio import Studio
from dit_accel.media import metadata


@pytest.fixture(scope="module")
def studio():
    return Studio()


def read(turbowan, limits=None, **values):
    model, file = map(str, turbowan)
    right = {"method": "trained", "min_tokens": "0", **values.pop("right", {})}
    asked = {"prompt": "a rocket", "model": model, "checkpoint": file, **values}
    return form.read({**asked, "right": right}, limits or Limits(), opened=None)


def test_it_runs_as_it_was_trained(turbowan, studio, tmp_path):
    ask = read(turbowan)
    assert ask.label(ask.right) == "as trained"
    assert "once the checkpoint is loaded" in told(studio, ask)["text"]
    pair = studio.run(ask, threading.Event())
    assert "192 tokens × 4 steps" in told(studio, ask)["text"]
    data = outcome.record(pair, tmp_path)
    assert (data["left"]["label"], data["right"]["label"]) == ("dense", "sla, keep 0.1")
    assert data["steps"] == 4 and data["right"]["report"]["kept"] < 1
    assert data["checkpoint"]["files"] == [str(turbowan[1])]
    assert metadata.read(tmp_path / "left.mp4")["checkpoint"]["family"] == "TurboWan"
    assert "load_checkpoint(pipe, " in data["right"]["python"]
    assert "(TurboWan, sampler rcm:80)" in views.results(data, "")
    # its JSON alone would lose what it learned; the dense side's loses nothing
    assert data["right"]["config"] is None and not (tmp_path / "right.json").exists()
    assert data["left"]["config"] == "left.json"
    alone = WanPipeline.from_pretrained(turbowan[0])
    loaded = dit_accel.load_checkpoint(alone, turbowan[1], min_tokens=0)
    assert loaded.config.method == pair.ask.config(pair.ask.right).method


def test_what_is_asked_for_wins(turbowan, studio, tmp_path):
    ask = read(turbowan, sampler="flow:5", right={"method": "sla", "keep": "0.6"})
    pair = studio.run(ask, threading.Event())
    config = pair.ask.config(pair.ask.right)
    assert config.method.keep == 0.6 and config.method.tensors()  # sla's, with what was learned
    facts = json.loads(json.dumps(outcome.record(pair, tmp_path)))
    assert facts["right"]["label"] == "sla, keep 0.6" and "flow:5" in facts["right"]["python"]
    # the model without it is another one, and loaded anew
    plain = form.read({"prompt": "a rocket", "model": str(turbowan[0])}, Limits(), opened=None)
    assert studio._held(ask) is not None and studio._held(plain) is None


def test_refusals_are_sentences_at_their_field(turbowan, studio):
    for values, words, name in (
        ({"checkpoint": ""}, "name one under Model", "right.method"),
        ({"checkpoint": ["x"]}, "a file, a folder or an id", "checkpoint"),
        ({"limits": Limits.for_public((str(turbowan[0]),))}, "public", "checkpoint"),
    ):
        with pytest.raises(BadField, match=words) as caught:
            read(turbowan, **values)
        assert caught.value.name == name
    before = studio._loaded
    with pytest.raises(ValueError, match=r"there is no checkpoint none\.pth"):
        studio.run(read(turbowan, checkpoint="none.pth"), threading.Event())
    assert studio._loaded is before  # a mistyped name lets nothing go
    with pytest.raises(ValueError, match="trained from another"):
        studio.run(read(turbowan, model=None, prompt="a"), threading.Event())


def test_the_field_is_there_unless_the_page_is_public():
    (control,) = form.weights_controls(Limits())
    assert control.name == "checkpoint" and control.help.endswith("with a comma between.")
    assert form.weights_controls(Limits.for_public()) == []
    assert form.TRAINED not in {kind.value for kind in form.kinds(Limits.for_public())}
