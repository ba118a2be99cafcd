"""A run on a full disk, and where a clip cannot be written."""

import errno
import shutil

import pytest
from small_batches import events, files, go

from dit_accel.batch.manifest import DiskFull, Manifest
from dit_accel.media import video


def test_a_full_disk_is_waited_out(pipe, tmp_path, monkeypatch):
    save, left = video.save, [2]

    def full(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(video, "save", full)
    assert go(pipe, tmp_path, [{"prompt": "a cat"}]).ok
    assert left == [0] and len(events(tmp_path, "started")) == 1


def test_a_disk_that_stays_full_stops_the_run_which_goes_on_later(pipe, tmp_path, monkeypatch):
    usage, jobs = shutil.disk_usage, [{"prompt": ["a cat", "a dog", "a star"]}]

    def filling(path):
        space = usage(path)
        return space._replace(free=space.free if not files(tmp_path) else 0)

    monkeypatch.setattr(shutil, "disk_usage", filling)
    summary = go(pipe, tmp_path, jobs)
    assert "the disk is full" in summary.stopped
    assert summary.done >= 1 and summary.failed == 0 and summary.done + summary.waiting == 3
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert go(pipe, tmp_path, jobs).ok
    assert len(files(tmp_path)) == 3


def test_a_clip_that_cannot_be_written_is_told(pipe, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(video, "save", broken)
    [failure] = go(pipe, tmp_path, [{"prompt": "a cat"}]).failures
    assert "could not be written: OSError: [Errno 5] Input/output error" in failure["error"]


def test_no_space_for_the_manifest_is_told_before_anything_runs(pipe, tmp_path):
    manifest = Manifest(tmp_path)
    jobs = [{"prompt": "a cat", "seed": list(range(200))}]

    def planless(self, *args, **kwargs):
        raise DiskFull(errno.ENOSPC, f"no space left for {self.path}")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no space left"):
        patch.setattr(Manifest, "plan", planless)
        go(pipe, tmp_path, jobs)
    assert manifest.counts()["done"] == 0
