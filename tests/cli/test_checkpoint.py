"""--checkpoint: its weights, attention and sampler in every command; what is asked for wins."""

import json

import checkpoint_layouts as layouts
import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.cli import main as cli
from dit_accel.generation import facts as about
from dit_accel.media import metadata


@pytest.fixture(scope="module")
def base(turbowan):
    """The stock model's folder."""
    return str(turbowan[0])


@pytest.fixture(scope="module")
def turbo(turbowan):
    """A checkpoint of TurboWan's layout."""
    return str(turbowan[1])


def expected(base, *files, **options):
    """The clip by Python, as floats from 0 to 1."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    loaded = dit_accel.load_checkpoint(pipe, *files, min_tokens=0, **options)
    values = {"num_inference_steps": 6, "guidance_scale": 3.0} | loaded.arguments
    keys = ("height", "width", "num_frames", "max_sequence_length")
    values |= {name: layouts.GENERATION[name] for name in keys}
    generator = torch.Generator().manual_seed(0)
    return pipe("a rocket", **values, generator=generator, output_type="np").frames[0]


def made(here, words):
    """The frames that `generate` hands to the file, as floats from 0 to 1."""
    from dit_accel.generation import run as running

    seen = []
    original = running.generate

    def generate(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    running.generate = generate
    try:
        assert cli.run(["generate", "a rocket", "--min-tokens", "0", "-o", "x.mp4", *words]) == 0
    finally:
        running.generate = original
    return seen[-1].frames / 255


def test_generate_runs_it_as_it_was_trained(here, base, turbo, capsys):
    out = made(here, ["--model", base, "--checkpoint", turbo])
    assert np.abs(out - expected(base, turbo)).max() < 0.01
    said = "".join(capsys.readouterr())
    assert "TurboWan" in said and "in place of" not in said and "sparse" in said
    facts = metadata.read(here / "x.mp4")
    assert facts["method"] == "sla" and facts["checkpoint"]["files"] == [turbo]
    assert facts["arguments"]["num_inference_steps"] == 4
    assert (facts["config"]["schedule"]["warmup"], facts["config"]["method"]["keep"]) == (0, 0.1)
    assert cli.run(["show", "x.mp4"]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert "(TurboWan,samplerrcm:80)" in said and "load_checkpoint(pipe," in said


def test_the_lines_that_show_prints_make_the_clip_again(here, base, turbo):
    for words, options in (
        ([], {}),
        (["--keep", "0.6"], {"keep": 0.6}),
        (["--sampler", "flow:5"], {"sampler": "flow:5"}),
    ):
        first = made(here, ["--model", base, "--checkpoint", turbo, *words])
        lines = about.python(metadata.read(here / "x.mp4"))
        lines = lines.replace("output = pipe(", 'output = pipe(\n    output_type="np",')
        space = {}
        exec(lines, space)  # noqa: S102
        again = space["output"].frames[0]
        if options.get("sampler"):
            assert "sampler=False" in lines and "install(pipe" in lines
        else:
            assert np.abs(again - expected(base, turbo, **options)).max() < 1e-5
        assert np.abs(again - first).max() < 0.01


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "topk:fast"], "note: --method topk:fast in place"),
        (["--keep", "0.6"], "note: --keep 0.6 in place"),
        (["--speed", "fast"], "note: --speed fast in place"),
        (["--sampler", "flow:5"], "note: --sampler flow:5 in place"),
    ],
)
def test_what_is_asked_for_wins_and_is_told(here, base, turbo, capsys, words, says):
    made(here, ["--model", base, "--checkpoint", turbo, *words])
    assert says in " ".join("".join(capsys.readouterr()).split())
    facts = metadata.read(here / "x.mp4")
    method, name = facts["config"]["method"], words[0]
    if name == "--method":
        assert method["name"] == "topk"
    if name == "--speed":
        assert method["name"] == "shared"
    if name == "--keep":
        assert (method["name"], method["keep"]) == ("sla", 0.6)
    if name == "--sampler":
        assert facts["sampler"] == "flow:5" and facts["checkpoint"]["sampler"] is None


def test_its_own_method_by_name_keeps_what_was_learned(here, base, turbo):
    out = made(here, ["--model", base, "--checkpoint", turbo, "--method", "sla@0.6"])
    assert np.abs(out - expected(base, turbo, keep=0.6)).max() < 0.01


def test_compare_holds_dense_and_sparse_of_the_same_weights(here, base, turbo, capsys):
    words = ["--model", base, "--checkpoint", turbo, "--min-tokens", "0", "-o", "both"]
    assert cli.run(["compare", "a rocket", *words]) == 0
    data = json.loads((here / "both" / "report.json").read_text())
    assert data["method"] == "sla" and data["kept"] < 1
    assert data["checkpoint"]["family"] == "TurboWan" and "load_checkpoint" in data["python"]
    assert data["arguments"]["num_inference_steps"] == 4
    assert f"{turbo} (TurboWan)" in (here / "both" / "report.html").read_text()


def test_two_experts(here, tmp_path_factory, capsys):
    pair = {"transformer_2": True, "boundary_ratio": 0.5}
    folder = tmp_path_factory.mktemp("experts")
    layouts.base(**pair).save_pretrained(folder / "wan")
    (folder / "wan" / "generation.json").write_text(json.dumps(layouts.GENERATION))
    pipe, files = layouts.trained(**pair), []
    for name in ("high", "low"):
        path = folder / f"TurboWan2.2-{name}.pth"
        files.append(str(layouts.turbowan(path, pipe, layouts.projections(pipe))))
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    base = str(folder / "wan")
    words = ["--model", base, "--checkpoint", files[0], "--checkpoint", files[1]]
    out = made(here, words)
    assert np.abs(out - expected(base, *files)).max() < 0.01
    facts = metadata.read(here / "x.mp4")
    assert facts["checkpoint"]["files"] == files
    assert "load_checkpoint(pipe, " + json.dumps(files[0]) in about.python(facts)


def test_studies_and_diagnosis(here, base, turbo, capsys):
    with open("prompts.txt", "w") as file:
        file.write("a rocket\na cat\n")
    where = ["--model", base, "--checkpoint", turbo]
    few = ["--min-tokens", "0", "--prompts", "prompts.txt"]
    rows = ["--rows", "topk", "--keeps", "0.4", "--no-attention", "--limit", "4"]
    assert cli.run(["evaluate", "-o", "eval", *where, *few, *rows]) == 0
    data = json.loads((here / "eval" / "results.json").read_text())
    assert [row["row"] for row in data["rows"]][0] == "checkpoint" and data["steps"] == 4
    assert "TurboWan" in data["setting"]["model"]
    goal = ["--psnr", "10", "--keeps", ".4", "--methods", "topk", "--trials", "2"]
    assert cli.run(["tune", "-o", "tuned", *where, *few, *goal]) == 0
    tried = json.loads((here / "tuned" / "tuning.json").read_text())
    assert set(tried["sensitivity"]) == {"checkpoint", "topk"}
    preset = dit_accel.config.resolve(here / "tuned" / "preset.json")
    assert preset.method.name == "topk" or preset.method.tensors()
    capsys.readouterr()
    assert cli.run(["doctor", *where, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], said["dense_steps"]) == (4, 0)  # as it was trained
    assert cli.run(["profile", "a rocket", *where, "-o", "profile.json", "--min-tokens", "0"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "a", "--checkpoint", "none.pth"], "there is no checkpoint none.pth"),
        (
            ["generate", "a", "--checkpoint", "T", "--checkpoint", "T"],
            "give one file, not",
        ),
        (["generate", "a", "--checkpoint", "T", "--method", "magic"], "unknown method"),
        (["generate", "a", "--checkpoint", "T", "--steps", "9"], "makes 1 to 4 steps, not 9"),
        (["doctor", "--config-only", "--checkpoint", "T"], "leave --checkpoint out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(here, base, turbo, capsys, words, says):
    words = [turbo if word == "T" else word for word in words]
    extra = [] if words[0] == "doctor" else ["--model", base]
    assert cli.run([*words, *extra]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert says in err and "Traceback" not in err
    assert not list(here.glob("*.mp4"))


def test_another_models_checkpoint_is_refused(here, model, turbo, capsys):
    assert cli.run(["generate", "a rocket", "--model", model, "--checkpoint", turbo]) == 2
    assert "it was trained from another" in " ".join(capsys.readouterr().err.split())
