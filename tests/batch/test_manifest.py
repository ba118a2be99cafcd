"""The queue: one owner a job, fenced claims, dead owners, resuming, damage."""

import multiprocessing
import os
import sqlite3
import threading

import pytest

from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import DEATHS, DiskFull, Manifest
from dit_accel.media import owner as owners

ELSEWHERE = "another-host/boot/pid:1:2"


def jobs(count, **values):
    return [(n, Job(f"prompt {n}", **values)) for n in range(1, count + 1)]


@pytest.fixture
def manifest(tmp_path):
    found = Manifest(tmp_path)
    yield found
    found.close()


def kinds(manifest):
    return [row["kind"] for row in manifest.ask("SELECT kind FROM events ORDER BY seq")]


def test_claims_are_exclusive_across_threads(manifest, tmp_path):
    manifest.plan(jobs(40))
    taken = []

    def work():
        mine = Manifest(tmp_path)
        while rows := mine.claim(owners.me()):
            taken.extend(row.id for row in rows)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(taken) == len(set(taken)) == 40


def test_equal_shapes_are_claimed_together(manifest):
    manifest.plan([*jobs(3, steps=2), (4, Job("other", steps=3)), (5, Job("last", steps=2))])
    assert len(manifest.claim(owners.me(), 8)) == 4
    assert len(manifest.claim(owners.me(), 8)) == 1


def test_an_older_claim_changes_nothing(manifest):
    manifest.plan(jobs(1))
    [old] = manifest.claim(ELSEWHERE)
    manifest.bury(ELSEWHERE, "gone")
    [new] = manifest.claim(ELSEWHERE)
    assert not manifest.finish(old, ELSEWHERE, "old.mp4", 1.0, {})
    manifest.fail(old, ELSEWHERE, "old")
    assert manifest.finish(new, ELSEWHERE, "new.mp4", 1.0, {})
    assert not manifest.finish(new, ELSEWHERE, "again.mp4", 1.0, {})
    assert manifest.ask("SELECT file FROM jobs")[0]["file"] == "new.mp4"


def test_jobs_of_the_dead_go_to_others(manifest):
    manifest.plan(jobs(1))
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: Manifest(manifest.folder).claim(owners.me()))
    child.start()
    child.join()
    [row] = manifest.claim(owners.me())
    assert row.turn == 2
    assert kinds(manifest) == ["started", "lost", "started"]


def test_a_live_process_here_keeps_its_jobs_and_a_silent_one_elsewhere_does_not(tmp_path):
    manifest = Manifest(tmp_path, lease=-1.0)
    manifest.plan(jobs(1))
    assert manifest.claim(owners.me())
    assert not manifest.claim("somebody/else/pid:3:4")
    manifest.release(owners.me(), "stopped")
    assert manifest.claim(ELSEWHERE)
    assert manifest.claim(owners.me())


def test_a_reused_process_id_is_not_its_former_owner():
    host, pid, start = owners.me().rsplit(":", 2)
    assert owners.is_alive(f"{host}:{pid}:{start}")
    assert not owners.is_alive(f"{host}:{pid}:{float(start) + 60}")
    assert owners.pid_of(owners.me()) == os.getpid()


def test_retries_are_counted_and_go_to_the_end_of_the_queue(manifest):
    manifest.plan(jobs(2))
    me = owners.me()
    [first] = manifest.claim(me)
    manifest.fail(first, me, "bad luck", retries=1)
    [second] = manifest.claim(me)
    assert second.id != first.id
    [again] = manifest.claim(me)
    manifest.fail(again, me, "worse luck", retries=1)
    assert not manifest.claim(me)
    [row] = manifest.ask("SELECT error FROM jobs WHERE state = 'failed'")
    assert row["error"] == "worse luck"
    assert manifest.counts() == {"waiting": 0, "running": 1, "done": 0, "failed": 1}


def test_a_job_that_kills_its_workers_is_failed(manifest):
    manifest.plan(jobs(1))
    for _ in range(DEATHS):
        assert manifest.claim(ELSEWHERE)
        manifest.bury(ELSEWHERE, "killed by signal 9")
    assert not manifest.claim(ELSEWHERE)
    assert f"({DEATHS} times on this job)" in manifest.ask("SELECT error FROM jobs")[0]["error"]


def test_planning_again_keeps_what_is_done_and_drops_what_is_not_asked_for(manifest):
    manifest.plan(jobs(4))
    me = owners.me()
    for state in ("done", "gone", "failed"):
        [row] = manifest.claim(me)
        if state == "failed":
            manifest.fail(row, me, "no")
            continue
        if state == "done":
            (manifest.folder / "1.mp4").write_bytes(b"clip")
        manifest.finish(row, me, "1.mp4" if state == "done" else "2.mp4", 1.0, {})
    manifest.plan(jobs(3))
    assert manifest.counts() == {"waiting": 1, "running": 0, "done": 1, "failed": 1}
    assert "2.mp4 is gone" in manifest.ask("SELECT text FROM events WHERE kind = 'again'")[0][0]
    manifest.plan(jobs(3), retry_failed=True)
    assert manifest.counts()["failed"] == 0


def test_a_name_that_another_clip_has(manifest):
    manifest.plan([(1, Job("a", name="clip"))])
    [row] = manifest.claim(owners.me())
    (manifest.folder / "clip.mp4").write_bytes(b"clip")
    manifest.finish(row, owners.me(), "clip.mp4", 1.0, {})
    with pytest.raises(ValueError, match="line 2: clip is the name of another clip"):
        manifest.plan([(2, Job("b", name="clip"))])
    assert manifest.counts()["done"] == 1


def test_files_that_are_no_manifest(tmp_path):
    (tmp_path / "manifest.sqlite").write_bytes(b"not a database, but long enough to be looked at")
    with pytest.raises(ValueError, match="move it away to start anew"):
        Manifest(tmp_path)


def test_a_later_version_is_refused(tmp_path):
    sqlite3.connect(tmp_path / "manifest.sqlite").execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="version 99"):
        Manifest(tmp_path)


def test_no_space_is_one_error_and_leaves_the_books_whole(manifest):
    manifest.plan(jobs(1))
    pages = manifest.ask("PRAGMA page_count")[0][0]
    manifest.ask(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull):
        for _ in range(1000):
            manifest.note("filler", "x" * 1000)
    manifest.ask("PRAGMA max_page_count = 100000")
    assert manifest.ask("PRAGMA integrity_check")[0][0] == "ok"
    assert manifest.claim(owners.me())
