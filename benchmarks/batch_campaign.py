"""200 and more jobs under injected faults, and throughput against a naive loop.

    python benchmarks/batch_campaign.py [--model FOLDER] [--json FILE]
    python benchmarks/batch_campaign.py --model assets/emoji --device cuda    throughput alone

Faults: two runs of the same jobs on one folder, a third with others; the job file and files of
somebody else in that folder; workers killed with SIGKILL at random moments, a whole run killed and
started again, a disk that fills up and is made larger (a small tmpfs, which takes root;
"disk_filled" says whether it was had), lines that are no jobs, pictures that cannot be read,
prompts whose output is not a number. Counted: jobs lost, done twice, left unexplained; files of
others that were touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dit_accel.batch import Settings, run
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Manifest
from dit_accel.batch.writer import RESERVE
from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.machine import describe
from dit_accel.media import owner as owners
from dit_accel.media import video

SMALL = {"steps": 2, "height": 32, "width": 32, "frames": 5, "method": "dense"}
WORDS = ("cat", "dog", "star", "rocket")
SEEDS, POISON, KILLS = 54, "fish", 4
DISK = RESERVE + 900 * 2**10  # room for somewhat more than half of the clips


class Trouble(threading.Thread):
    """Kills workers at random, the run itself once, and fills and frees the disk."""

    def __init__(self, out: Path, kills: int, seed: int = 0) -> None:
        super().__init__(daemon=True)
        self.out, self.kills, self.chance = out, kills, random.Random(seed)
        self.killed: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.kills and not self.over.wait(0.2):
            if not (self.out / "manifest.sqlite").exists():
                continue
            with closing(Manifest(self.out)) as manifest:
                rows = manifest.ask("SELECT DISTINCT owner FROM jobs WHERE state = 'running'")
            fresh = [row["owner"] for row in rows if row["owner"] not in self.killed]
            if not fresh or self.over.wait(self.chance.uniform(0, 2)):
                continue
            owner = self.chance.choice(fresh)
            try:
                os.kill(owners.pid_of(owner), signal.SIGKILL)
                self.killed.append(owner)
            except ProcessLookupError:
                continue


def write_jobs(path: Path) -> dict[str, int]:
    """A job file with good and bad lines; how many of each."""
    lines = [json.dumps({"defaults": SMALL})]
    for word in WORDS:
        lines.append(json.dumps({"prompt": f"a {word} on red", "seed": list(range(SEEDS))}))
    lines.append(json.dumps({"prompt": f"a {POISON}", "seed": [0, 1, 2]}))
    lines.append('{"prompt": "a cat", "seed": 1')
    lines.append(json.dumps({"prompt": "a cat", "stepz": 3}))
    (path.parent / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    lines.append(json.dumps({"prompt": "a cat", "image": "broken.png"}))
    lines.append(json.dumps({"prompt": "a dog on red", "seed": 0}))
    path.write_text("\n".join(lines) + "\n")
    return {"good": len(WORDS) * SEEDS, "not_numbers": 3, "refused": 4}


def small_disk(out: Path) -> bool:
    """A tmpfs of DISK bytes at `out`; False where mounting is not allowed."""
    out.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(out)]
    return subprocess.run(command, capture_output=True).returncode == 0


def campaign(model: Path, work: Path) -> dict[str, Any]:
    """The whole campaign; the counts."""
    out = work / "out"
    limited = small_disk(out)
    jobs = out / "jobs.jsonl"  # inside its own output folder
    expected = write_jobs(jobs)
    others = {"holiday.mp4": b"mine", "notes.txt": b"mine too", jobs.name: jobs.read_bytes()}
    for name, data in others.items():
        (out / name).write_bytes(data)
    began = time.perf_counter()
    trouble = Trouble(out, KILLS)
    trouble.start()
    command = [
        *(sys.executable, "-m", "dit_accel.batch", str(jobs), "-o", str(out), "--keep-going"),
        *("--model", str(model), "--retries", "1", "--wait-for-space", "2"),
    ]
    runs = []
    try:
        runs += _killed_half_way(command, out)
        for _ in range(20):
            pair = [_start(command) for _ in range(2)]
            ended = [_ended(process) for process in pair]
            runs += ended
            if 3 not in [one["code"] for one in ended]:
                break
            if limited:  # "free some space", it said
                subprocess.run(["mount", "-o", f"remount,size={4 * DISK}", str(out)], check=True)
        trouble.over.set()
        trouble.join()
        with closing(Manifest(out)) as manifest:
            counts = _judge(manifest, expected, len(trouble.killed))
        touched = [n for n, data in others.items() if (out / n).read_bytes() != data]
        counts["files_of_others_touched"] = touched
    finally:
        if limited:
            subprocess.run(["umount", str(out)], check=False)
    seconds = round(time.perf_counter() - began, 1)
    return {"disk_filled": limited, "runs": runs, "seconds": seconds, **counts}


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _ended(process: subprocess.Popen) -> dict[str, Any]:
    said = process.communicate()[1]
    return {"code": process.returncode, "said": said.strip().splitlines()[-1:]}


def _killed_half_way(command: list[str], out: Path) -> list[dict[str, Any]]:
    """Two runs side by side; the first dies of SIGKILL once a third of the jobs is done, its
    workers with it. Meanwhile a run with other jobs is tried."""
    first, second = _start(command), _start(command)
    third = None
    while first.poll() is None:
        time.sleep(0.2)
        made = len(list(out.glob("*.mp4"))) - 1
        if third is None and made > 5:
            other = out.parent / "other.txt"
            other.write_text("a dog on a star\n")
            third = _ended(_start([*command[:3], str(other), *command[4:]]))
        if made > len(WORDS) * SEEDS // 3:
            first.kill()
    first.communicate()
    killed = {"code": first.returncode, "said": ["killed on purpose"]}
    return [killed, {"other_jobs": True, **(third or {})}, _ended(second)]


def _judge(manifest: Manifest, expected: dict[str, int], killed: int) -> dict[str, Any]:
    out = manifest.folder
    rows = manifest.ask("SELECT * FROM jobs")
    done = [row for row in rows if row["state"] == "done"]
    failed = [row for row in rows if row["state"] == "failed"]
    twice = manifest.ask(
        "SELECT job FROM events WHERE kind = 'done' GROUP BY job HAVING COUNT(*) > 1"
    )
    refused = manifest.ask("SELECT * FROM refused")
    unreadable = [row["file"] for row in done if not _plays(out / row["file"])]
    kinds = manifest.ask("SELECT kind, COUNT(*) AS n FROM events GROUP BY kind")
    return {
        "jobs": len(rows),
        "lines_refused": [f"line {row['line']}: {row['reason']}" for row in refused],
        "done": len(done),
        "failed": len(failed),
        "failures": sorted({row["error"] for row in failed}),
        "expected": expected,
        "lost": expected["good"] - sum(not _poisoned(row) for row in done),
        "done_twice": len(twice),
        "unexplained": sum(not row["error"] for row in failed) + expected["refused"] - len(refused),
        "clips_that_do_not_play": len(unreadable),
        "half_written_files_left": len(list(out.glob(".*.part.*"))),
        "workers_killed": killed,
        "events": {row["kind"]: row["n"] for row in kinds},
        "integrity": manifest.ask("PRAGMA integrity_check")[0][0],
    }


def _poisoned(row: Any) -> bool:
    return POISON in json.loads(row["job"])["prompt"]


def _plays(path: Path) -> bool:
    try:
        return len(video.read(path)) == SMALL["frames"]
    except (OSError, ValueError):
        return False


def throughput(
    model: Path | None, work: Path, device: str = "cpu", count: int = 24, clip: dict = SMALL
) -> Iterator[tuple[str, float]]:
    """Clips a minute: a naive loop, this queue, and this queue with calls of several clips."""
    pipe, defaults = load_pipeline(model, device)
    prompts = [f"a {WORDS[n % 2]} on red" for n in range(count)]
    size = {k: v for k, v in clip.items() if k != "method"}
    generate(pipe, defaults, Request("a cat", **size))
    began = time.perf_counter()
    for seed, prompt in enumerate(prompts):
        frames = generate(pipe, defaults, Request(prompt, seed=seed, **size)).frames
        video.save(work / f"naive-{seed}.mp4", frames, defaults.fps)
    yield "naive loop", _a_minute(count, began)
    jobs = [Job(prompt, seed=seed, **clip) for seed, prompt in enumerate(prompts)]
    for batch in (1, 4) if device == "cpu" else (1, 4, 16):
        name = f"batch, {batch} clips a call" if batch > 1 else "batch"
        out = work / f"throughput-{batch}"
        began = time.perf_counter()
        summary = run(jobs, out, pipe=pipe, settings=Settings(batch=batch), show="none")
        assert summary.ok, summary
        yield name, _a_minute(count, began)


def _a_minute(count: int, began: float) -> float:
    return round(60 * count / (time.perf_counter() - began), 1)


def poisoned_copy(model: Path, folder: Path) -> Path:
    """The model with an embedding for "fish" that is not a number: an output to be caught."""
    pipe, _ = load_pipeline(model, "cpu")
    ids = pipe.tokenizer(POISON, add_special_tokens=False).input_ids
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[ids] = float("nan")
    pipe.save_pretrained(folder)
    return folder


def tiny_model(folder: Path) -> Path:
    """The tiny random WanPipeline of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import saved_tiny_wan

    return saved_tiny_wan(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="pipeline folder; default: a tiny random Wan")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/batch.json")
    parser.add_argument("--device", help="only the throughput, there, of the model's own clips")
    parser.add_argument("--clips", type=int, default=64, help="clips of that throughput")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the small disk is unmounted too
    work = Path(tempfile.mkdtemp(prefix="batch-campaign-"))
    try:
        model = options.model or tiny_model(work / "model")
        if options.device:
            found = {
                "command": shlex.join(["python", *sys.argv]),
                "model": model.name,
                "clips": options.clips,
                "machine": describe(options.device),
                "clips_a_minute": {},
            }
            clip = {"method": "dense"}
            for name, rate in throughput(model, work, options.device, options.clips, clip):
                found["clips_a_minute"][name] = rate
                _write(options.json, found)  # each figure as it is known
        else:
            found = {
                "command": shlex.join(["python", *sys.argv]),
                "model": options.model.name if options.model else "tiny random Wan (tests/tiny.py)",
                "clip": SMALL,
                "machine": describe("cpu"),
                "clips_a_minute": dict(throughput(model, work)),
                "campaign": campaign(poisoned_copy(model, work / "poisoned"), work),
            }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _write(options.json, found)
    print(json.dumps(found, indent=2))


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
