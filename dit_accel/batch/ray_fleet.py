"""Workers on a Ray cluster: its machines share the folder, and Ray says where there is room."""

from __future__ import annotations

from typing import Any

from dit_accel.batch.child import serve
from dit_accel.batch.fleet import FALSE_STARTS
from dit_accel.batch.manifest import Manifest
from dit_accel.batch.worker import DISK_FULL, NO_MODEL
from dit_accel.batch.writer import FULL

LOCAL = "local"


class RayFleet:
    """`count` workers, each with one GPU of the cluster or, where there is none, one CPU; 0 is as
    many as the cluster has GPUs, or one.

    address: of the cluster ("auto", "ray://host:10001"), or "local" to start one on this machine.
    A worker that dies is replaced; its jobs go back to the queue, on another machine once it has
    not been heard of for a minute. Raises ValueError without Ray or a cluster that answers.
    """

    def __init__(self, manifest: Manifest, count: int, address: str, device: str | None) -> None:
        self.manifest, self.stopped = manifest, ""
        self.ray = _ray()
        self._mine = not self.ray.is_initialized()
        if self._mine:
            _join(self.ray, address)
        gpus = 0 if device == "cpu" else int(self.ray.cluster_resources().get("GPU", 0))
        self.count = count or gpus or 1
        room = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        # a process of its own for each worker: what it leaves on the device goes with it
        self._serve = self.ray.remote(max_retries=0, max_calls=1, **room)(serve)
        self.device = device or "auto"
        self._false_starts, self._seen = 0, 0
        self._done_before = manifest.counts()["done"]
        self._working: dict[Any, int] = {}

    def __enter__(self) -> RayFleet:
        for number in range(self.count):
            self._start(number)
        return self

    def __exit__(self, *error: object) -> None:
        for task in self._working:
            self.ray.cancel(task, force=True)
        if self._mine:
            self.ray.shutdown()

    def _start(self, number: int) -> None:
        folder = str(self.manifest.folder.absolute())
        self._working[self._serve.remote(folder, self.device, 0)] = number

    def tend(self) -> bool:
        """Replace the dead; False once no worker is left."""
        tasks = list(self._working)
        done, _ = self.ray.wait(tasks, num_returns=len(tasks), timeout=0)
        for task in done:
            self._ended(task, self._working.pop(task))
        return bool(self._working)

    def _ended(self, task: object, number: int) -> None:
        try:
            code = self.ray.get(task)
            reason = f"its worker ended with code {code}"
        except self.ray.exceptions.RayError as error:
            code, reason = None, f"its worker died: {str(error).strip().splitlines()[0]}"
        if code == DISK_FULL:
            self.stopped = FULL
        if code in (0, DISK_FULL, NO_MODEL):
            return
        self.manifest.note("worker", f"worker {number}: {reason}")
        before, self._seen = self._seen, self._progress()
        self._false_starts = 0 if self._seen > before else self._false_starts + 1
        counts = self.manifest.counts()
        if self._false_starts >= FALSE_STARTS:
            if self.manifest.counts()["done"] == self._done_before:
                raise ValueError(f"workers do not start: {reason}")
            self.stopped = f"workers do not start: {reason}"
        elif counts["waiting"] + counts["running"] and self.manifest.get("stop") is None:
            self._start(number)

    def _progress(self) -> int:
        """Grows with all that workers do."""
        return self.manifest.ask("SELECT COUNT(*) AS n FROM events WHERE kind <> 'worker'")[0]["n"]


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("working on a Ray cluster needs Ray: pip install ray") from None
    return ray


def _join(ray: Any, address: str) -> None:
    where = {"include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(**where, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no Ray cluster answers at {address!r}: {why}") from None
