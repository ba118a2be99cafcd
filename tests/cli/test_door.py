"""What a user may type, and what comes back: any letters, any encoding, one sentence, its code."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest

from dit_accel.cli import main as cli
from dit_accel.cli.options import BadInput
from dit_accel.cli.screen import screen
from dit_accel.generation import loading
from dit_accel.media import metadata, video
from dit_accel.media.pictures import read_picture

QUICK = ["--method", "dense", "--device", "cpu"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("prompt", ["rocket [/b] on blue", "[bold]a cat[/bold] :cat:", "[/]"])
def test_brackets_are_letters(here, model, capsys, prompt):
    assert cli.run(["generate", prompt, "--model", model, "-o", "[red]a[x].mp4", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "[red]a[x].mp4" in out and "[red]a[x].mp4" in names(here)
    assert "[bold]" not in prompt or "'[bold]a', 'cat[/bold]'" in err
    assert cli.run(["compare", prompt, "--model", model, "-o", "[b]out", *QUICK]) == 0
    assert "[b]out/" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_streams_of_any_encoding(here, model, encoding):
    """Letters that the terminal does not have cost the user nothing."""
    command = [sys.executable, "-m", "dit_accel", "generate", "红 кот é ×", "--model", model]
    done = forked.run([*command, *QUICK], {**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert names(here) == ["红-кот-é.mp4"]
    assert "Traceback" not in done.stderr


def test_prompts_of_any_script_have_files_of_their_own(here, model):
    prompts = ["красный кот", "синий пёс", "红色的猫", "🚀", "🐱", "🚀"]
    for prompt in prompts:
        assert cli.run(["generate", prompt, "--model", model, *QUICK]) == 0
    assert names(here) == sorted(
        ["красный-кот.mp4", "синий-пёс.mp4", "红色的猫.mp4", "clip.mp4", "clip-2.mp4"]
    )
    assert metadata.read(here / "clip-2.mp4")["prompt"] == "🐱"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "x.png", "--frames", "5"], "the name of a clip ends in"),
        (["-o", "x.mp4", "--frames", "1"], "the name of a picture ends in"),
        (["-o", "x.png"], "the name of a clip ends in"),
        (["-o", "猫" * 90 + ".mp4"], "bytes, at most 255"),
        (["-o", "/proc/x.mp4"], "cannot be written to"),
        (["--image", "n" * 300], "File name too long"),
        (["--method", "topk:"], "has no preset ''"),
        (["--method", "n" * 300 + ".json"], "File name too long"),
        (["--device", "meta"], "holds no numbers"),
        (["--guidance", "nan"], "guidance is a finite number, not nan"),
        (["--fps", "inf"], "fps lies from 1 to 240, not inf"),
        (["--step-cache", "inf"], "step_cache is a finite number"),
        (["--lora", "none"], "there is no LoRA"),
        (["--seed", "9" * 30], "seed lies from 0"),
    ],
)
def test_refused_before_the_work(here, model, capsys, arguments, says):
    assert cli.run(["generate", "a cat", "--model", model, *QUICK[2:], *arguments]) == 2
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and says in told[0] and "Traceback" not in err
    assert names(here) == []


def test_a_clip_that_cannot_be_written_at_the_end(here, model, capsys, monkeypatch):
    save = video.save

    def gone(path, *rest):
        if Path(path).name == path.name == "x.mp4" and Path(path).parent == Path():
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, *rest)

    monkeypatch.setattr(video, "save", gone)
    assert cli.run(["generate", "a cat", "--model", model, "-o", "x.mp4", *QUICK]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err
    kept = Path(err.strip().split(" is in ")[1])
    assert metadata.read(kept)["prompt"] == "a cat"
    kept.unlink()
    kept.parent.rmdir()


def test_somebody_elses_files_are_left_alone(here, model, capsys):
    (here / "out").mkdir()
    (here / "out" / "report.html").write_text("mine")
    assert cli.run(["compare", "a cat", "--model", model, "-o", "out", *QUICK]) == 2
    assert "report.html was not written by this command" in capsys.readouterr().err
    assert (here / "out" / "report.html").read_text() == "mine"
    for _ in range(2):  # our own are replaced
        assert cli.run(["compare", "a cat", "--model", model, "-o", "mine", *QUICK]) == 0


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_cut_off_are_named(here, tmp_path_factory, model, capsys, part):
    broken = tmp_path_factory.mktemp("broken") / "wan"
    shutil.copytree(model, broken)
    (weights,) = (broken / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.run(["generate", "a cat", "--model", str(broken), *QUICK]) == 2
    err = capsys.readouterr().err
    assert str(weights) in err and "cut off or damaged" in err and "Traceback" not in err
    assert names(here) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"_class_name": "WanPipeline", "transformer": {"a": 1}}', "transformer .* is a list"),
        ("[" * 99999, "not usable: nested|not JSON"),
        ('{"_class_name": 3}', "_class_name in .* is a text, not 3"),
        ("[]", "not an object"),
        ("\xff", "model_index.json"),
    ],
)
def test_models_whose_index_is_none(here, capsys, text, says):
    (here / "m").mkdir()
    (here / "m" / "model_index.json").write_text(text, encoding="latin-1")
    assert cli.run(["generate", "a cat", "--model", "m"]) == 2
    err = capsys.readouterr().err
    assert re.search(says, err) and err.count("\n") == 1 and "model_index.json" in err


class Coded(RuntimeError):
    exit_code = 7


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (BadInput("no"), 2, "error: no"),
        (Coded("own"), 7, "error: own"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (MemoryError(), 1, "the memory is full"),
        (RuntimeError("CUDA out of memory"), 1, "the memory is full"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exceptions_bring_their_exit_code(monkeypatch, capsys, error, code, says):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(cli, "app", broken)
    assert cli.run([]) == code
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_a_reader_that_has_seen_enough(here):
    done = subprocess.run(
        f"{sys.executable} -m dit_accel methods | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_the_screen_shows_letters_as_they_are(capsys):
    screen().print("[bold]x[/y] :cat: " + "long " * 60)
    assert capsys.readouterr().out.startswith("[bold]x[/y] :cat: long")


def test_show_gives_the_facts_and_the_lines_that_make_the_clip_again(here, model, capsys):
    options = ["--seed", "5", "--method", "topk:fast", "--warmup", "1", "--min-tokens", "0"]
    run = ["generate", "a [red] cat", "--model", model, "--negative", "fog", "-o", "a.png"]
    run += ["--frames", "1"]
    assert cli.run([*run, *options, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert cli.run(["show", "a.png"]) == 0
    said = capsys.readouterr().out
    for words in ("a [red] cat", "fog", "seed      5", model, "topk", "keep 0.3", "dit-accel"):
        assert words in said
    assert cli.run(["show", "a.png", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["method"]["name"] == "topk" and facts["arguments"]["height"] == 32
    assert facts["negative_prompt"] == "fog" and facts["fps"] == 8
    lines = said[said.index("import torch") :]
    space = {}
    exec(lines.replace("output = pipe(", 'output = pipe(output_type="np",'), space)
    again = (space["output"].frames[0].clip(0, 1) * 255).round().astype("uint8")
    assert np.array_equal(again, np.asarray(read_picture("a.png"))[None])


def test_show_refuses_what_says_nothing(here, model, capsys):
    run = ["generate", "a cat", "--model", model, "-o", "a.mp4", "--no-metadata", *QUICK]
    assert cli.run(run) == 0
    (here / "b.mp4").write_text("hello")
    capsys.readouterr()
    for name, says in (("a.mp4", "says nothing"), ("b.mp4", "cannot be"), ("c.mp4", "there is no")):
        assert cli.run(["show", name]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


def test_a_device_must_be_there():
    for device in ("meta", "xla", "hpu", "cuda:99"):
        with pytest.raises(ValueError, match=r"device"):
            loading.pick_device(device)
