"""A run in this process with a tiny pipeline: clips, resuming, failures and refusals."""

import json
import subprocess

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from small_batches import SMALL, events, files, go
from tiny import WORDS, tiny_wan

from dit_accel.batch import Settings, run
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Manifest
from dit_accel.batch.render import remembered_prompts, render
from dit_accel.batch.weights import Weights
from dit_accel.batch.worker import DeviceLost
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.media import metadata, video


def test_a_clip_is_what_generate_gives(pipe, tmp_path, monkeypatch):
    written, save = [], video.save

    def spy(path, frames, *rest):
        written.append(frames)
        return save(path, frames, *rest)

    monkeypatch.setattr(video, "save", spy)
    assert go(pipe, tmp_path, [{"prompt": "a cat", "seed": 3, "name": "cat"}]).ok
    request = Request("a cat", seed=3, steps=2, height=32, width=32, frames=5)
    alone = generate(pipe, Defaults.from_pipeline(pipe), request).frames
    assert np.array_equal(written[0], alone)
    assert video.read(tmp_path / "cat.mp4").shape == alone.shape


def test_finished_jobs_are_not_redone_and_new_ones_are_added(pipe, tmp_path):
    jobs = [{"prompt": "a cat", "seed": [1, 2]}]
    assert go(pipe, tmp_path, jobs).done == 2
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    summary = go(pipe, tmp_path, [*jobs, {"prompt": "a dog"}])
    assert summary.done == 3
    assert len(events(tmp_path, "started")) == 3
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["done"] * 3


def test_half_written_files_are_swept_and_never_count(pipe, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    half = tmp_path / f".{Job('a cat', **SMALL).output}.{dead.pid}.part.mp4"
    half.write_bytes(b"half a clip")
    summary = go(pipe, tmp_path, [{"prompt": "a cat"}])
    assert summary.ok and not half.exists() and len(files(tmp_path)) == 1


def test_every_nth_job_also_runs_dense(pipe, tmp_path):
    preset = tmp_path / "sparse.json"
    data = {"method": {"name": "topk", "keep": 0.1}, "schedule": {"warmup": 0}, "min_tokens": 0}
    preset.write_text(json.dumps(data))
    jobs = [{"prompt": "a cat", "seed": [1, 2], "height": 128, "width": 128}]
    defaults = {**SMALL, "method": str(preset)}
    summary = run(jobs, tmp_path / "out", pipe=pipe, defaults=defaults, check_every=2, show="none")
    rows = [json.loads(t) for t in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert "drift" not in rows[0]["report"]
    drift, clip = rows[1]["report"]["drift"], tmp_path / "out" / rows[1]["file"]
    dense = tmp_path / "out" / rows[1]["report"]["dense_file"]
    assert clip.read_bytes() != dense.read_bytes()
    assert 10 < drift["psnr"] < 100 and drift["latent_error"] > 0
    assert summary.drift["psnr_worst"] == drift["psnr"]
    assert rows[1]["report"]["kept"] < 1 and rows[1]["report"]["implementations"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert f'href="{dense.name}"' in page and page.count("<video") == 2


def test_several_at_once_are_the_clips_of_one_at_a_time(pipe):
    jobs = [Job("a cat", seed=n, **SMALL) for n in range(3)] + [Job("a red dog on a star", **SMALL)]
    defaults = Defaults.from_pipeline(pipe)
    together = render(Weights(pipe), defaults, jobs, lambda *a: None)
    for job, clip in zip(jobs, together, strict=True):
        [alone] = render(Weights(pipe), defaults, [job], lambda *a: None)
        apart = np.abs(alone.frames.astype(int) - clip.frames.astype(int))
        assert apart.max() <= 1
    assert not np.array_equal(together[0].frames, together[1].frames)


def test_prompts_are_encoded_once_and_the_pipeline_is_left_as_it_was(pipe):
    jobs = [Job("a cat", seed=n, **SMALL) for n in range(3)]
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *a: calls.append(1))
    plain = render(Weights(pipe), Defaults.from_pipeline(pipe), jobs[:1], lambda *a: None)[0]
    once = len(calls)
    with remembered_prompts(pipe) as reused:
        clips = [
            render(Weights(pipe), Defaults.from_pipeline(pipe), [j], lambda *a: None)[0]
            for j in jobs
        ]
    handle.remove()
    assert len(calls) == 2 * once and reused() == 2
    assert np.array_equal(plain.frames, clips[0].frames)
    assert "encode_prompt" not in vars(pipe)


def test_not_numbers_are_a_failure_of_that_clip_alone(tmp_path):
    pipe = tiny_wan()
    with torch.no_grad():
        pipe.text_encoder.shared.weight[3 + WORDS.index("fish")] = float("nan")
    jobs = [{"prompt": ["a cat", "a fish", "a dog"]}]
    summary = go(pipe, tmp_path, jobs, Settings(retries=1, batch=3))
    assert summary.done == 2
    [failure] = summary.failures
    assert "not numbers" in failure["error"] and failure["output"].startswith("a-fish")
    assert len(events(tmp_path, "retry")) == 1


def test_bad_luck_is_tried_again_and_told(pipe, tmp_path):
    left = [2]

    def unlucky(module, inputs):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the moon was in the way")

    handle = pipe.transformer.register_forward_pre_hook(unlucky)
    summary = go(pipe, tmp_path, [{"prompt": ["a cat", "a dog"]}], Settings(retries=1))
    handle.remove()
    assert summary.ok
    assert events(tmp_path, "retry") == ["RuntimeError: the moon was in the way"] * 2


def test_failed_jobs_stay_failed_until_asked(pipe, tmp_path):
    def never(module, inputs):
        raise RuntimeError("no")

    handle = pipe.transformer.register_forward_pre_hook(never)
    assert go(pipe, tmp_path, [{"prompt": "a cat"}]).failed == 1
    handle.remove()
    summary = go(pipe, tmp_path, [{"prompt": "a cat"}])
    assert summary.failed == 1 and "RuntimeError: no" in str(summary)
    assert go(pipe, tmp_path, [{"prompt": "a cat"}], retry_failed=True).ok


def test_jobs_the_model_cannot_take(pipe, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    jobs = [
        {"prompt": "a cat", "height": 40},
        {"prompt": "a cat", "frames": 6},
        {"prompt": "a cat", "image": str(tmp_path / "a.png")},
        {"prompt": "a dog"},
    ]
    with pytest.raises(ValueError, match=r"the model refuses 3 job\(s\) \(--keep-going") as refused:
        go(pipe, tmp_path / "out", jobs)
    assert "line 2: frames is a multiple of 4" in str(refused.value)
    assert not (tmp_path / "out").exists()
    summary = go(pipe, tmp_path / "out", jobs, Settings(keep_going=True))
    assert (summary.done, summary.failed) == (1, 3)
    words = ("height is a multiple of 16", "frames is a multiple of 4", "takes no image")
    for failure, expected in zip(summary.failures, words, strict=True):
        assert expected in failure["error"]


def test_a_lost_device_ends_the_worker_and_keeps_what_was_made(pipe, tmp_path):
    calls = []

    def lose(module, inputs):
        calls.append(1)
        if len(calls) > 4:  # one clip: two steps, two passes
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    handle = pipe.transformer.register_forward_pre_hook(lose)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        go(pipe, tmp_path, [{"prompt": ["a cat", "a dog"]}], Settings(retries=1))
    handle.remove()
    assert Manifest(tmp_path).counts() == {"waiting": 1, "running": 0, "done": 1, "failed": 0}
    assert go(pipe, tmp_path, [{"prompt": ["a cat", "a dog"]}]).ok


def test_a_picture_to_start_from(tmp_path):
    pipe = tiny_wan(kind=WanImageToVideoPipeline, in_channels=36)
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
    pictures = [str(tmp_path / f"{colour}.png") for colour in ("red", "blue")]
    jobs = [{"prompt": "a cat", "image": pictures}, {"prompt": "a dog"}]
    summary = go(pipe, tmp_path / "out", jobs, Settings(batch=4, keep_going=True))
    assert summary.done == 2
    assert "starts from a picture" in summary.failures[0]["error"]
    first, second = (video.read(tmp_path / "out" / name) for name in files(tmp_path / "out"))
    assert not np.array_equal(first, second)


def test_an_interrupted_run_holds_no_job(pipe, tmp_path):
    def interrupt(module, inputs):
        raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(pipe, tmp_path, [{"prompt": "a cat"}])
    handle.remove()
    assert Manifest(tmp_path).counts()["waiting"] == 1
    assert not files(tmp_path)
    assert go(pipe, tmp_path, [{"prompt": "a cat"}]).ok


def test_refused_before_anything_is_generated(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"1 job\(s\) refused.*\n  line 2: unknown key 'sedd'"):
        go(pipe, tmp_path / "a", [{"prompt": "a cat"}, {"prompt": "a cat", "sedd": 1}])
    assert not (tmp_path / "a").exists()
    summary = go(
        pipe, tmp_path / "a", [{"prompt": "a cat"}, {"sedd": 1}], Settings(keep_going=True)
    )
    assert summary.done == 1 and summary.refused[0]["line"] == 2 and not summary.ok
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match="is a file"):
            go(pipe, out, [{"prompt": "a cat"}])
    with pytest.raises(ValueError, match="there is no job"):
        go(pipe, tmp_path / "b", [])
    with pytest.raises(ValueError, match="workers is at least 1"):
        run([{"prompt": "a cat"}], tmp_path / "b", workers=0)
    with pytest.raises(ValueError, match="batch is at least 1"):
        Settings(batch=0)


def test_a_folder_belongs_to_one_model(pipe, tmp_path):
    go(pipe, tmp_path, [{"prompt": "a cat"}])
    Manifest(tmp_path).set("model", "another/model")
    with pytest.raises(ValueError, match="holds clips of another/model"):
        go(pipe, tmp_path, [{"prompt": "a cat"}])


def test_a_step_cache_and_a_profile(pipe, tmp_path):
    """Of each job alone, whatever is made with it in a call; refused where there can be none."""
    from dit_accel.api import step_cache_of

    jobs = [
        {"prompt": ["a cat", "a dog"], "speed": "balanced", "steps": 6},
        {"prompt": "a cat", "method": "dense", "step_cache": 1e9, "steps": 6},
        {"prompt": "a cat", "method": "dense", "steps": 6, "name": "dense"},
    ]
    summary = go(pipe, tmp_path, jobs, settings=Settings(batch=4))
    assert summary.done == 4 and step_cache_of(pipe.transformer) is None
    facts = [metadata.read(path) for path in sorted(tmp_path.glob("*.mp4"))]
    boosts = [(fact["boost"] or {}).get("step_cache") for fact in facts]
    assert sorted(boosts, key=str) == [0.1, 0.1, 1e9, None]
    clips = {path.name: video.read(path) for path in tmp_path.glob("a-cat-dense*.mp4")}
    assert not any(
        np.array_equal(clip, video.read(tmp_path / "dense.mp4")) for clip in clips.values()
    )
    one = tiny_wan(layers=1)
    with pytest.raises(ValueError, match="(?s)the model refuses 1 job.*it has one block only"):
        go(one, tmp_path / "one", [{"prompt": "a cat", "speed": "fast"}])
