"""Whatever is in files, names and options: a documented exit code, no traceback, no file but the
asked one. `make test` runs so many examples a property, always the same; `-m slow` more, others.
"""

import contextlib
import inspect
import io
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from hypothesis import configuration, given
from hypothesis import strategies as st
from strange import GOOD, JOB, NUMBER, TEXT, VALUE
from tiny import tiny_wan

import dit_accel
import dit_accel.batch
from dit_accel.batch import campaign
from dit_accel.batch.jobs import Job
from dit_accel.batch.reading import gather
from dit_accel.cli import main as cli
from dit_accel.config import AccelConfig, resolve
from dit_accel.generation import Defaults
from dit_accel.inputs.fields import shown
from dit_accel.media import names

CODES = {0, 1, 2, 3}
CLIP = Defaults(height=16, width=16, num_frames=1, num_inference_steps=1)
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "dit-accel-hypothesis")


OPEN = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}


def examples(quick, slow):
    """A property as two tests: `quick` examples, always the same, and `slow` of them, others."""
    few = hypothesis.settings(max_examples=quick, derandomize=True, **OPEN)
    many = hypothesis.settings(max_examples=slow, **OPEN)
    marks = [pytest.mark.slow, pytest.mark.timeout(3600)]

    def both(run):
        @pytest.mark.parametrize(
            "amount",
            [few, pytest.param(many, marks=marks)],
            ids=[f"{quick} examples", f"{slow} examples"],
        )
        def test(amount, request):
            named = "pipe" in inspect.signature(run.hypothesis.inner_test).parameters
            fixtures = {"pipe": request.getfixturevalue("pipe")} if named else {}
            amount(run)(**fixtures)

        return test

    return both


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as here, contextlib.chdir(here):
        yield Path(here)


@pytest.fixture(scope="module")
def pipe():
    """A tiny pipeline, which every command finds instead of loading one."""
    pipe = tiny_wan(layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_accel.cli.session.load_pipeline", lambda *a, **k: (pipe, CLIP))
        patch.setattr("dit_accel.batch.places.loading.Defaults.from_pipeline", lambda p: CLIP)
        patch.setattr(dit_accel.batch, "run", partial(campaign.run, pipe=pipe), raising=False)
        yield pipe


def typed(arguments, pipe):
    """(exit code, what was printed) of a command line; the pipeline is stock again."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = cli.run(arguments)
    finally:
        dit_accel.restore(pipe)
    said = out.getvalue()
    assert code in CODES and "Traceback" not in said, (arguments, said)
    return code, said


@examples(300, 5000)
@given(lines=st.lists(JOB, max_size=4), junk=st.lists(st.binary(max_size=20), max_size=2))
def test_job_files(lines, junk):
    """Each line is a job, a default or a problem with its number."""
    with folder():
        text = [json.dumps(line).encode() for line in lines]
        Path("jobs.jsonl").write_bytes(b"\n".join([*text, *junk]))
        parsed = gather("jobs.jsonl")
    told = {line for line, _ in parsed.jobs} | {problem.line for problem in parsed.problems}
    quiet = {
        n for n, line in enumerate(lines, 1) if isinstance(line, dict) and set(line) == {"defaults"}
    }
    assert told | quiet >= set(range(1, len(lines) + 1))
    assert all(len(problem.reason) < 2000 for problem in parsed.problems)


@examples(200, 5000)
@given(
    rows=st.lists(st.lists(TEXT, max_size=4), max_size=5), ending=st.sampled_from(["\n", "\r\n"])
)
def test_tables(rows, ending):
    """A good row after any others is done."""
    with folder():
        text = ending.join(["prompt,seed,name", *(",".join(row) for row in rows), "a last cat,7,"])
        Path("jobs.csv").write_bytes(text.encode(errors="surrogatepass"))
        parsed = gather("jobs.csv")
    if "not UTF-8" not in str(parsed.problems):
        assert any(job.prompt == "a last cat" for _, job in parsed.jobs)


@examples(400, 10_000)
@given(
    values=st.recursive(
        st.dictionaries(
            st.sampled_from(
                [
                    "method",
                    "schedule",
                    "prune",
                    "order",
                    "tile",
                    "min_tokens",
                    "strict",
                    "name",
                    "keep",
                    "block_q",
                    "warmup",
                    "cooldown",
                    "dense_layers",
                    "layer_keep",
                    "refresh",
                    "weights",
                    "criterion",
                    "precision",
                ]
            ),
            st.one_of(VALUE, st.sampled_from([{"name": "topk"}, {"name": "sla"}, "topk"])),
            max_size=4,
        ),
        lambda inner: st.dictionaries(
            st.sampled_from(["method", "schedule", "prune"]), inner, max_size=3
        ),
        max_leaves=4,
    )
)
def test_presets(values):
    """A configuration that is the same after its round trip, or a sentence with the file's name."""
    with folder():
        Path("preset.json").write_text(json.dumps(values))
        try:
            found = resolve("preset.json")
        except ValueError as error:
            assert str(error).startswith("preset file preset.json") and len(str(error)) < 2000
            return
    assert AccelConfig.from_dict(found.to_dict()) == found


@examples(200, 5000)
@given(values=st.dictionaries(st.sampled_from([*vars(CLIP), "speed"]), VALUE, max_size=3))
def test_generation_defaults(values):
    with folder():
        Path("generation.json").write_text(json.dumps(values))
        try:
            Defaults.from_file(Path("generation.json"))
        except ValueError as error:
            assert str(error).startswith("generation defaults generation.json")


@examples(200, 5000)
@given(text=TEXT, name=TEXT)
def test_names(text, name):
    """A name from any text, and any name that is taken, is one that a file can have."""
    with folder() as here:
        found = [f"{names.from_text(text) or 'clip'}.mp4"]
        with contextlib.suppress(ValueError):
            found.append(f"{names.check_name(name)}.dense.mp4")
        for each in found:
            Path(each).write_text("clip")
        assert sorted(os.listdir(here)) == sorted(set(found))


OPTIONS = ("--steps", "--size", "--frames", "--seed", "--guidance", "--fps", "--keep", "--warmup")
OPTIONS += ("--method", "--prune", "--order", "--min-tokens", "--dtype", "--device", "--image")
OPTIONS += ("--negative", "--sampler", "--lora")
WORD = st.one_of(TEXT, NUMBER.map(shown)).map(lambda x: x.encode(errors="replace").decode())


@examples(120, 2000)
@given(
    prompt=WORD,
    options=st.dictionaries(st.sampled_from(OPTIONS), WORD, max_size=3),
    output=st.one_of(st.none(), WORD, WORD.map(lambda x: f"{x}.png")),
)
def test_generate(pipe, prompt, options, output):
    """One picture, the asked one, or a sentence and nothing."""
    words = [word for pair in options.items() for word in pair]
    words += [] if output is None else ["-o", output]
    with folder() as here:
        code, said = typed(["generate", prompt, "--device", "cpu", *words], pipe)
        left = [path.relative_to(here) for path in here.rglob("*") if path.is_file()]
        assert len(left) <= (code == 0), (words, left)
        asked = left and output is not None
        assert (
            not asked or left[0] == Path(os.path.relpath(output, here)) or left[0] == Path(output)
        )
        assert code == 0 or "error: " in said


@examples(50, 500)
@given(
    lines=st.lists(st.one_of(GOOD, JOB), min_size=1, max_size=3),
    options=st.dictionaries(st.sampled_from(OPTIONS[:5]), WORD, max_size=1),
    going=st.booleans(),
)
def test_batches(pipe, lines, options, going):
    """The job file and a user's file stay; what is refused leaves nothing."""
    words = [word for pair in options.items() for word in pair] + ["--keep-going"] * going
    with folder() as here:
        out = here / "out"
        out.mkdir()
        kept = {out / "jobs.jsonl": "\n".join(map(json.dumps, lines)), out / "one.png": "mine"}
        for path, text in kept.items():
            path.write_text(text)
        code, said = typed(["batch", "out/jobs.jsonl", "-o", "out", *words], pipe)
        for path, text in kept.items():
            assert path.read_text() == text
        left = {path.name for path in out.iterdir()} - {"jobs.jsonl", "one.png"}
        ours = {"manifest.sqlite", "index.html", "results.jsonl"}
        assert code != 2 or not left, (said, left)
        assert all(name in ours or name.endswith((".png", ".mp4")) for name in left), left
        assert os.listdir(here) == ["out"]


def test_a_job_that_is_fine_is_done(pipe):
    """The fuzz runs what it says it runs: a good job gives its clip."""
    with folder():
        Path("jobs.jsonl").write_text(json.dumps(Job("a cat", name="x").to_dict()))
        assert typed(["batch", "jobs.jsonl", "-o", "out"], pipe)[0] == 0
        assert Path("out", "x.png").is_file()
        assert typed(["generate", "a cat", "-o", "y.png"], pipe)[0] == 0
        assert Path("y.png").is_file()
