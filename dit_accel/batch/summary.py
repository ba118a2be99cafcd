"""What came of a run: counts, failures with their reasons, drift, files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from dit_accel.batch.manifest import Manifest
from dit_accel.media.files import write_text

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Summary:
    """What came of the jobs that the last run asked for.

    folder: its path.
    done, failed, waiting: numbers of jobs.
    seconds: generation time of the finished jobs.
    failures: {id, line, output, error} each.
    refused: {line, reason} of the job file.
    drift: mean and worst over the jobs that also ran dense.
    stopped: why the run ended early, or "".
    """

    folder: str
    done: int
    failed: int
    waiting: int
    seconds: float
    failures: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    drift: dict[str, float]
    stopped: str = ""

    @property
    def ok(self) -> bool:
        """Every job asked for is done."""
        return not (self.failed or self.waiting or self.refused or self.stopped)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        total = self.done + self.failed + self.waiting
        lines = [f"{self.done} of {total} jobs done in {self.folder}"]
        lines += [f"  line {r['line']} refused: {r['reason']}" for r in self.refused]
        lines += [f"  failed: {f['output']}: {f['error']}" for f in self.failures]
        if self.drift:
            lines.append(
                f"  against dense, {self.drift['clips']} clip(s): "
                f"mean {self.drift['psnr']:.1f} dB, worst {self.drift['psnr_worst']:.1f} dB"
            )
        lines += [f"  stopped: {self.stopped}"] if self.stopped else []
        if self.waiting:
            lines.append(f"  {self.waiting} not done yet: run the same command to go on")
        return "\n".join(lines)


def rows(manifest: Manifest, everything: bool = True) -> list[dict[str, Any]]:
    """Jobs as JSON-able mappings, in the order of the job file; `everything`: those of earlier runs
    too."""
    found = []
    sql = "SELECT * FROM jobs WHERE asked >= ? ORDER BY asked DESC, number, id"
    for row in manifest.ask(sql, 0 if everything else 1):
        found.append(
            {
                "id": row["id"],
                "line": row["line"],
                "state": row["state"],
                "output": row["output"],
                "file": row["file"],
                "seconds": row["seconds"],
                "error": row["error"] if row["state"] == "failed" else None,
                "job": json.loads(row["job"]),
                "report": json.loads(row["report"]) if row["report"] else None,
            }
        )
    return found


def summarize(manifest: Manifest, stopped: str = "", everything: bool = False) -> Summary:
    """The summary, read from the manifest; `everything`: with the clips of earlier runs."""
    jobs = rows(manifest, everything)
    states = [job["state"] for job in jobs]
    done = [job for job in jobs if job["state"] == "done"]
    near = [job["report"]["drift"] for job in done if "drift" in job["report"]]
    drift = {}
    if near:
        values = [d["psnr"] for d in near]
        drift = {
            "clips": len(near),
            "psnr": mean(values),
            "psnr_worst": min(values),
            "ssim": mean(d["ssim"] for d in near),
            "speedup": sum(d["seconds_dense"] for d in near)
            / sum(job["seconds"] for job in done if "drift" in job["report"]),
        }
    refused = manifest.ask("SELECT line, reason FROM refused ORDER BY line")
    return Summary(
        folder=str(manifest.folder),
        done=len(done),
        failed=states.count("failed"),
        waiting=states.count("waiting") + states.count("running"),
        seconds=sum(job["seconds"] for job in done),
        failures=[
            {key: job[key] for key in ("id", "line", "output", "error")}
            for job in jobs
            if job["state"] == "failed"
        ],
        refused=[dict(row) for row in refused],
        drift=drift,
        stopped=stopped,
    )


def write_results(manifest: Manifest) -> Path:
    """results.jsonl: one line a job, for machines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(manifest))
    return write_text(manifest.folder / RESULTS, "".join(lines))
