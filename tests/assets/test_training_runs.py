"""Every script end to end on three synthetic clips: train, resume, export, compress, evaluate."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

CALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def run(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy training of both stages, the second one resumed once."""
    import train_dit
    import train_vae
    from clips import Clips
    from models import TINY

    out = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    clips = Clips.load(archive, "cpu")
    train_vae.train(clips, out, TINY, 1, 1, False, 40, compile_parts=False)
    train_dit.train(clips, out, TINY, 1, 1, False, 50, compile_parts=False)
    train_dit.train(clips, out, TINY, 1, 1, True, 50, compile_parts=False)
    return out


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_losses_fall_and_steps_go_on(run: Path) -> None:
    vae, dit = _lines(run / "vae.jsonl"), _lines(run / "dit.jsonl")
    assert [line["step"] for line in vae] == [20, 40]
    assert vae[1]["loss"] < vae[0]["loss"]
    assert [line["step"] for line in dit] == [50, 100]
    assert dit[1]["loss"] < dit[0]["loss"]
    assert dit[1]["seconds"] > dit[0]["seconds"]


def test_checkpoint_returns_what_was_saved(tmp_path: Path) -> None:
    from run_state import Progress, load, save

    big = {f"p{i}": torch.randn(2**20) for i in range(9)}
    save(tmp_path / "c", big, Progress(7, 12.5), {"note": 1})
    save(tmp_path / "c", big, Progress(8, 13.5), {"note": 2})
    shards = sorted((tmp_path / "c").glob("*.safetensors"))
    assert len(shards) == 2 and max(s.stat().st_size for s in shards) < 16 * 2**20
    tensors, progress, extra = load(tmp_path / "c")
    assert (progress, extra) == (Progress(8, 13.5), {"note": 2})
    assert all(torch.equal(tensors[k], v.to(torch.bfloat16)) for k, v in big.items())


def test_transformer_needs_a_finished_autoencoder(tmp_path: Path) -> None:
    from run_state import Progress, save
    from train_dit import load_vae

    with pytest.raises(ValueError, match="train that stage first"):
        load_vae(tmp_path / "vae", torch.device("cpu"))
    save(tmp_path / "vae", {}, Progress(1, 1.0), {"sizes": {}})
    with pytest.raises(ValueError, match="resume stage vae first"):
        load_vae(tmp_path / "vae", torch.device("cpu"))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model as a stock folder."""
    import export

    out = tmp_path_factory.mktemp("export")
    export.pipeline(run).save_pretrained(out)
    (out / "generation.json").write_text(json.dumps({**export.GENERATION, **CALL}))
    return out


def test_export_loads_and_generates(exported: Path) -> None:
    pipe = WanPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    video = pipe("rocket on a blue background", output_type="pt", **CALL).frames
    assert video.shape == (1, 9, 3, 32, 32) and video.isfinite().all()
    assert (
        pipe.tokenizer("Rocket, ON a qqq").input_ids == pipe.tokenizer("rocket on a zzz").input_ids
    )


def test_a_folder_begins_a_run_that_goes_on(run: Path, exported: Path, tmp_path: Path) -> None:
    import shutil

    from begin import begin
    from run_state import load

    tensors, _, extra = load(run / "dit")
    folder = shutil.copytree(exported, tmp_path / "folder")
    with pytest.raises(ValueError, match="names the emoji"):
        begin(folder, tmp_path / "run", 60.0)
    (folder / "training.json").write_text(json.dumps({"held_out": dict.fromkeys(extra["names"])}))
    begin(folder, tmp_path / "run", 60.0)
    again, progress, found = load(tmp_path / "run" / "dit")
    assert progress.seconds == 60 and found == extra
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_compressed_folder_loads_in_float32(exported: Path, tmp_path: Path) -> None:
    import compress

    prompts, defaults = ["rocket on a blue background"] * 2, exported / "generation.json"
    pipe = WanPipeline.from_pretrained(exported, torch_dtype=torch.float32)
    pipe.text_encoder.float()
    inputs = compress.calibrate(pipe, json.loads(defaults.read_text()), prompts, 1)
    assert "transformer.blocks.1.ffn.net.2" in inputs.sums
    compress.write(exported, tmp_path / "small", inputs)
    again = WanPipeline.from_pretrained(tmp_path / "small")
    for part in ("transformer", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(again, part).parameters()} == {torch.float32}


def test_evaluation_reports_every_number(
    exported: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate
    from clips import Clips

    from dit_accel.evaluate.recognition import References

    small, clips = tmp_path / "small.safetensors", Clips.load(archive, "cpu")
    frames = list(range(clips.rgba.shape[1]))
    References.of(clips.rgba, clips.names, frames, clips.colours, 4).save(small)
    command = ["evaluate.py", "--device", "cpu"]
    command += ["--model", exported, "--data", archive, "--out", tmp_path, "--limit", "1"]
    command += ["--references", small, "--batch", "2"]
    command += ["--vae-clips", "1", "--grid", tmp_path / "grid.png"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rocket on a blue background\n")
    monkeypatch.setattr("sys.argv", [str(x) for x in (*command, "--grid-prompts", prompts)])
    evaluate.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"autoencoder", "trained", "held_out", "seconds_per_clip"} <= report.keys()
    assert report["held_out"]["prompts"] == 1 and (tmp_path / "grid.png").exists()
