"""What evaluate measures beside distances: recognition, attention errors, LPIPS, tuned models."""

import copy
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from tiny import saved_tiny_wan
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel.config import AccelConfig
from dit_accel.evaluate import Study, look, perception
from dit_accel.evaluate.probe import attention_share
from dit_accel.evaluate.recognition import Recogniser, References
from dit_accel.evaluate.rows import Row, rows
from dit_accel.evaluate.run import Budget, evaluate
from dit_accel.evaluate.tables import attention_mean
from dit_accel.generation.loading import EMBEDDED, load_pipeline
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.media import quality
from dit_accel.methods import Call

GENERATION = {"height": 96, "width": 96, "num_frames": 5, "num_inference_steps": 4, "fps": 8}
TEMPLATE = AccelConfig(dit_accel.TopK(), dit_accel.Schedule(warmup=1), min_tokens=0)
BASE = Request("-")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION, layers=3)


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device="cpu")


def test_attention_share_is_counted(loaded):
    pipe, defaults = loaded
    share = attention_share(pipe, defaults, BASE)
    n, inner = 2 * 6 * 6, 128
    attended = 3 * 4 * n * n * inner  # three layers, QKᵀ and PV, two FLOPs each
    caught = {}

    def keep(module, args, kwargs):
        caught.update(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    generate(pipe, defaults, replace(BASE, steps=1))
    hook.remove()
    with FlopCounterMode(display=False) as counter:
        pipe.transformer(**caught)
    counts = counter.get_flop_counts()["Global"]
    other = sum(v for op, v in counts.items() if "attention" not in str(op))
    assert share == pytest.approx(attended / (attended + other), rel=1e-6)
    assert not pipe.transformer._forward_hooks


def test_attention_errors_are_those_of_the_method_at_each_call(loaded, tmp_path):
    pipe, defaults = loaded
    study = Study(pipe, defaults, BASE, tmp_path)
    methods = [dit_accel.TopK(0.3), dit_accel.Pooled(0.3), dit_accel.Rettention(0.3)]
    table = [Row(m.name, m.name, replace(TEMPLATE, method=m)) for m in methods]
    table.append(Row("dense", "dense", replace(TEMPLATE, method=dit_accel.Dense())))
    data = evaluate(study, table, ["a cat"], [0], budget=Budget(limit=0), attention=True)
    found = data["attention"]
    assert set(found) == {"topk", "pooled", "rettention"}
    for layers in found.values():
        assert set(layers) == {0, 1, 2}
        assert all(set(steps) == {1, 2, 3} for steps in layers.values())  # step 0 is warm-up
    assert all(steps[1] < 1e-5 for steps in found["rettention"].values())  # its full step
    assert 0 < attention_mean(found["pooled"]) < attention_mean(found["topk"])
    q, k, v = torch.randn(3, 1, 2, 72, 64)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    tried = dit_accel.attention(q, k, v, methods[0])
    call = Call(keep=1.0, layers=(0,), step=1, steps=4, passname="cond")
    with_look = _look_once(table[:1], q, k, v, out, call)
    assert with_look == pytest.approx(float((tried - out).norm() / out.norm()))
    assert (
        evaluate(
            Study(pipe, defaults, BASE, tmp_path),
            table,
            ["a cat"],
            [0],
            budget=Budget(0),
            attention=True,
        )["attention"]
        == found
    )
    assert "| topk |" in (tmp_path / "attention.md").read_text()


def _look_once(table, q, k, v, out, call):
    """The error that `look` books for one call."""
    found = {row.name: {} for row in table}
    look.Look(table, found)(q, k, v, out, call)
    return found[table[0].name][0][call.step]


def test_what_is_asked_for_is_recognised():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 256, (3, 9, 32, 32, 4), dtype=torch.uint8, generator=generator)
    whole[..., :3] = (whole[..., :3].float() * (whole[..., 3:].float() / 255)).byte()
    colours = {"red": (229, 57, 53), "blue": (30, 136, 229)}
    names = ["cat", "hot dog", "bat"]
    references = References.of(whole[:, ::4], names, [0, 4, 8], colours, 16)
    assert references.asked("hot dog on a blue background") == ("hot dog", "blue")
    for prompt in ("a cat", "cow on a blue background", "cat on a green background"):
        assert references.asked(prompt) is None
    clip = whole[1, ::2]  # every second frame, as a model of that stride makes them
    ground = torch.tensor(colours["blue"])
    seen = clip[..., :3].float() + (1 - clip[..., 3:].float() / 255) * ground
    noisy = (seen + 20 * torch.randn(seen.shape, generator=generator)).clamp(0, 255).byte()
    assert references.nearest(noisy, stride=2) == ("hot dog", "blue")
    prompts = ["hot dog on a blue background", "cat on a blue background", "anything"]
    assert Recogniser(references, 2).judge(prompts, [noisy] * 3) == [
        {"emoji": True, "colour": True},
        {"emoji": False, "colour": True},
        {},
    ]


def test_references_are_kept_in_a_file(tmp_path):
    references = References(torch.arange(128).byte().view(1, 2, 4, 4, 4), ["cat"], [0, 8], {})
    path = tmp_path / "clips.safetensors"
    references.save(path)
    again = References.load(path, {"red": [255, 0, 0]})
    assert torch.equal(again.rgba, references.rgba)
    assert (again.names, again.frames, again.colours) == (["cat"], [0, 8], {"red": (255, 0, 0)})
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="does not hold the small training clips"):
        References.load(path)


def test_every_shipped_training_clip_is_told_from_the_others():
    found = Recogniser.of(None)
    references = found.references
    known = json.loads((EMBEDDED / "training.json").read_text())["held_out"]
    assert sorted(references.names) == sorted(known) and len(known) > 1
    colour, rgb = next(iter(references.colours.items()))
    for number, name in enumerate(references.names):
        rgba = references.rgba[number].float()
        seen = rgba[..., :3] + (1 - rgba[..., 3:] / 255) * torch.tensor(rgb)
        clip = seen.byte().repeat_interleave(2, 1).repeat_interleave(2, 2)
        # the five frames stand where those of a model with the coarsest stride stand
        assert references.nearest(clip, stride=references.frames[1]) == (name, colour)


def test_other_models_are_not_recognised(model):
    assert "are not at hand" in Recogniser.of(str(model))


def test_recognition_is_in_the_table(loaded, tmp_path):
    pipe, defaults = loaded
    references = References(
        torch.zeros(1, 1, 16, 16, 4, dtype=torch.uint8), ["cat"], [0], {"red": (200, 0, 0)}
    )
    study = Study(pipe, defaults, BASE, tmp_path, recogniser=Recogniser(references, 1))
    row = Row("topk 40%", "topk", replace(TEMPLATE, method=dit_accel.TopK(0.4)))
    data = evaluate(study, [row], ["cat on a red background", "a cat"], [0])
    assert [cell.get("emoji") for cell in data["cells"]] == [True, None]
    assert data["dense"]["emoji"] == data["rows"][0]["colour"] == 1.0
    assert "| 100.0% |" in (tmp_path / "table.md").read_text()


def test_lpips_says_why_it_is_absent_and_runs_where_it_is_not(tmp_path, monkeypatch):
    why = perception.find("cpu")
    assert "is not installed" in why or "nothing is downloaded" in why
    made = []

    class Distance:
        def __init__(self, net_type, normalize):
            assert (net_type, normalize) == ("alex", True)
            made.append(self)

        def to(self, device):
            return self

        def reset(self):
            self.found = []

        def update(self, a, b):
            assert a.shape[1] == 3 and float(a.min()) >= 0 and float(a.max()) <= 1
            self.found.append((a - b).abs().mean((1, 2, 3)))

        def compute(self):
            return torch.cat(self.found).mean()

    module = types.ModuleType("torchmetrics.image.lpip")
    module.LearnedPerceptualImagePatchSimilarity = Distance
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)
    monkeypatch.setattr(perception, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "nothing is downloaded unasked" in perception.find("cpu")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    black = torch.zeros(20, 8, 8, 3, dtype=torch.uint8)
    distance = perception.find("cpu")
    for level in (51, 102):
        assert distance(black, black + level) == pytest.approx(level / 255)
    assert len(made) == 1, "the network is read once, not for every clip"


def test_two_files_of_learned_weights_are_two_rows(tmp_path):
    method, paths = dit_accel.SLA(0.4), []
    for name in ("one", "two"):
        learned = {"layers.0.weight": torch.eye(64), "layers.0.bias": torch.zeros(64)}
        paths.append(str(tmp_path / f"{name}.safetensors"))
        method.with_weights(learned).save(tmp_path / f"{name}.safetensors")
    found = rows([], (0.4,), 4, TEMPLATE, sla=[*paths, paths[0]])
    assert [row.name for row in found] == [f"sla 40% ({path})" for path in paths]
    (alone,) = rows([], (0.4,), 4, TEMPLATE, sla=paths[:1])
    assert alone.name == "sla 40%"


def test_a_fine_tuned_model_is_a_row_of_its_own(loaded, tmp_path):
    pipe, defaults = loaded
    out = tmp_path / "sla40"
    out.mkdir()
    learned = {"layers.0.weight": torch.eye(64), "layers.0.bias": torch.zeros(64)}
    method = dit_accel.SLA(0.4)
    method.with_weights(learned).save(out / "sla.safetensors")
    preset = AccelConfig(replace(method, weights=str(out / "sla.safetensors")))
    preset.save(out / "preset.json")
    (plain,) = rows([], (0.4,), 4, TEMPLATE, sla=[str(out)])
    assert plain.transformer is None
    tuned = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        tuned.proj_out.weight.mul_(1.5)
    tuned.save_pretrained(out / "transformer")
    moved = out.rename(tmp_path / "moved")
    (row,) = rows([], (0.4,), 4, TEMPLATE, sla=[str(moved)])
    assert row.name == "sla 40%, moved"
    study = Study(pipe, defaults, BASE, tmp_path / "eval")
    stock = pipe.transformer
    cell = study.cell(row, "a cat", 0)
    assert pipe.transformer is stock
    other = type(pipe)(**{**pipe.components, "transformer": tuned})
    other.set_progress_bar_config(disable=True)
    with dit_accel.accelerated(other, row.config):
        made = generate(other, defaults, Request("a cat", seed=0))
    dense = generate(pipe, defaults, Request("a cat", seed=0))
    near = quality.quality(dense.frames, made.frames)
    assert cell["psnr"] == pytest.approx(near.psnr_mean)
    (moved / "transformer").rename(moved / "lora")
    (adapted,) = rows([], (0.4,), 4, TEMPLATE, sla=[str(moved)])
    assert adapted.transformer == str(moved / "lora")
    with pytest.raises(ValueError, match="lacks preset.json"):
        rows([], (0.4,), 4, TEMPLATE, sla=[str(tmp_path)])
