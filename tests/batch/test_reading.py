"""Job files: what they give, what they refuse and with which words, ids that hold."""

import json

import pytest
from PIL import Image

from dit_accel.batch.jobs import Job
from dit_accel.batch.reading import gather, parse_value
from dit_accel.generation import speeds

EMBEDDED_LINES = """
{"prompt": "a cat"}
{"prompt": "a dog", "sed": 3}
not json
{"prompt": "a cat", "seed": "3"}
[1, 2]
{"prompt": "a cat"}
{"prompt": "a fish", "method": "nosuch"}
{"seed": 1}
{"prompt": "a fish", "prompt": "a cat"}
{"prompt": "a fish", "image": "none.png"}
{"prompt": "a fish", "seed": []}
"""


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lists_multiply_and_defaults_fill_in(tmp_path):
    lines = [
        {"defaults": {"steps": 4, "method": ["dense", "topk"]}},
        {"prompt": ["a cat", "a dog"], "seed": [1, 2, 3]},
        {"prompt": "a star", "method": "topk", "steps": 9},
    ]
    path = write(tmp_path, "jobs.jsonl", "\n".join(map(json.dumps, lines)))
    parsed = gather(path, {"steps": 2, "height": 64})
    assert not parsed.problems
    assert len(parsed.jobs) == 2 * 3 * 2 + 1
    assert {job.steps for _, job in parsed.jobs[:12]} == {4}
    assert parsed.jobs[12][1] == Job("a star", steps=9, height=64, method="topk")
    assert [line for line, _ in parsed.jobs] == [2] * 12 + [3]


def test_every_bad_line_is_named_with_its_reason(tmp_path):
    parsed = gather(write(tmp_path, "jobs.jsonl", EMBEDDED_LINES))
    assert [job.prompt for _, job in parsed.jobs] == ["a cat"]
    reasons = {p.line: p.reason for p in parsed.problems}
    expected = {
        3: "unknown key 'sed': did you mean 'seed'?",
        4: "not JSON: Expecting value at column 1",
        5: "seed is a whole number, not '3'",
        6: "a job is an object such as",
        7: "the same clip as line 2",
        8: "nosuch",
        9: "there is no prompt",
        10: "key 'prompt' is there twice",
        11: "there is no picture",
        12: "seed is an empty list",
    }
    assert set(reasons) == set(expected)
    for line, words in expected.items():
        assert words in reasons[line]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "prompt is a text, not 3"),
        ({"prompt": "a", "seed": -1}, "seed lies from 0"),
        ({"prompt": "a", "seed": True}, "seed is a whole number, not True"),
        ({"prompt": "a", "guidance": float("nan")}, "guidance is a finite number, not nan"),
        ({"prompt": "a", "height": 7}, "height lies from 16"),
        ({"prompt": "a", "name": "../up"}, "name is a file's"),
        ({"prompt": "a", "name": ".hidden"}, "name is a file's"),
        ({"prompt": "a", "method": "topk:nosuch"}, "nosuch"),
    ],
)
def test_impossible_values(values, words):
    problem = gather([values]).problems[0]
    assert words in problem.reason


def test_csv_types_lists_and_complaints(tmp_path):
    rows = ['"cat, red","[1, 2]",3.5,dense', "dog,x,,", "fish,4", "star,5,1,topk,9"]
    text = "\n".join(["\ufeffprompt,seed,guidance,method", *rows])
    parsed = gather(write(tmp_path, "jobs.csv", text))
    assert [(j.prompt, j.seed, j.guidance, j.method) for _, j in parsed.jobs] == [
        ("cat, red", 1, 3.5, "dense"),
        ("cat, red", 2, 3.5, "dense"),
        ("fish", 4, None, "shared"),
    ]
    assert [str(p) for p in parsed.problems] == [
        "line 3: seed is a whole number, not 'x'",
        "line 5: this row has 1 cell(s) more than the heading",
    ]
    wrong = gather(write(tmp_path, "wrong.csv", "prompt,seeds\na,1\n"))
    assert wrong.problems[0].reason == "unknown key 'seeds': did you mean 'seed'?"
    alone = gather(write(tmp_path, "alone.csv", "a cat,1\n"))
    assert "unknown key 'a cat'" in str(alone.problems[0])


def test_prompts_line_by_line(tmp_path):
    path = write(tmp_path, "p.txt", b"# colours\na red cat\n\n  a blue cat \r\n\xff\xfe\n")
    parsed = gather(path, {"seed": [0, 1]})
    assert [j.prompt for _, j in parsed.jobs] == ["a red cat"] * 2 + ["a blue cat"] * 2
    assert [str(p) for p in parsed.problems] == ["line 5: this line is not UTF-8 text"]


def test_unusable_files(tmp_path):
    with pytest.raises(ValueError, match="there is no job file"):
        gather(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"from \.jsonl, \.csv or \.txt"):
        gather(write(tmp_path, "jobs.xlsx", "x"))
    with pytest.raises(ValueError, match="unknown key 'step'"):
        gather([{"prompt": "a"}], {"step": 3})


def test_two_names_for_one_file():
    jobs = [{"prompt": "a", "name": "Clip"}, {"prompt": "b", "name": "clip"}]
    assert "the same file name as line 1" in gather(jobs).problems[0].reason


def test_ids_depend_on_content_only(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    copy = tmp_path / "b.png"
    copy.write_bytes(picture.read_bytes())
    first = Job("a cat", image=str(picture), guidance=3)
    assert first.id == Job("a cat", image=str(copy), guidance=3.0, name="mine").id
    Image.new("RGB", (8, 8), "blue").save(copy)
    assert first.id != Job("a cat", image=str(copy), guidance=3).id
    assert Job("a cat").id != Job("a cat", method="dense").id != Job("a cat", seed=1).id
    assert Job.from_dict(first.to_dict()) == first


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (tmp_path / "text.png").write_text("hello")
    jobs = [{"prompt": "a", "image": str(tmp_path / n)} for n in ("bad.png", "text.png")]
    for problem in gather(jobs).problems:
        assert "cannot be read" in problem.reason
    assert len(gather(jobs).problems) == 2


def test_pictures_are_found_beside_the_job_file(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write(tmp_path, "jobs.jsonl", '{"prompt": "a", "image": "a.png"}')
    assert gather(path).jobs[0][1].image == str(tmp_path / "a.png")


def test_pruned_jobs(tmp_path):
    lines = [
        {"prompt": "a cat", "method": "pooled", "prune": [0.5, "fast"]},
        {"prompt": "a cat", "method": "pooled"},
        {"prompt": "a cat", "method": "shared", "prune": 0.5},
        {"prompt": "a cat", "method": "pooled", "prune": "half"},
    ]
    parsed = gather(write(tmp_path, "jobs.jsonl", "\n".join(map(json.dumps, lines))))
    share, fast, whole = [job for _, job in parsed.jobs]
    assert share.config.prune.keep == 0.5 and fast.config.prune.keep == 0.35
    assert whole.config.prune is None
    assert len({share.id, fast.id, whole.id}) == len({share.shape, fast.shape, whole.shape}) == 3
    assert share.output.startswith("a-cat-pooled-prune-0-5-s0-")
    first, second = (p.reason for p in parsed.problems)
    assert "cannot run on pruned ones" in first
    assert "prune is the share of the tokens that run" in second
    [(_, job)] = gather(write(tmp_path, "j.csv", "prompt,method,prune\na,pooled,0.5\n")).jobs
    assert job.config == share.config


def test_a_profile_is_what_it_stands_for():
    own = speeds.options("balanced")
    job = Job("a cat", speed="balanced")
    assert (job.method, job.step_cache, job.speed) == (own["method"], own["step_cache"], None)
    assert job.id == Job("a cat", **own).id != Job("a cat", method=own["method"]).id
    assert Job.from_dict(job.to_dict()) == job and "cache-0-1" in job.output
    assert Job("a cat", speed="balanced", step_cache=0.02).step_cache == 0.02
    assert job.shape != Job("a dog", speed="balanced").shape  # each decides for itself
    assert Job("a cat", method="dense", step_cache=0.1).boost.step_cache == 0.1
    for values, why in (
        ({"speed": "x"}, "speed is one of conservative, balanced, fast, not 'x'"),
        ({"speed": "fast", "method": "topk"}, "speed 'fast' has a method of its own"),
        ({"step_cache": 0}, "step_cache is a relative change > 0"),
    ):
        with pytest.raises(ValueError, match=why):
            Job("a cat", **values)
    assert parse_value("step_cache", "0.1") == 0.1
    rows = [{"prompt": "a"}, {"prompt": "b", "method": "topk"}, {"prompt": "c", "speed": "fast"}]
    found = [job.method for _, job in gather(rows, {"speed": "conservative"}).jobs]
    assert found == ["shared:safe", "topk", speeds.options("fast")["method"]]
    (_, job), *_ = gather(rows[2:], {"method": "dense"}).jobs
    assert job.method == speeds.options("fast")["method"]
