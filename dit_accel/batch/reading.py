"""Job files: JSON lines, CSV, prompts line by line. Lists multiply; every bad line is reported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.batch.jobs import INTEGERS, NUMBERS, Job, check_keys
from dit_accel.batch.model import beside
from dit_accel.inputs.data import parse
from dit_accel.inputs.fields import shown
from dit_accel.inputs.prompts import prompt_lines
from dit_accel.inputs.table import read_table
from dit_accel.inputs.text import decode, lines, read_bytes

MAX_JOBS = 100_000


@dataclass(frozen=True)
class Problem:
    """A line that gives no job, and why."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def listed(problems: Sequence[Problem], most: int = 20) -> str:
    """Problems as lines below a sentence."""
    more = len(problems) - most
    lines = [str(p) for p in problems[:most]] + ([f"and {more} more"] if more > 0 else [])
    return "".join(f"\n  {line}" for line in lines)


@dataclass
class Parsed:
    """The (line, job) pairs of a file, and the lines that were refused."""

    jobs: list[tuple[int, Job]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


Rows = Iterable[tuple[int, Mapping[str, Any] | Exception]]


def gather(
    source: str | Path | Sequence[Job | Mapping[str, object]],
    defaults: Mapping[str, object] | None = None,
) -> Parsed:
    """All jobs of a file (.jsonl, .csv, or prompts line by line) or of a list of them.

    Args:
        source: the file, or Jobs and mappings of their keys. A key with a list multiplies.
        defaults: keys for the jobs that do not have them; lists multiply too.

    Raises ValueError for unusable defaults and for a file that cannot be read at all; a bad line
    becomes a Problem. Two jobs for one clip, or one file name, are a Problem of the later line.
    """
    defaults = dict(defaults or {})
    check_keys(defaults)
    if isinstance(source, (str, Path)):
        path = Path(source)
        rows, base = _read(path), path.parent
    else:
        rows = ((n, j.to_dict() if isinstance(j, Job) else j) for n, j in enumerate(source, 1))
        base = Path()
    return _build(rows, defaults, base)


def _build(rows: Rows, defaults: dict[str, object], base: Path) -> Parsed:
    parsed = Parsed()
    taken: dict[str, int] = {}
    for line, values in rows:
        try:
            if isinstance(values, Exception):
                raise values
            if not isinstance(values, Mapping):
                raise ValueError(f'a job is an object such as {{"prompt": …}}, not {shown(values)}')
            if set(values) == {"defaults"}:
                defaults = _merged(defaults, values["defaults"])
                continue
            check_keys(values)
            for job in expand(_over(defaults, values), base):
                _claim(taken, line, job)
                parsed.jobs.append((line, job))
        except ValueError as error:
            parsed.problems.append(Problem(line, str(error)))
        if len(parsed.jobs) > MAX_JOBS:
            raise ValueError(f"more than {MAX_JOBS} jobs by line {line}: split them into batches")
    return parsed


def _merged(defaults: dict[str, object], more: object) -> dict[str, object]:
    if not isinstance(more, Mapping):
        raise ValueError(f"defaults are an object of keys and values, not {shown(more)}")
    check_keys(more)
    return _over(defaults, more)


def _over(defaults: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """The defaults under a job's own keys, of which a profile takes the place of a method and a
    method that of a profile."""
    instead = {"speed": "method", "method": "speed"}
    gone = {instead[key] for key in own if key in instead and own[key] is not None}
    return {**{key: value for key, value in defaults.items() if key not in gone}, **own}


def expand(values: Mapping[str, object], base: Path = Path()) -> Iterator[Job]:
    """One job for each combination of the values that are lists; paths are relative to `base`."""
    choices = {k: v if isinstance(v, list) else [v] for k, v in values.items()}
    for key, options in choices.items():
        if not options:
            raise ValueError(f"{key} is an empty list: no job would come of it")
    count = math.prod(map(len, choices.values()))
    if count > MAX_JOBS:
        raise ValueError(f"its lists make {count} jobs: at most {MAX_JOBS} are taken")
    for picked in itertools.product(*choices.values()):
        job = dict(zip(choices, picked, strict=True))
        for key in ("image", "method", "lora"):
            text = job.get(key)
            if isinstance(text, str) and (key != "method" or text.endswith(".json")):
                job[key] = str((base / text).absolute())
        if isinstance(job.get("checkpoint"), str):
            job["checkpoint"] = beside(job["checkpoint"], base)
        yield Job.from_dict(job)


def _claim(taken: dict[str, int], line: int, job: Job) -> None:
    """No two jobs for one clip or one file; names that differ only in case are one file to some."""
    for key, what in ((job.id, "the same clip"), (job.output.lower(), "the same file name")):
        if key in taken:
            raise ValueError(f"this asks for {what} as line {taken[key]} ({job.output})")
    taken[job.id] = taken[job.output.lower()] = line


def _read(path: Path) -> Rows:
    kinds = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".txt": _prompts}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"jobs are read from .jsonl, .csv or .txt: not from {path.name!r}")
    return kind(read_bytes(path, "job file"))


def _json_lines(data: bytes) -> Rows:
    for number, text in lines(data):
        if isinstance(text, ValueError):
            yield number, text
            continue
        try:
            yield number, parse(text)
        except ValueError as error:
            yield number, error


def _prompts(data: bytes) -> Rows:
    for number, text in prompt_lines(data):
        yield number, text if isinstance(text, ValueError) else {"prompt": text}


def _csv(data: bytes) -> Rows:
    try:
        names, rows = read_table(decode(data))
        check_keys(dict.fromkeys(names))
        for number, row in rows:
            yield number, row if isinstance(row, ValueError) else _cells(row)
    except ValueError as error:
        yield 1, error


def _cells(row: dict[str, str]) -> dict[str, object] | ValueError:
    try:
        return {key: parse_value(key, value) for key, value in row.items() if value != ""}
    except ValueError as error:
        return error


def parse_value(key: str, text: str) -> object:
    """A value written as text: [a, b] is a list, numbers where the key is one."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            return parse(text)
        except ValueError as error:
            if key != "prompt":
                raise ValueError(f"{key}: {shown(text)} is no JSON list ({error})") from None
    if key not in (*INTEGERS, *NUMBERS):
        return text
    try:
        return float(text) if key in NUMBERS else int(text)
    except ValueError:
        kind = "a number" if key in NUMBERS else "a whole number"
        raise ValueError(f"{key} is {kind}, not {shown(text)}") from None
