"""The thread that encodes and writes clips while the next one is generated."""

from __future__ import annotations

import errno
import os
import queue
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.batch.manifest import Claim, DiskFull, Manifest
from dit_accel.batch.render import Clip
from dit_accel.media import quality, video

FULL = "the disk is full: free some space and run the same command again"
RESERVE = 8 * 2**20  # bytes that stay free: the manifest must be able to say that the disk is full
POLL = 1.0


@dataclass(frozen=True)
class Finished:
    """A generated job: its clip, and the dense one it is held against, if any."""

    row: Claim
    clip: Clip
    dense: Clip | None = None


class Writer:
    """Takes `Finished` jobs; each is on disk, then in the manifest, in that order.

    At most two wait: frames of a long video are large. `stopped` says why nothing more is written.
    """

    def __init__(
        self, manifest: Manifest, owner: str, fps: float, retries: int, wait_for_space: float
    ) -> None:
        self.manifest, self.owner, self.fps = manifest, owner, fps
        self.retries, self.wait_for_space = retries, wait_for_space
        self.stopped = ""
        self._queue: queue.Queue[Finished | None] = queue.Queue(2)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what waits, unless the worker was interrupted."""
        if kind is not None and not issubclass(kind, Exception):
            self.stopped = self.stopped or "interrupted"
        self._queue.put(None)
        self._thread.join()

    def put(self, finished: Finished) -> None:
        """Hand a job over; waits while two are in line."""
        self._queue.put(finished)

    def await_space(self, bytes_needed: int = 0) -> bool:
        """Wait until there is space; False, and `stopped` is set, when it does not come."""
        needed, until, told = bytes_needed + RESERVE, time.monotonic() + self.wait_for_space, False
        while not self.stopped and shutil.disk_usage(self.manifest.folder).free < needed:
            if not told:
                self._tell(f"less than {needed >> 20} MiB free in {self.manifest.folder}: waiting")
                told = True
            if time.monotonic() >= until:
                self.stopped = FULL
            time.sleep(min(POLL, self.wait_for_space))
        return not self.stopped

    def _tell(self, text: str) -> None:
        try:
            self.manifest.note("disk-full", text, self.owner)
        except DiskFull:
            print(text, flush=True)

    def _run(self) -> None:
        while (finished := self._queue.get()) is not None:
            while not self.stopped:
                try:
                    self._write(finished)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        self._fail(finished, error)
                        break
                    self.await_space(finished.clip.pixels.nbytes)
                except Exception as error:  # the next job must not suffer from this one
                    self._fail(finished, error)
                    break

    def _write(self, finished: Finished) -> None:
        row, clip = finished.row, finished.clip
        report = {**clip.report, "size": list(clip.pixels.shape[:3])}
        if finished.dense is not None:
            report["drift"] = drift(finished.dense, clip)
            report["dense_file"] = self._save(f"{row.output}.dense", finished.dense)
        file = self._save(row.output, clip)
        self.manifest.finish(row, self.owner, file, clip.seconds, report)

    def _save(self, name: str, clip: Clip) -> str:
        """Written beside and renamed by `video.save`; here also on the platter before it counts."""
        file = self.manifest.folder / f"{name}{'.mp4' if len(clip.pixels) > 1 else '.png'}"
        video.save(file, clip.pixels, self.fps, clip.facts)
        _sync(file)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(file.parent)
        return file.name

    def _fail(self, finished: Finished, error: Exception) -> None:
        reason = f"its clip could not be written: {type(error).__name__}: {error}"
        try:
            self.manifest.fail(finished.row, self.owner, reason, self.retries)
        except DiskFull:
            self.stopped = FULL


def drift(dense: Clip, clip: Clip) -> dict[str, Any]:
    """How far a clip is from the dense one: PSNR in dB and SSIM (means), relative latent error."""
    near = quality.quality(dense.pixels, clip.pixels)
    found = {"psnr": near.psnr_mean, "ssim": near.ssim_mean, "seconds_dense": dense.seconds}
    if isinstance(dense.latents, torch.Tensor) and isinstance(clip.latents, torch.Tensor):
        found["latent_error"] = quality.latent_error(dense.latents, clip.latents)
    return found


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
