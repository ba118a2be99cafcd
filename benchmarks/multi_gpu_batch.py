"""Part "batch" of multi_gpu.py: a queue of jobs on one GPU and on all, and with a worker killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.batch.manifest import Manifest
from dit_accel.bench.models import MODELS, build
from dit_accel.generation.loading import EMBEDDED, GENERATION
from dit_accel.media import owner as owners

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny import saved_tiny_wan, tiny_wan

EMOJI, WAN = "embedded model", "Wan 1.3B"
SCALING, KILLED = "scaling", "one worker killed"
SMALL = {"steps": 2, "height": 32, "width": 32, "frames": 5}
CLIP = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "max_sequence_length": 512,
    "fps": 16,
}


@dataclass(frozen=True)
class Queue:
    """Jobs of one model. work: a folder on local disk for the clips; dry: CPU processes."""

    name: str
    model: Path
    jobs: list[dict[str, Any]]
    work: Path
    dry: bool

    def run(self, gpus: int, label: str, kill: bool = False) -> dict[str, Any]:
        """All jobs on so many GPUs; what the manifest says of them."""
        out = self.work / f"{self.name} {label}".replace(" ", "-")
        out.mkdir(parents=True)
        path = out.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(job) + "\n" for job in self.jobs))
        where = ["--gpus", ",".join(map(str, range(gpus)))]
        where = ["--device", "cpu", "--workers", str(gpus)] if self.dry else where
        command = [sys.executable, "-m", "dit_accel.batch", str(path), "-o", str(out)]
        with closing(Manifest(out)) as manifest:
            killer = Killer(manifest, len(self.jobs) // 2) if kill else None
            ended = subprocess.run(
                [*command, "--model", str(self.model), *where], capture_output=True, text=True
            )
            if killer is not None:
                killer.over.set()
                killer.join()
            found = judge(manifest, len(self.jobs)) | {"exit_code": ended.returncode}
        if ended.returncode:
            found["said"] = ended.stderr.strip().splitlines()[-3:]
        return found | ({"killed": killer.killed} if killer else {})


class Killer(threading.Thread):
    """Kills one worker in the middle of a job, once `after` jobs are done."""

    def __init__(self, manifest: Manifest, after: int) -> None:
        super().__init__(daemon=True)
        self.manifest, self.after, self.killed = manifest, after, 0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.killed and not self.over.wait(0.05):
            done = self.manifest.ask("SELECT COUNT(*) AS n FROM events WHERE kind = 'done'")
            busy = self.manifest.ask("SELECT owner FROM jobs WHERE state = 'running'")
            if done[0]["n"] >= self.after and busy:
                os.kill(owners.pid_of(busy[0]["owner"]), signal.SIGKILL)
                self.killed = 1


def judge(manifest: Manifest, expected: int) -> dict[str, Any]:
    """Counts of a finished run, and its seconds.

    seconds: from the first worker that was ready to the last job done. steady: jobs a second
    between each worker's first and last job done, summed over workers. ready, first, last: seconds
    after that start at which each worker was ready, had done its first job, and its last.
    """
    events = manifest.ask("SELECT kind, time, owner, job FROM events ORDER BY seq")
    done = [event for event in events if event["kind"] == "done"]
    ready = sorted(event["time"] for event in events if event["kind"] == "ready")
    times: dict[str, list[float]] = {}
    for event in done:
        times.setdefault(event["owner"], []).append(event["time"])
    rates = [(len(at) - 1) / (at[-1] - at[0]) for at in times.values() if len(at) > 1]
    jobs = {event["job"] for event in done}
    states = manifest.counts()
    lost = [e for e in events if e["kind"] in ("lost", "released")]
    return {
        "jobs": expected,
        "states": states,
        "done_twice": len(done) - len(jobs),
        "exactly_once": states["done"] == len(jobs) == len(done) == expected,
        "taken_over": len(lost),
        "each_worker": sorted(len(at) for at in times.values()),
        "ready": [round(at - ready[0], 3) for at in ready],
        "first": [round(at[0] - ready[0], 3) for at in times.values()],
        "last": [round(at[-1] - ready[0], 3) for at in times.values()],
        "seconds": round(done[-1]["time"] - ready[0], 3) if done else None,
        "steady": round(sum(rates), 4) if rates else None,
    }


def compare(one: dict[str, Any], many: dict[str, Any], gpus: int) -> dict[str, Any]:
    """Efficiency t₁ / (N · t_N): of the whole, first clips and all, and of the steady part."""
    known = one["seconds"] and many["seconds"]
    steady = one["steady"] and many["steady"]
    return {
        "efficiency": round(one["seconds"] / (gpus * many["seconds"]), 4) if known else None,
        "efficiency_steady": round(many["steady"] / (gpus * one["steady"]), 4) if steady else None,
    }


def wan_folder(folder: Path, device: torch.device) -> Path:
    """A pipeline folder with Wan2.1 1.3B's transformer, one layer of its text encoder and a narrow
    VAE; random weights in bfloat16."""
    from diffusers import WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    small = tiny_wan()
    full = build(MODELS["wan1.3b-480p"], device, torch.bfloat16)
    width = full.transformer.config.text_dim
    text = UMT5Config(
        vocab_size=len(small.tokenizer), d_model=width, d_ff=1024, num_layers=1, num_heads=64
    )
    pipe = WanPipeline(
        tokenizer=small.tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=small.vae,
        scheduler=full.scheduler,
        transformer=full.transformer,
    )
    pipe.to(torch.bfloat16).save_pretrained(folder)
    (folder / GENERATION).write_text(json.dumps(CLIP))
    return folder


def embedded(work: Path, jobs: int, dry: bool) -> Queue:
    """So many jobs of the embedded model."""
    words, small = ("cat", "dog", "rocket", "star"), SMALL if dry else {}
    many = [{"prompt": f"a {words[n % 4]} on red", "seed": n, **small} for n in range(jobs)]
    model = saved_tiny_wan(work / "model") if dry else EMBEDDED
    return Queue(EMOJI, model, many, work, dry)


def video(work: Path, jobs: int, dry: bool) -> Queue:
    """So many clips of Wan 1.3B."""
    small = SMALL if dry else {"method": "pooled"}
    few = [{"prompt": "a cat", "seed": n, **small} for n in range(jobs)]
    folder = work / "wan"
    model = saved_tiny_wan(folder) if dry else wan_folder(folder, torch.device("cuda", 0))
    if not dry:
        torch.cuda.empty_cache()  # the workers need the memory
    return Queue(WAN, model, few, work, dry)


def rows(queue: Queue, gpus: int, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """On one GPU and on all; on all with a worker killed half-way."""
    if SCALING in wanted:
        few = Queue(queue.name, queue.model, queue.jobs[:gpus], queue.work, queue.dry)
        few.run(gpus, "first")  # kernels compile, files come into memory
        one, many = queue.run(1, "one"), queue.run(gpus, "all")
        found = {"alone": one, "together": many, **compare(one, many, gpus)}
        yield {"case": queue.name, "row": SCALING, "gpus": gpus, **found}
    if KILLED in wanted:
        found = queue.run(gpus, "killed", kill=True)
        yield {"case": queue.name, "row": KILLED, "gpus": gpus, **found}


# Who builds the queue of each model, and its rows.
QUEUES: dict[str, tuple[Callable[..., Queue], tuple[str, ...]]] = {
    EMOJI: (embedded, (SCALING, KILLED)),
    WAN: (video, (SCALING,)),
}
