"""evaluate, tune, finetune and bench: refused before the model is loaded, and nothing left."""

import pytest

from dit_accel.cli import main as cli
from dit_accel.cli import session
from dit_accel.finetune import run as training
from dit_accel.generation import loading

LIES = [
    (["evaluate", "-o", "out", "--seeds", "-1"], "seed lies from 0"),
    (["evaluate", "-o", "out", "--limit", "-5"], "limit is a number of cells"),
    (["evaluate", "-o", "out", "--minutes", "nan"], "minutes is a finite number"),
    (["evaluate", "-o", "out", "--keeps", "nan"], "keep is a finite number"),
    (["evaluate", "-o", "out", "--keeps", "2"], "lies in (0, 1]"),
    (["evaluate", "-o", "out", "--batch", "0"], "batch is a number of clips"),
    (["evaluate", "-o", "out", "--size", "0x0"], "height lies from 16"),
    (["evaluate", "-o", "out", "--warmup", "nan"], "warmup is a finite number"),
    (["evaluate", "-o", "out", "--prompts", "."], "is a folder"),
    (["evaluate", "-o", "note.txt"], "is a file"),
    (["evaluate", "-o", "/proc/out"], "cannot be written"),
    (["evaluate", "-o", "mine"], "table.md was not written by this command"),
    (["tune", "-o", "out", "--psnr", "30", "--trials", "0"], "trials is a number"),
    (["tune", "-o", "out", "--psnr", "nan"], "psnr is a finite number"),
    (["tune", "-o", "out", "--psnr", "30", "--keeps", "0"], "lies in (0, 1]"),
    (["tune", "-o", "out", "--psnr", "30", "--warmups", "3.5"], "warmup is a share"),
    (["tune", "-o", "out", "--psnr", "30", "--methods", "magic"], "unknown method"),
    (["tune", "-o", "out", "--psnr", "30", "--seeds", "0.5"], "seeds is a comma-separated"),
    (["tune", "-o", "mine", "--psnr", "30"], "preset.json was not written by this command"),
    (["finetune", "-o", "out", "--weight-decay", "nan"], "weight_decay is a finite number"),
    (["finetune", "-o", "out", "--lr-projection", "inf"], "lr_projection is a finite number"),
    (["finetune", "-o", "out", "--ema", "nan"], "ema is a finite number"),
    (["finetune", "-o", "out", "--prompts", "none.txt"], "there is no prompt file none.txt"),
    (["finetune", "-o", "out", "--seed", "9" * 30], "seed lies from 0"),
    (["tune", "-o", "out", "--psnr", "30", "--methods", ""], "methods names none"),
    (["evaluate", "-o", "out", "--size", ""], "size is WIDTHxHEIGHT"),
    (["finetune", "-o", "mine"], "was not written by this command"),
    (["finetune", "-o", "note.txt"], "is a file"),
    (["profile", "a cat", "--step-cache", "0.1"], "profile looks at a dense generation"),
    (["profile", "a cat", "--speed", "fast"], "profile looks at a dense generation"),
    (["profile", "a cat", "--method", "dense", "--prune", "0.5"], "profile looks at a dense"),
    (["profile", "a cat", "-o", "note.txt"], "is there and is no profile of ours"),
    (["profile", "a cat", "-o", "/proc/p.json"], "cannot be written"),
    (["generate", "a cat", "--method", "topk", "--refresh", "2"], "refresh is for methods that"),
    (["generate", "a cat", "--keep", "0.8", "--heads", "p.json@0.2"], "heads names a keep of its"),
    (["doctor", "--config-only", "--size", "0x0"], "height lies from 16"),
    (["doctor", "--config-only", "--frames", "-5"], "frames lies from 1"),
    (["doctor", "--config-only", "--steps", "0"], "steps lies from 1"),
    (["doctor", "--device", "meta"], "holds no numbers"),
    (["app", "--port", "99999"], "port lies from 1 to 65535"),
    (["bench", "--out", "/proc/x.json"], "cannot be written"),
    (["show", "."], "is a folder"),
]


@pytest.mark.parametrize(("arguments", "says"), LIES, ids=lambda x: " ".join(x)[:60])
def test_bad_values(here, capsys, monkeypatch, arguments, says):
    def never(*args, **options):
        raise AssertionError("the model is loaded")

    for module in (session, training, loading):
        monkeypatch.setattr(module, "load_pipeline", never)
    (here / "note.txt").write_text("mine")
    (here / "mine" / "transformer").mkdir(parents=True)
    for name in ("table.md", "preset.json"):
        (here / "mine" / name).write_text("mine")
    before = sorted(here.rglob("*"))
    assert cli.run(arguments) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
    assert sorted(here.rglob("*")) == before
    assert (here / "mine" / "table.md").read_text() == "mine"


def test_somebodys_notes_are_not_cut(here, capsys, model):
    (here / "dir").mkdir()
    (here / "dir" / "cells.jsonl").write_text("my notes, no newline")
    assert cli.run(["evaluate", "-o", "dir", "--model", model, "--limit", "1"]) == 2
    assert "cells.jsonl" in capsys.readouterr().err
    assert (here / "dir" / "cells.jsonl").read_text() == "my notes, no newline"
    assert [path.name for path in (here / "dir").iterdir()] == ["cells.jsonl"]
