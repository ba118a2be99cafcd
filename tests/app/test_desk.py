"""Jobs, their files and records, who may cancel what, stored examples."""

import json
from dataclasses import replace

import pytest
from asks import ASK, SPARSE
from typed import NASTY, shown_as_text

from dit_accel.app import examples, outcome, stage, views
from dit_accel.app.desk import KEPT, Desk
from dit_accel.app.stop import Cancelled


def test_the_desk_writes_only_in_its_folder(studio, tmp_path):
    desk = Desk(studio, tmp_path / "jobs")
    found = list(desk.serve("ann", ASK))
    value, html = found[-1]
    assert html and all(text is None for _, text in found[:-1])
    (folder,) = (tmp_path / "jobs").iterdir()
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *(f"{side}.{kind}" for side in stage.SIDES for kind in ("mp4", "json", "py")),
        "side_by_side.mp4",
        outcome.RECORD,
    }
    assert value["left"]["src"] == f"gradio_api/file={folder}/left.mp4"
    assert value["frames"] == 9 and value["fps"] == 8
    assert all(name in html for name in names)


def test_the_record_reproduces_the_run(alone, tmp_path):
    from dit_accel import AccelConfig

    data = outcome.record(alone, tmp_path)
    assert json.loads((tmp_path / outcome.RECORD).read_text())["right"]["cells"]
    config = AccelConfig.from_dict(json.loads((tmp_path / "right.json").read_text()))
    assert config == SPARSE.config()
    script = (tmp_path / "right.py").read_text()
    compile(script, "right.py", "exec")
    assert "dit_accel.accelerate(pipe, " in script and "a red rocket" in script
    assert "keep=0.3" in script
    assert len(data["quality"]["psnr"]) == 9
    assert "/" not in data["left"]["clip"]


def test_a_visitors_new_job_ends_the_one_before(studio, tmp_path):
    desk = Desk(studio, tmp_path)
    first = desk.serve("ann", ASK)
    next(first)
    second = desk.serve("ann", replace(ASK, steps=1))
    next(second)
    with pytest.raises(Cancelled):
        list(first)
    assert list(second)[-1][1]
    desk.cancel("ann")  # nothing runs: nothing happens
    desk.cancel("bob")


def test_cancel_reaches_only_the_visitor_who_asked(studio, tmp_path):
    desk = Desk(studio, tmp_path)
    job = desk.serve("ann", replace(ASK, steps=1))
    next(job)
    desk.cancel("bob")
    assert list(job)[-1][1]
    job = desk.serve("ann", ASK)
    next(job)
    desk.cancel("ann")
    with pytest.raises(Cancelled):
        list(job)


def test_old_files_are_removed(studio, tmp_path):
    desk = Desk(studio, tmp_path)
    folders = [desk._new_folder() for _ in range(KEPT + 3)]
    assert [f.exists() for f in folders] == [False] * 3 + [True] * KEPT


def test_what_visitors_type_is_shown_and_never_run(alone, tmp_path):
    pages = []
    for prompt in (NASTY, "a cat"):
        data = outcome.record(replace(alone, ask=replace(alone.ask, prompt=prompt)), tmp_path)
        data |= {"model": prompt}
        pages.append(views.results(data, "base"))
    assert shown_as_text(*pages)
    assert shown_as_text(views.alert(ValueError(f"x{NASTY}")), views.alert(ValueError("no")))
    assert views.alert(ValueError("no")) == "<p role=alert>No.</p>"
    assert "KeyError" in views.alert(KeyError(NASTY)) and "raw" not in views.alert(KeyError(NASTY))


def test_stored_examples_are_whole_and_small():
    stored = examples.stored()
    assert set(stored) == set(examples.PAIRS)
    for name, record in stored.items():
        folder = examples.FOLDER / name
        files = [record["both"], *(record[s]["clip"] for s in stage.SIDES)]
        assert all((folder / file).is_file() for file in files)
        assert 'class="heat"' in views.results(record, "base")
    size = sum(p.stat().st_size for p in examples.FOLDER.rglob("*") if p.is_file())
    assert size <= 1.5 * 2**20


def test_an_unknown_example_is_named(studio):
    with pytest.raises(ValueError, match="no example 'zebra'"):
        examples.make(studio, ["zebra"])
