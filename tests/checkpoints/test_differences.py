"""Checkpoints that change weights: SLA's training on another base, low-rank pairs, conversion."""

import json

import checkpoint_layouts as layouts
import published as naive
import pytest
import torch
from diffusers import WanTransformer3DModel
from published import RCM, error
from runs import run
from safetensors.torch import load_file, save_file

import dit_accel
from dit_accel.checkpoints import convert

KEEP = 0.6


@pytest.fixture
def world(tmp_path):
    """What SLA was trained from, what came of it (its file, its projections)."""
    origin, trained = layouts.trained(seed=5), layouts.trained(seed=5)
    for x in trained.transformer.parameters():
        x.data = x.data + torch.randn_like(x) / 16
    learned = layouts.projections(trained)
    path = layouts.turbowan(tmp_path / "wan-sla.pth", trained, learned)
    start = layouts.in_folder(tmp_path / "origin" / "transformer", layouts.weights(origin)).parent
    return origin, trained, learned, path, start


def expected_on(pipe, origin, trained, learned):
    """The clip of the pipeline with the difference added."""
    own = dict(origin.transformer.named_parameters()), dict(trained.transformer.named_parameters())
    for name, x in pipe.transformer.named_parameters():
        x.data = x.data + (own[1][name] - own[0][name]).detach()
    with naive.attending(pipe, naive.sla(learned, KEEP)):
        return naive.clip(pipe, RCM)


def copy_of(pipe):
    new = layouts.base()
    new.transformer.load_state_dict(pipe.transformer.state_dict())
    return new


def test_a_whole_checkpoint_on_another_base(world):
    origin, trained, learned, path, start = world
    pipe = layouts.base()
    expected = expected_on(copy_of(pipe), origin, trained, learned)
    found = dit_accel.load_checkpoint(pipe, path, base=start, min_tokens=0, keep=KEEP)
    assert (found.unused, found.missing) == ([], [])
    assert error(run(pipe, steps=4, guidance=1.0), expected) < 1e-4


@pytest.mark.parametrize("published", [True, False])
def test_a_file_of_differences(world, tmp_path, published):
    """`.diff` and `.diff_b` of weights, a low-rank pair of one, in Wan's or diffusers' names."""
    origin, trained, learned, _, _ = world
    down, up = torch.randn(4, 192) / 8, torch.randn(192, 4) / 8
    trained.transformer.blocks[0].attn1.to_q.weight.data = (
        origin.transformer.blocks[0].attn1.to_q.weight.data + 8 / 4 * up @ down
    )
    own = dict(origin.transformer.named_parameters()), dict(trained.transformer.named_parameters())
    tensors = {}
    for name, x in own[1].items():
        name_, ending = layouts.wan_name(name) if published else name, ".diff"
        if name.endswith(".bias"):
            ending = ".diff_b"
        if name == "blocks.0.attn1.to_q.weight":
            continue
        base = name_.removesuffix(".weight").removesuffix(".bias")
        if base == name_:  # modulation tables are no module's weight
            base, ending = name_, ".diff"
        tensors[f"diffusion_model.{base}{ending}"] = (x - own[0][name]).detach()
    module = layouts.wan_name("blocks.0.attn1.to_q") if published else "blocks.0.attn1.to_q"
    tensors |= {
        f"diffusion_model.{module}.lora_down.weight": down,
        f"diffusion_model.{module}.lora_up.weight": up,
        f"diffusion_model.{module}.alpha": torch.tensor(8.0),
        "diffusion_model.blocks.0.lost.lora_up.weight": up.clone(),
    }
    save_file(tensors | learned, tmp_path / "sla-difference.safetensors")
    pipe = layouts.base()
    expected = expected_on(copy_of(pipe), origin, trained, learned)
    path = tmp_path / "sla-difference.safetensors"
    found = dit_accel.load_checkpoint(pipe, path, min_tokens=0, keep=KEEP)
    assert found.family == "SLA difference" and found.sampler is None
    assert found.unused == ["diffusion_model.blocks.0.lost.lora_up.weight"]
    own_sampler = run(pipe, steps=4, guidance=1.0)
    found.restore()
    dit_accel.accelerate(pipe, found.config)
    with dit_accel.samplers.sampling(pipe, "rcm"):
        assert error(run(pipe, steps=4, guidance=1.0), expected) < 1e-4
    assert own_sampler.isfinite().all()


def test_conversion_changes_nothing(world, tmp_path):
    """The folder gives the same clip as the file, and its transformer is one of diffusers'."""
    _, trained, learned, path, _ = world
    account = convert(path, out=tmp_path / "folder", dtype=None)
    assert account["family"] == "TurboWan" and account["parts"]["transformer"]["unused"] == []
    clips = []
    for source in (path, tmp_path / "folder"):
        pipe = layouts.base()
        found = dit_accel.load_checkpoint(pipe, source, min_tokens=0, keep=KEEP)
        assert (found.unused, found.missing, found.sampler) == ([], [], "rcm:80")
        clips.append(run(pipe, steps=4, guidance=1.0))
    assert torch.equal(*clips)
    preset = json.loads((tmp_path / "folder" / "preset.json").read_text())
    assert preset["method"]["weights"] == "sla.safetensors" and preset["schedule"]["warmup"] == 0
    handle = dit_accel.accelerate(layouts.base(), tmp_path / "folder" / "preset.json")
    assert handle.config.method.rounding == "down"  # the preset serves alone, too
    written = load_file(
        tmp_path / "folder" / "transformer" / "diffusion_pytorch_model-00001.safetensors"
    )
    assert set(written) == set(trained.transformer.state_dict())
    folder = tmp_path / "folder" / "transformer"
    (folder / "config.json").write_text(json.dumps(dict(trained.transformer.config)))
    again = WanTransformer3DModel.from_pretrained(folder)
    assert torch.equal(again.proj_out.weight, trained.transformer.proj_out.weight)


def test_conversion_of_differences_and_into_a_used_folder(world, tmp_path):
    _, _, _, path, start = world
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    convert(path, out=out)
    convert(path, out=out)
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.json", "note.txt", "preset.json", "sla.safetensors", "transformer"
    ]  # fmt: skip
    assert not list(tmp_path.glob(".out.part"))
    with pytest.raises(ValueError, match="there is no checkpoint"):
        convert(tmp_path / "none.pth", out=out)


def test_somebody_elses_weights_are_not_replaced(tmp_path):
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "transformer" / "mine.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="transformer was not written by this command"):
        convert(tmp_path / "x.safetensors", out=tmp_path / "model")
    assert (tmp_path / "model" / "transformer" / "mine.safetensors").read_text() == "mine"


@pytest.fixture
def plain(tmp_path):
    """A file of dense attention."""
    path = tmp_path / "720p_t2v.safetensors"
    save_file({"double_blocks.0.img_attn_q.weight": torch.ones(2, 2)}, path)
    return path


def test_pieces_of_an_earlier_conversion_go(world, plain, tmp_path):
    _, trained, learned, path, _ = world
    pair = [tmp_path / f"TurboWan-{name}.pth" for name in ("high", "low")]
    for file in pair:
        layouts.turbowan(file, trained, learned)
    out = tmp_path / "out"
    convert(*pair, out=out)
    (out / "note.txt").write_text("mine")
    assert (out / "transformer_2").is_dir()
    convert(path, out=out)
    assert not (out / "transformer_2").exists()
    assert dit_accel.load_checkpoint(layouts.base(), out).missing == []
    convert(plain, out=out)
    assert {p.name for p in out.iterdir()} == {"checkpoint.json", "note.txt", "transformer"}


def test_a_methods_file_of_the_users_stays(world, tmp_path, monkeypatch):
    path, mine = world[3], tmp_path / "mine"
    mine.mkdir()
    (mine / "sla.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="sla.safetensors was not written by this command"):
        convert(path, out=mine)
    assert [p.name for p in mine.iterdir()] == ["sla.safetensors"]
    (mine / "sla.safetensors").unlink()
    monkeypatch.chdir(mine)
    convert(path, out=".")
    assert {p.name for p in mine.iterdir()} == {
        "checkpoint.json", "preset.json", "sla.safetensors", "transformer"
    }  # fmt: skip


def test_a_part_that_the_account_does_not_name(plain, tmp_path):
    out = tmp_path / "out"
    convert(plain, out=out)
    layouts.in_folder(out / "transformer_2", {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="checkpoint.json names no part transformer_2: give"):
        dit_accel.load_checkpoint(layouts.base(), out)
    (out / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint.json names no part transformer: give"):
        dit_accel.load_checkpoint(layouts.base(), out)
