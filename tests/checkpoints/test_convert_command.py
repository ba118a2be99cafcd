"""`dit-accel convert`: what it writes and says; the folder is what load_checkpoint reads."""

import checkpoint_layouts as layouts
import pytest
import torch

import dit_accel
from dit_accel.cli import main as cli


def test_a_folder_and_what_to_do_with_it(tmp_path, capsys):
    pipe = layouts.trained()
    strange = {"epoch": 3, "blocks.0.self_attn.extra": torch.zeros(3)}
    learned = layouts.projections(pipe) | strange
    path = layouts.turbowan(tmp_path / "TurboWan2.1.pth", pipe, learned)
    out = tmp_path / "folder"
    assert cli.run(["convert", str(path), "-o", str(out), "--dtype", "kept"]) == 0
    said = capsys.readouterr().out
    assert "TurboWan, weights" in said and "unused: epoch" in said
    assert f"--method {out / 'preset.json'}" in said and "--sampler rcm:80" in said
    other = layouts.base()
    found = dit_accel.load_checkpoint(other, out)
    assert (found.missing, found.sampler, found.config.method.keep) == ([], "rcm:80", 0.1)
    assert found.unused == ["epoch", "blocks.0.attn1.extra"]  # a model tells what has no place
    assert all(
        torch.equal(mine, pipe.transformer.state_dict()[name])
        for name, mine in other.transformer.state_dict().items()
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.pth", "-o", "x"], "none.pth"),
        (["none.pth", "-o", "x", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["none.pth"], "--output"),
    ],
)
def test_one_sentence_for_what_cannot_be(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["convert", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
