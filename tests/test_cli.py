"""The command line: exit codes, one-sentence errors, files, and a real Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from diffusers import WanImageToVideoPipeline
from PIL import Image
from tiny import saved_tiny_wan, tiny_wan

from dit_accel import __version__
from dit_accel.cli import main as cli
from dit_accel.generation.options import parse_size, parse_warmup
from dit_accel.media import video
from dit_accel.runtime import state

GENERATION = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "fps": 8}
SPARSE = ["--min-tokens", "0", "--warmup", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", "dit_accel", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("name", [None, *(c.name for c in cli.app.registered_commands)])
def test_help_is_quick_and_imports_nothing_heavy(name):
    words = ["--help"] if name is None else [name, "--help"]
    code = (
        f"import sys; from dit_accel.cli import main; main.run({words}); "
        "sys.exit(str({'torch', 'diffusers', 'numpy', 'av', 'jinja2'} & set(sys.modules) or ''))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert "--help" in done.stdout
    assert time.perf_counter() - began < 5


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"dit-accel {__version__}\n"


def test_no_command_prints_help(capsys):
    assert cli.run([]) == 0
    assert "compare" in capsys.readouterr().out


def test_methods_lists_them_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["methods"]) == 0
    out = capsys.readouterr().out
    assert "dense" in out
    assert "topk:fast" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "Missing argument"),
        (["dance"], "No such command 'dance'"),
        (["generate", "x", "--steps", "many"], "'--steps'"),
        (["generate", "x", "--wings", "2"], "No such option"),
        (["app", "--wings"], "No such option"),
        (["app", "--queue", "0"], "queue is a number of visitors"),
        (["app", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["app", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["app", "rocket"], "add --make-examples"),
        (["app", "--make-examples", "zebra"], "no example 'zebra'"),
        (["bench", "--device", "tpu"], "'--device'"),
        (["bench", "--op", "softmax"], "unknown name 'softmax'"),
        (["bench", "--block", "32"], "block is 64 or 128"),
        (["bench", "--keep", "2", "--shape", "cpu-4k"], "keep "),
        (["bench", "--rounds", "0"], "rounds is a number"),
        (["bench", "--rows", "stock"], "--rows belongs to whole models"),
        (["bench", "--e2e", "--clock", "cpu"], "--clock belongs to operators"),
        (["bench", "--crossover", "--keep", "0.5"], "leave --keep out"),
        (["bench", "--crossover", "--backward"], "leave --backward out"),
        (["bench", "--e2e", "--tiny", "--min-tokens", "9"], "leave --min-tokens out"),
        (["bench", "--e2e", "--model", "best"], "unknown model 'best'"),
        (["bench", "--e2e", "--table", "none.json"], "there is no record none.json"),
        (["finetune"], "name it with --out"),
        (["finetune", "-o", "out", "--train", "all"], "train is one of projection"),
        (["generate", " "], "the prompt is empty"),
        (["generate", "x", "--steps", "0"], "steps lies from 1"),
        (["generate", "x", "--size", "big"], "size is WIDTHxHEIGHT"),
        (["generate", "x", "--size", "8x8"], "height lies from 16"),
        (["generate", "x", "--frames", "9999"], "frames lies from 1"),
        (["generate", "x", "--fps", "0"], "fps lies from 1"),
        (["generate", "x", "--method", "magic"], "unknown method 'magic'"),
        (["generate", "x", "--method", "topk:magic"], "no preset 'magic'"),
        (["generate", "x", "--keep", "1.5"], "lies in (0, 1], not 1.5"),
        (["compare", "x", "--keep", "0"], "lies in (0, 1], not 0"),
        (["compare", "x", "--warmup", "soon"], "warmup is a share"),
        (["compare", "x", "--order", "zigzag"], "unknown order 'zigzag'"),
        (["compare", "x", "--prune", "half"], "prune is the share of the tokens that run"),
        (["compare", "x", "--prune", "2"], "keep is the share of tokens that run, in [0, 1]"),
        (["compare", "x", "--prune", "0.5", "--method", "shared"], "cannot run on pruned ones"),
        (["generate", "x", "--sampler", "ddim"], "a sampler is rcm, dmd"),
        (["generate", "x", "--step-cache", "0"], "step_cache is a relative change > 0"),
        (["generate", "x", "-o", "clip.txt"], "ends in .mp4, .gif, .webp"),
        (["generate", "x", "--device", "toaster"], "unknown device 'toaster'"),
        (["generate", "x", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["generate", "x", "--image", "none.png"], "there is no picture none.png"),
        (["generate", "x", "--model", "./none"], "there is no folder ./none"),
        (["generate", "x", "--model", "."], "has no model_index.json"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(capsys, tmp_path, arguments, says):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "72x64"], "width is a multiple of 16 for this model, not 72"),
        (["--frames", "10"], "frames is a multiple of 4 plus one"),
        (["--warmup", "2"], "2 dense warm-up steps in a run of 2"),
    ],
)
def test_what_the_model_cannot_do(capsys, model, tmp_path, arguments, says):
    run = ["generate", "a cat", "--model", model, "--min-tokens", "0", *arguments]
    assert cli.run(run) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_unet_is_refused(capsys, tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2D"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert cli.run(["generate", "x", "--model", str(tmp_path)]) == 2
    assert "StableDiffusionPipeline, which has a UNet" in capsys.readouterr().err


def test_generate_names_the_file_after_the_prompt(capsys, model, tmp_path):
    assert cli.run(["generate", "A cat, red!", "--model", model, "--seed", "3", *SPARSE]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a-cat-red-3.mp4"]
    assert video.read(tmp_path / "a-cat-red-3.mp4").shape == (9, 64, 64, 3)
    out, err = capsys.readouterr()
    assert "64×64, 9 frames" in out
    assert "shared" in out
    assert "denoise: " in err
    assert "the words 'cat,', 'red!'" not in err


def test_generate_says_which_words_mean_nothing(capsys, model):
    assert cli.run(["generate", "a zebra", "--model", model, "--method", "dense"]) == 0
    assert "never shown the words 'zebra'" in capsys.readouterr().err


def test_a_state_is_announced_and_refused_in_one_sentence(capsys, model, monkeypatch):
    arguments = ["generate", "a cat", "--model", model, *SPARSE, "--method"]
    assert cli.run([*arguments, "rettention"]) == 0
    assert capsys.readouterr().err.count("note: the state of rettention takes") == 1
    monkeypatch.setattr(state, "free_bytes", lambda device: 0)
    assert cli.run([*arguments, "rettention"]) == 2
    said = capsys.readouterr().err
    assert "error: the state of rettention takes" in said and "Traceback" not in said
    assert cli.run([*arguments, "shared"]) == 0
    said = capsys.readouterr()
    assert "layers from 0 on run without one" in said.err
    assert "no room for the state of the layers from 0 on" in said.out


def test_a_single_frame_is_a_picture(model, tmp_path):
    run = ["generate", "a cat", "--model", model, "--frames", "1", "--size", "32x64", *SPARSE]
    assert cli.run(run) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a-cat.png"]


def test_compare_writes_and_prints(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = ["compare", "a cat", "--model", model, "--keep", "0.5", "-o", "out/cat", *SPARSE]
    run += ["--sampler", "flow:3", "--steps", "3"]
    assert cli.run(run) == 0
    report = json.loads((tmp_path / "out" / "cat" / "report.json").read_text())
    assert report["attention"]["config"]["method"]["keep"] == 0.5
    assert report["sampler"] == "flow:3"
    assert "<dd>flow:3</dd>" in (tmp_path / "out" / "cat" / "report.html").read_text()
    out = capsys.readouterr().out
    assert "denoising loop" in out
    assert "report.html" in out
    assert f"{report['quality']['psnr_mean']:.1f} dB" in out


@pytest.mark.parametrize(
    ("where", "what", "waiting"),
    [
        ("device", "cuda:0", True),
        ("device", "cpu", False),
        ("steps", [0.01, 0.2, 0.2], False),
        ("graphs", True, False),
        ("prune", {"keep": 0.5}, False),
    ],
)
def test_compare_says_what_a_gpu_that_waits_for_python_needs(where, what, waiting):
    from dit_accel.cli.compare import waits

    told = {"device": "cuda:0", "steps": [0.2, 0.01, 0.02], "graphs": False, "prune": None}
    told[where] = what
    report = {
        "device": told["device"],
        "times": {"accelerated": {"steps": told["steps"]}},
        "boost": {"graphs": told["graphs"]},
        "attention": {"config": {"prune": told["prune"]}},
    }
    assert waits(report) == waiting


def test_a_first_picture(capsys, tmp_path):
    model = tmp_path / "i2v"
    tiny_wan(kind=WanImageToVideoPipeline, in_channels=36).save_pretrained(model)
    Image.new("RGB", (80, 60), "red").save("red.png")
    run = ["compare", "a cat", "--model", str(model), "--size", "64x64", "--frames", "9"]
    run += ["--steps", "2", "-o", "out", *SPARSE]
    assert cli.run(run) == 2
    assert "starts from a picture: give one with --image" in capsys.readouterr().err
    assert cli.run([*run, "--image", "red.png"]) == 0
    report = json.loads(Path("out", "report.json").read_text())
    space = {}
    exec(report["python"], space)
    assert space["handle"].report().kept == report["kept"]


def test_ctrl_c_leaves_nothing_half_written(model, tmp_path):
    """A real SIGINT, in the middle of a run long enough to be hit."""
    (tmp_path / "cat.mp4").write_text("old")
    run = command(
        "generate", "a cat", "--model", model, "--steps", "1000", "-o", "cat.mp4", *SPARSE
    )
    for line in run.stderr:
        if line.startswith("encode"):
            break
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert (tmp_path / "cat.mp4").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "cat.mp4"]


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background job ignores SIGINT, and so would these tests and their processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_writing(model, tmp_path, monkeypatch, number, code):
    """The encoder is stopped in the middle of its file."""

    def stopped(path: Path, frames, fps, tags):
        path.write_text("half")
        signal.raise_signal(number)

    monkeypatch.setattr(video, "encode", stopped)
    monkeypatch.setattr(
        sys, "argv", ["dit-accel", "generate", "a cat", "--model", model, "-o", "cat.mp4", *SPARSE]
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_the_unexpected_is_code_1_with_a_traceback(capsys, model, monkeypatch):
    def broken(*args, **options):
        raise ValueError("from deep inside")

    monkeypatch.setattr(video, "save_or_rescue", broken)
    assert cli.run(["generate", "a cat", "--model", model, *SPARSE]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "unexpected ValueError" in err


def test_parsers():
    assert parse_size("832x480") == (832, 480)
    assert parse_size("64X32") == (64, 32)
    assert parse_warmup("3") == 3
    assert isinstance(parse_warmup("3"), int)
    assert parse_warmup("0.2") == 0.2
