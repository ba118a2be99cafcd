"""Requests, their limits, and the form that makes them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from asks import ASK, DEFAULTS, SPARSE, other
from PIL import Image

from dit_accel.app import form
from dit_accel.app.ask import Ask, BadField, Limits, config_of, label
from dit_accel.app.cost import check_work, duration, tokens_of
from dit_accel.generation.options import How, What, described


@pytest.mark.parametrize(
    ("change", "words", "field"),
    [
        ({"prompt": "  "}, "empty", "prompt"),
        ({"prompt": None}, "empty", "prompt"),
        ({"prompt": "x" * 501}, "501 characters", "prompt"),
        ({"negative": "x" * 501}, "501 characters", "negative"),
        ({"steps": 0}, "Steps is a whole number from 1 to 100, not 0", "steps"),
        ({"steps": 101}, "from 1 to 100", "steps"),
        ({"size": "5000x256"}, "Width is a whole number from 16 to 1280, not 5000", "size"),
        ({"size": "256x8"}, "Height", "size"),
        ({"size": "large"}, "Size is widthxheight", "size"),
        ({"frames": 130}, "Frames is a whole number from 1 to 129", "frames"),
        ({"seed": -1}, "Seed", "seed"),
        ({"guidance": 101.0}, "Guidance is a number from 0 to 100", "guidance"),
        ({"sampler": "magic"}, "sampler", "sampler"),
    ],
)
def test_a_request_outside_the_limits_is_refused(change, words, field):
    with pytest.raises(BadField, match=words) as caught:
        other(ASK, **change)
    assert caught.value.name == field


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"method": "magic"}, "There is no method"),
        ({"method": "topk", "keep": "0"}, "keep is the share"),
        ({"method": "topk", "keep": "2"}, "keep is the share"),
        ({"method": "topk", "keep": "much"}, "Keep is a number, not 'much'"),
        ({"method": "topk", "warmup": "-0.1"}, "warmup is"),
        ({"method": "topk", "order": "zigzag"}, "unknown token order|unknown order"),
        ({"method": "shared", "prune": "fast"}, "cannot run on pruned ones"),
        ({"method": "dense", "step_cache": "-1"}, "step_cache is a relative change"),
        ({"method": "topk", "colour": "red"}, "There is no setting 'colour'"),
        ({"method": 3}, "method on the right is a name"),
        ({"method": "topk", "compile": "maybe"}, "Compile is on or off"),
        ("topk", "right side is an object"),
    ],
)
def test_a_bad_side_is_refused(side, words):
    with pytest.raises(BadField, match=words) as caught:
        form.read({"prompt": "a cat", "right": side}, Limits(), opened)
    assert caught.value.name.startswith("right")


def opened(kind: str, token: str) -> Path:
    raise BadField("open", f"That {kind} is no longer here.")


def test_the_form_has_every_option_of_the_command_line_and_reads_its_values():
    clip = {c.name for c in form.clip_controls()}
    assert clip | {"prompt"} == set(described(What))
    assert {c.name for c in form.side_controls(Limits())} | {"method"} == set(described(How))
    values = {
        "prompt": "a cat",
        "negative": "dogs",
        "seed": "7",
        "steps": 12,
        "size": "64x32",
        "frames": "9",
        "guidance": "2,5",
        "left": {"method": "dense", "keep": "0.3"},
        "right": {"method": "topk", "level": "fast", "keep": "0.07", "step_cache": "0.05"},
    }
    ask = form.read(json.loads(json.dumps(values)), Limits(), opened)
    what = ask.what
    assert (what.seed, what.steps, what.frames, what.guidance) == (7, 12, 9, 2.5)
    assert ask.size == (64, 32) and what.negative == "dogs"
    assert config_of(ask.left) is None and ask.left.boost().step_cache is None
    assert config_of(ask.right).method.keep == 0.07
    assert label(ask.right) == "topk, keep 0.07, step cache 0.05"


def test_a_public_page_runs_only_the_operators_models_and_reads_none_of_its_files():
    limits = Limits.for_public(("name/model",))
    assert Ask(What("a cat"), limits=limits, model="name/model").model == "name/model"
    for model in ("other/model", "/etc", "../secret"):
        with pytest.raises(BadField, match="public"):
            Ask(What("a cat"), limits=limits, model=model)
    with pytest.raises(BadField, match="from 16 to 512"):
        Ask(What("a cat", size="1280x16"), limits=limits)
    named = ("select", "learned\t(/etc/passwd)"), ("sort", "per-head\xa0(/etc/passwd)")
    for name, value in named:
        with pytest.raises(BadField, match="name no file"):
            form.read({"prompt": "a cat", "right": {"method": "topk", name: value}}, limits, opened)
    for name, value in (("lora", "/etc"), ("heads", "/etc/passwd@0.1"), ("compile", True)):
        side = {"method": "topk", name: value}
        with pytest.raises(BadField):
            form.read({"prompt": "a cat", "right": side}, limits, opened)
    assert not any(k.value.startswith("preset:") for k in form.kinds(limits))


def test_a_public_page_refuses_what_a_preset_resolves_to(tmp_path):
    limits, path = Limits.for_public(), tmp_path / "sent.json"
    path.write_text(json.dumps({"method": {"name": "topk"}, "dense": "auto"}))
    with pytest.raises(BadField, match="no backend of dense attention"):
        Ask(What("a cat"), right=How(str(path)), limits=limits)
    assert Ask(What("a cat"), right=How(str(path))).right.method == str(path)


def test_a_first_picture_tells_nothing_of_the_servers_folders(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "sent.png")
    request = other(ASK, image=tmp_path / "sent.png").request()
    assert request.image.size == (16, 16) and request.image.filename == "picture.png"


def test_the_product_of_tokens_and_steps_is_bounded():
    big = other(ASK, size="1280x1280", frames=129, steps=100)
    tokens = tokens_of(big, (16, 4))
    assert tokens == 80 * 80 * 33
    with pytest.raises(BadField, match="211,200 tokens × 100 steps = 21,120,000"):
        check_work(big, tokens)
    small = other(ASK, size="128x128", frames=9)
    check_work(small, tokens_of(small, (16, 4)))
    assert tokens_of(small, (16, 4)) == 3 * 8 * 8
    words = ["1 s", "59 s", "1 min 40 s", "2 h 10 min"]
    assert [duration(s) for s in (0.2, 59, 100, 7800)] == words


def test_a_models_own_defaults_are_filled_in():
    full = ASK.filled(DEFAULTS)
    assert full.size == (128, 128) and full.what.frames == 9 and full.what.steps == 4
    few = other(ASK, steps=None, sampler="rcm").filled(replace(DEFAULTS, num_inference_steps=50))
    assert few.what.steps == 4
    assert replace(ASK, right=SPARSE) == ASK
