r"""What gpu_rest.py and gpu_steps.py measure, in one session of a lent GPU.

    python benchmarks/gpu_all.py --out DIR --seconds 400            an H200
    python benchmarks/gpu_all.py --out /tmp/x --dry-run             tiny, on a CPU

All is built and compiled side by side, as many processes as there are models and some for the
operators; then each measures in its turn, alone on the GPU. One that is not ready when the first
turn comes is waited for in its own. compute-sanitizer runs beside the compilers. DIR holds a file
for each, written case by case, and all.json with the seconds at which each turn began.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).parent
# Model, its parts; in the order of their turns, with the operators between them.
MODELS = {
    "qwen-1328": ["--parts", "profile", "--layers", "20"],
    "wan14b-720p": ["--parts", "kinds", "offload"],
    "wan1.3b-480p": ["--parts", "profile", "kinds", "compiled"],
    "hunyuan-720p": ["--parts", "profile", "kinds"],
}
OPERATORS = {"first": "^(reuse|tiles)", "rest": "^(lazy|tail|branch|selector|orders)"}
# In the order of their turns, with the most seconds that each may take.
TURNS = {"qwen-1328": 20, "wan14b-720p": 125, "first": 60, "wan1.3b-480p": 60, "rest": 80,
         "hunyuan-720p": 110}  # fmt: skip
AHEAD = 130  # seconds after which the turns begin, whoever is ready


class Child:
    """A process that is spoken to line by line; the last line that it gives is empty."""

    def __init__(self, command: list[str], noise: TextIO) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=noise, text=True, bufsize=1
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put("")

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line)


class Session:
    """The processes of one run."""

    def __init__(self, out: Path, seconds: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.log: list[dict[str, object]] = []
        out.mkdir(parents=True, exist_ok=True)
        self.noise = (out / "log.txt").open("w")

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def note(self, what: str, **more: object) -> None:
        self.log.append({"at": round(time.monotonic() - self.start, 1), "what": what, **more})
        print(json.dumps(self.log[-1]), flush=True)
        record = {"command": shlex.join(sys.argv), "log": self.log}
        (self.out / "all.json").write_text(json.dumps(record, indent=1))

    def begin(self, script: str, *arguments: str) -> Child:
        """A process that builds or compiles, says when it is ready, and waits for its turn."""
        return Child([sys.executable, str(HERE / script), *arguments], self.noise)

    def model(self, name: str) -> Child:
        arguments = ["--model", name, *MODELS[name], "--out", str(self.out / f"{name}.json")]
        return self.begin("gpu_steps.py", *arguments, "--wait", *["--tiny"] * self.dry)

    def operators(self, name: str) -> Child:
        path = str(self.out / f"operators-{name}.json")
        arguments = ["--match", OPERATORS[name], "--out", path, "--part", "times", "--wait"]
        return self.begin("gpu_rest.py", *arguments, *["--dry-run"] * self.dry)

    def heard(self, word: str, name: str, child: Child, until: float) -> bool:
        """Whether a process has said the word by then; what else it says goes to the log."""
        while True:
            try:
                line = child.lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return False
            if line.strip() == word:
                self.note(f"{name} is {word}")
                return True
            if not line:
                self.note(f"{name} has ended", code=child.process.wait())
                return False
            self.noise.write(line)
            self.noise.flush()

    def turn(self, name: str, child: Child) -> None:
        """Let a process measure, until it is done or its time is up."""
        seconds = min(TURNS[name], self.left)
        self.note(f"{name}: go", seconds=round(seconds))
        child.say(f"{0.85 * seconds:.0f}\n")
        if not self.heard("done", name, child, time.monotonic() + seconds):
            child.process.kill()

    def compile(self, match: str, workers: int) -> None:
        """All cases of operators once, by several processes."""
        arguments = ["--out", str(self.out / "compile.json"), "--match", match, "--part", "compile"]
        arguments += ["--workers", str(workers), *["--dry-run"] * self.dry]
        command = [sys.executable, str(HERE / "gpu_rest.py"), *arguments]
        subprocess.run(command, stdout=self.noise, stderr=self.noise, check=False)
        self.note("operators are compiled")

    def sanitizer(self) -> subprocess.Popen[str] | None:
        """memcheck over the levels."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.dry or not Path(tool).exists():
            self.note("no compute-sanitizer here")
            return None
        command = [tool, "--target-processes", "all", "--tool", "memcheck", sys.executable]
        command += [str(HERE / "gpu_rest.py"), "--out", str(self.out / "rest-levels.json")]
        command += ["--match", "^levels", "--workers", "0"]
        return subprocess.Popen(
            command,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=(self.out / "memcheck.txt").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--turns", nargs="+", default=[*TURNS, "memcheck"])
    parser.add_argument("--workers", type=int, default=3, help="processes that compile operators")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    s = Session(options.out, options.seconds, options.dry_run)
    wanted = [name for name in TURNS if name in options.turns]
    children = {name: s.model(name) for name in wanted if name in MODELS}
    check = s.sanitizer() if "memcheck" in options.turns else None
    if match := "|".join(OPERATORS[name] for name in wanted if name in OPERATORS):
        s.compile(match, options.workers)
        children |= {name: s.operators(name) for name in wanted if name in OPERATORS}
    until = s.start + min(AHEAD, options.seconds / 3)
    there = {name for name in wanted if s.heard("ready", name, children[name], until)}
    if check is not None:
        try:
            check.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(check.pid, signal.SIGKILL)
        s.note("memcheck", code=check.poll())
    for name in wanted:
        later = min(s.end, time.monotonic() + 30)
        if name in there or s.heard("ready", name, children[name], later):
            s.turn(name, children[name])
    for child in children.values():
        child.process.kill()
    s.note("the end")


if __name__ == "__main__":
    main()
