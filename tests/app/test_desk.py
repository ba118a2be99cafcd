"""Jobs, places in the queue, their files and records, stored examples."""

import errno
import json
import threading
import time
from dataclasses import replace

import imageio.v3 as iio
import pytest
from asks import ASK, DENSE, SPARSE, other, small_studio
from typed import NASTY, shown_as_text

from dit_accel.app import catalog, examples, outcome, pairs, stage, views
from dit_accel.app.ask import BadField, Limits, config_of
from dit_accel.app.cost import Pace
from dit_accel.app.desk import KEPT, Desk, Full, sentence
from dit_accel.app.stop import Cancelled
from dit_accel.media import metadata


@pytest.fixture
def desk(studio, tmp_path):
    found = Desk(studio, tmp_path / "jobs", Limits(queue=3, places=2))
    found.start(warm=False)
    yield found
    found.stop()


def finished(desk, *asks, client="ann"):
    jobs = [desk.submit(ask, {"prompt": ask.what.prompt}, client) for ask in asks]
    until(lambda: all(job.over for job in jobs))
    return jobs


def until(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_clips_that_carry_nothing_have_the_models_frames_a_second(studio, tmp_path):
    studio.metadata = False
    desk = Desk(studio, tmp_path / "jobs")
    desk.start(warm=False)
    try:
        (job,) = finished(desk, ASK)
        clips = [job.folder / f"{name}.mp4" for name in ("left", "right", "side_by_side")]
        assert {round(iio.immeta(clip)["fps"]) for clip in clips} == {job.record["fps"]} == {8}
    finally:
        studio.metadata = True
        desk.stop()


def test_the_desk_writes_only_in_its_folder(desk, tmp_path):
    (job,) = finished(desk, ASK)
    assert job.state == "done", job.note
    (folder,) = (tmp_path / "jobs").iterdir()
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *(f"{side}.{kind}" for side in stage.SIDES for kind in ("mp4", "json", "py")),
        "side_by_side.mp4",
        "right-attention.json",
        outcome.RECORD,
    }
    assert job.value["left"]["src"] == f"jobs/{job.id}/files/left.mp4"
    assert job.value["frames"] == 9 and job.value["fps"] == 8
    made = metadata.read(job.folder / "right.mp4")
    assert made["prompt"] == ASK.what.prompt and made["config"]["method"]["keep"] == 0.3
    html = views.results(job.record, job.base)
    assert all(name in html for name in names - {"right-attention.json"})
    assert job.value["right"]["attention"].endswith("right-attention.json")
    assert str(tmp_path) not in html + json.dumps(job.value)


def test_the_record_reproduces_the_run(alone, tmp_path):
    from dit_accel import AccelConfig

    data = outcome.record(alone, tmp_path, {"prompt": "a red rocket"})
    assert json.loads((tmp_path / outcome.RECORD).read_text())["right"]["cells"]
    config = AccelConfig.from_dict(json.loads((tmp_path / "right.json").read_text()))
    assert config == config_of(SPARSE)
    script = (tmp_path / "right.py").read_text()
    compile(script, "right.py", "exec")
    assert "dit_accel.accelerate(pipe, " in script and "a red rocket" in script
    assert "keep=0.3" in script
    assert len(data["quality"]["psnr"]) == 9 and data["asked"] == {"prompt": "a red rocket"}
    assert "/" not in data["left"]["clip"]


def test_places_belong_to_addresses_and_waiters_see_theirs(desk):
    slow = other(ASK, steps=60)
    first = desk.submit(slow, {}, "ann")
    until(lambda: first.state == "running")
    second, third = (desk.submit(ASK, {}, "ann") for _ in range(2))
    with pytest.raises(Full, match="2 of your runs are waiting already"):
        desk.submit(ASK, {}, "ann")
    fourth = desk.submit(ASK, {}, "bob")
    with pytest.raises(Full, match="The queue is full: 3 are waiting"):
        desk.submit(ASK, {}, "cat")
    assert [desk.place(job)[0] for job in (second, third, fourth)] == [1, 2, 3]
    assert desk.place(fourth)[1] > desk.place(second)[1] > 0
    desk.cancel(second)
    assert second.state == "cancelled" and desk.place(third)[0] == 1
    desk.cancel(first)
    until(lambda: first.state == "cancelled")
    until(lambda: fourth.over and third.over)
    assert (third.state, fourth.state) == ("done", "done")


def test_a_run_that_nobody_follows_ends(studio, tmp_path):
    desk = Desk(studio, tmp_path, grace=0.3)
    desk.start(warm=False)
    (job,) = finished(desk, other(ASK, steps=90))
    assert job.state == "cancelled"
    held = desk.submit(ASK, {}, "ann")
    with held.leash.held():
        until(lambda: held.over)
    assert held.state == "done"
    desk.stop()


def test_a_full_disk_keeps_the_clip_elsewhere(desk, monkeypatch, tmp_path):
    save = outcome.video.save
    monkeypatch.setattr("dit_accel.app.desk.elsewhere", lambda: made(tmp_path / "spare"))

    def full(path, *args):
        if desk.folder in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, *args)

    monkeypatch.setattr(outcome.video, "save", full)
    (job,) = finished(desk, ASK)
    assert job.state == "done" and job.folder == tmp_path / "spare"
    assert (job.folder / "left.mp4").is_file()
    monkeypatch.setattr("dit_accel.app.desk.elsewhere", lambda: None)
    (job,) = finished(desk, ASK)
    assert "No space left on device" in job.note and "make room" in job.note


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_old_files_are_removed(desk, monkeypatch):
    monkeypatch.setattr("dit_accel.app.desk.KEPT", 2)
    jobs = [finished(desk, other(ASK, steps=1))[0] for _ in range(4)]
    desk._forget()
    assert [job.folder.exists() for job in jobs] == [False, False, True, True]
    assert desk.job(jobs[0].id) is None and KEPT == 32


def test_what_a_visitor_sends_is_checked_and_kept_by_its_content(desk, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    token = desk.keep("picture", data)
    assert desk.opened("picture", token).is_file() and desk.keep("picture", data) == token
    preset = json.dumps(config_of(SPARSE).to_dict()).encode()
    assert desk.opened("preset", desk.keep("preset", preset)).suffix == ".json"
    for kind, bad, words in (
        ("picture", b"<svg/>", "it is no picture"),
        ("preset", b"[]", "not an object"),
        ("preset", b'{"method": {"name": "magic"}}', "unknown method"),
    ):
        with pytest.raises(BadField, match=words) as caught:
            desk.keep(kind, bad)
        assert str(tmp_path) not in str(caught.value)
    for token in ("../../etc/passwd", "0" * 32):
        with pytest.raises(BadField, match="no longer here"):
            desk.opened("preset", token)
    public = Desk(desk.studio, tmp_path / "public", Limits.for_public())
    with pytest.raises(BadField, match="weights"):
        public.keep("preset", b'{"method": {"name": "sla", "weights": "/etc/passwd"}}')
    for what in ("select", "sort"):
        for text in ("per-head\t(/none.json)", "learned( /etc/passwd)", "sub&per-head\xa0(x.json)"):
            with pytest.raises(BadField, match="names a file"):
                public.keep("preset", json.dumps({"method": {"name": "topk", what: text}}).encode())
    with pytest.raises(BadField, match="leaves it out"):
        public.keep("preset", b'{"method": {"name": "topk"}, "dense": "auto"}')
    assert public.keep("preset", b'{"method": {"name": "topk", "select": "sub"}}')


def test_what_visitors_type_is_shown_and_never_run(alone, tmp_path):
    pages = []
    for prompt in (NASTY, "a cat"):
        ask = other(alone.ask, prompt=prompt)
        data = outcome.record(replace(alone, ask=ask), tmp_path)
        data |= {"model": prompt}
        pages.append(str(views.results(data, "base")))
        pages.append(pairs.report(data, tmp_path))
    assert shown_as_text(pages[0], pages[2])
    assert NASTY not in pages[1]
    assert sentence(ValueError("no")) == "No."
    assert "KeyError" in sentence(KeyError(NASTY)) and "raw" not in sentence(KeyError(NASTY))


def test_any_two_clips_make_a_pair_and_a_report_is_one_file(desk):
    first, second = finished(desk, ASK, replace(ASK, left=SPARSE, right=DENSE))
    data = pairs.pair(
        (first.record, "left", first.folder, first.base),
        (second.record, "right", second.folder, second.base),
    )
    assert data["quality"]["psnr_mean"] == 100  # both are dense, from the same noise
    assert "identical" in views.headline(data) and "no attention skipped" in views.headline(data)
    html = views.results(data, "")
    assert f"{first.base}/left.mp4" in html and f"{second.base}/right.mp4" in html
    report = pairs.report(first.record, first.folder)
    assert report.count("data:video/mp4;base64,") == 2 and "Blocks kept in each layer" in report
    other_size = finished(desk, other(ASK, size="64x64"))[0]
    with pytest.raises(ValueError, match="differ in size"):
        pairs.pair(
            (first.record, "left", first.folder, ""),
            (other_size.record, "left", other_size.folder, ""),
        )


def test_numbers_that_stand_side_by_side_agree(desk):
    short = replace(ASK, right=replace(SPARSE, min_tokens=None))
    record = finished(desk, short)[0].record
    assert views.headline(record) == "no attention skipped, identical"
    assert "crossover" in views.too_short(record)
    assert 'data-fix="right.min_tokens"' in views.results(record, "")
    record = finished(desk, ASK)[0].record
    assert (
        views.too_short(record) == ""
        and "slower" in views.headline(record)
        or "faster" in (views.headline(record))
    )
    html = str(views.results(record, ""))
    assert "All blocks were read in 1 of 4 steps, 33% of them in the other 3." in html
    full = html.count("all blocks</title>")
    assert full == 1 * 2  # one warm step in each of two layers


def test_stored_examples_are_whole_small_and_hold_their_settings():
    from dit_accel.app import form

    stored = examples.stored()
    assert stored
    for name, record in stored.items():
        folder = examples.FOLDER / name
        files = [record["both"], *(record[s]["clip"] for s in stage.SIDES)]
        assert all((folder / file).is_file() for file in files)
        assert "<svg class=map" in views.results(record, "base")
        ask = form.read(record["asked"], Limits(), opened=None)
        for side, how in (("left", ask.left), ("right", ask.right)):
            assert record[side]["label"].split(",")[0].split("/")[0] in how.method
            keep = how.config().method.keep
            assert how.method == "dense" or f"keep {keep:g}" in record[side]["label"]
        assert record["prompt"] == ask.what.prompt
    size = sum(p.stat().st_size for p in examples.FOLDER.rglob("*") if p.is_file())
    assert size <= 3 * 2**20


def test_examples_are_planned_from_the_models_own_words(studio, monkeypatch):
    plans = examples.planned()
    words = catalog.card(None).words
    assert len(plans) == len(examples.SIDES)
    assert all(words.trouble(plan["prompt"]) is None for plan in plans.values())
    with pytest.raises(ValueError, match="no example 'zebra'"):
        examples.make(studio, ["zebra"])


def test_the_time_told_is_learnt_from_what_ran(pipe, tmp_path):
    studio = small_studio(pipe)
    full = studio.filled(ASK)
    assert not studio.plan(full).measured
    pair = studio.run(ASK, threading.Event())
    plan = studio.plan(full)
    took = pair.left.result.times.denoise
    assert plan.measured and plan.left == pytest.approx(took, rel=0.01)
    twice = studio.plan(studio.filled(other(ASK, steps=8)))
    assert twice.left == pytest.approx(2 * plan.left, rel=0.01)
    assert Pace().plan(full, (16, 4), studio._weight(ASK)).left > 0


def test_cancel_stops_a_wait_for_the_machine(studio):
    stop = threading.Event()
    stop.set()
    with studio._lock, pytest.raises(Cancelled):
        studio.run(ASK, stop)
