"""doctor: arithmetic on given times, a real layer, models known by their configuration only."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import saved_tiny_wan, tiny_flux, tiny_wan

import dit_accel
from dit_accel.cli import main as cli
from dit_accel.config import named
from dit_accel.doctor import diagnosis, sample
from dit_accel.doctor import run as doctor
from dit_accel.doctor.diagnosis import Outlook, dense_steps, recommend, state_bytes
from dit_accel.doctor.from_config import family_of, read_config, skeleton
from dit_accel.generation.loading import Defaults, load_pipeline
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.pipelines import registry
from dit_accel.pipelines.wan import ADAPTER

GENERATION = {"height": 96, "width": 96, "num_frames": 5, "num_inference_steps": 10, "fps": 8}
REQUEST = Request("a cat")
CPU, FP32 = torch.device("cpu"), torch.float32
COG = {
    "_class_name": "CogVideoXTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 7,
    "patch_size": 2,
    "use_rotary_positional_embeddings": True,
}
HUNYUAN = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 3,
    "num_single_layers": 5,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (16, 24, 24),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION, layers=3)


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device="cpu")


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(doctor, "ROUNDS", 1)


@pytest.fixture
def given_times(monkeypatch):
    """A layer of one second, 0.4 of it outside attention; topk takes 0.55, pooled 0.5."""
    seconds = {"dense": 1.0, "topk": 0.55, "pooled": 0.5, "rectified": 0.9, "sla": 2.0}
    real = doctor._run

    def run(who, config):
        found, handle = real(who, config)
        name = config.method.name
        if name == "rettention":
            raise RuntimeError("its state needs more memory\nmuch more")
        time = 0.4 if isinstance(config.method, doctor.Hollow) else seconds.get(name, 3.0)
        return dict.fromkeys(found, time), handle

    monkeypatch.setattr(doctor, "_run", run)


def test_arithmetic(loaded, given_times):
    who = sample.from_pipeline(*loaded, REQUEST)
    found = doctor.examine(who, steps=10)
    assert found.tokens == found.measured_tokens == 2 * 6 * 6
    assert (found.grid, found.layers, found.heads, found.head_dim) == ((2, 6, 6), 3, 2, 64)
    assert found.forward_seconds == pytest.approx(3.0)
    assert found.attention_share == pytest.approx(0.6)
    assert found.bound == pytest.approx(2.5)
    by_name = {o.method: o for o in found.outlook}
    # 2 of 10 steps are dense warm-up, and a quarter of the blocks is kept in the others
    assert by_name["topk"].ceiling == pytest.approx(1 / (0.4 + 0.6 * (0.2 + 0.8 * 0.25)))
    assert by_name["topk"].predicted == pytest.approx(1 / (0.2 + 0.8 * 0.55))
    assert by_name["rettention"].why == "its state needs more memory"
    assert by_name["rettention"].predicted is None
    advice = "Take pooled at keep 0.25, with --min-tokens 72: attention takes 60%"  # crossover: 512
    assert found.recommendation.startswith(advice)
    assert "--min-tokens" not in recommend(replace(found, tokens=5000))
    assert json.loads(json.dumps(found.to_dict()))["bound"] == found.bound


def test_few_steps(loaded, given_times):
    who = sample.from_pipeline(*loaded, REQUEST)
    found = doctor.examine(who, steps=4)
    said = next(note for note in found.notes if "--warmup 0" in note)
    assert said.startswith("dense of 4 steps: 1, with ") and "with shared 2" in said
    slow = replace(found, bound=1.05)
    assert "fewer steps" not in recommend(slow)
    assert "fewer steps" in recommend(replace(slow, steps=20))
    usual = doctor.examine(who, steps=20)
    ceiling = {n: {o.method: o.ceiling for o in d.outlook} for n, d in ((4, found), (20, usual))}
    share = found.attention_share
    usual_of_4 = pytest.approx(1 / (1 - share + share * (0.25 + 0.75 * 0.25)))
    assert (found.dense_steps, ceiling[4]["topk"]) == (1, usual_of_4)
    share = usual.attention_share
    assert ceiling[20]["topk"] == pytest.approx(1 / (1 - share + share * (0.15 + 0.85 * 0.25)))
    worth = replace(found, bound=9.0, outlook=[Outlook("topk", 0.25, 3.0, 2.0)])
    assert "Take topk at keep 0.25, with" in recommend(worth)
    assert "Take topk at keep 0.25 and --warmup 0" in recommend(replace(worth, dense_steps=0))
    slower = [Outlook("topk", 0.25, 3.0, 1.11), Outlook("pooled", 0.25, 3.0, 1.05)]
    assert "Take topk" in recommend(replace(worth, outlook=slower))  # pooled gains no tenth


def test_the_schedule_of_a_checkpoint(loaded, given_times):
    who = sample.from_pipeline(*loaded, REQUEST)
    found = doctor.examine(who, steps=4, schedule=dit_accel.Schedule(warmup=0))
    ceiling = {o.method: o.ceiling for o in found.outlook}
    share = found.attention_share
    assert ceiling["topk"] == pytest.approx(1 / (1 - share + share * 0.25))
    assert found.dense_steps == 0 and any("steps: 0, with" in note for note in found.notes)


def test_more_tokens_than_were_timed(loaded, given_times):
    who = replace(sample.from_pipeline(*loaded, REQUEST), scale=2.0)
    found = doctor.examine(who, steps=10)
    assert found.tokens == 2 * found.measured_tokens
    assert found.forward_seconds == pytest.approx(3 * (0.4 * 2 + 0.6 * 4))
    assert found.attention_share == pytest.approx(0.75)
    assert any("timed on fewer tokens" in note for note in found.notes)


def test_a_real_layer_and_the_model_as_it_was(loaded):
    pipe, defaults = loaded
    before = generate(pipe, defaults, replace(REQUEST, steps=2))
    who = sample.from_pipeline(pipe, defaults, REQUEST)
    found = doctor.examine(who, steps=10)
    assert 0 <= found.attention_share < 1
    assert found.forward_seconds > 0
    assert all(o.predicted for o in found.outlook)
    assert {o.method for o in found.outlook} == set(dit_accel.methods()) - {"dense", "ssta"}
    assert found.obstacles == []
    after = generate(pipe, defaults, replace(REQUEST, steps=2))
    assert torch.equal(before.latents, after.latents)
    hooks = (m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    assert not any(hooks)


def test_without_its_core_a_layer_gives_its_queries_through():
    hollow = doctor.Hollow()
    q, k, v = torch.randn(3, 1, 2, 128, 64).unbind()
    assert dit_accel.attention(q, k, v, hollow) is q
    assert hollow.seen == [(q.shape, FP32)]


def test_what_forces_dense_is_said(loaded, monkeypatch):
    def geometry(transformer, args):
        return ADAPTER.geometry(transformer, args)._replace(
            dense="its mask is causal", fixed_order="of a reason"
        )

    odd = replace(ADAPTER, geometry=geometry, span=None)
    monkeypatch.setitem(registry._EXTRA, "WanTransformer3DModel", odd)
    found = doctor.examine(sample.from_pipeline(*loaded, REQUEST), steps=10)
    assert found.obstacles == ["its mask is causal"]
    assert found.recommendation == "Leave it dense: its mask is causal."
    assert {o.why for o in found.outlook} == {"its mask is causal"}
    assert len(found.notes) == 2


def test_an_unknown_model_is_refused_with_the_reason(loaded, monkeypatch):
    monkeypatch.delitem(registry._HOME, "WanTransformer3DModel")
    with pytest.raises(ValueError, match="WanTransformer3DModel has no adapter"):
        sample.from_pipeline(*loaded, REQUEST)


def test_bytes_are_those_of_a_run(loaded):
    pipe, defaults = loaded
    said = state_bytes((1, 2, 72, 64), FP32, layers=3, passes=2)
    request = replace(REQUEST, steps=3, guidance=5.0)
    now = {"schedule": dit_accel.Schedule(warmup=0), "min_tokens": 0}
    for name, residual in (("rettention", "full"), ("rettention", "fp8"), ("shared", "pooled")):
        method = replace(named(name), residual=residual)
        with dit_accel.accelerated(pipe, method, **now) as handle:
            generate(pipe, defaults, request)
            assert handle.report().state_bytes == said[f"{name}, residual={residual!r}"]
    assert sample.from_pipeline(pipe, defaults, request).passes == 2
    assert sample.from_pipeline(pipe, defaults, replace(request, guidance=1.0)).passes == 1


def test_each_of_two_experts_has_a_state():
    bytes_of = {}
    for experts in (1, 2):
        two = {"transformer_2": True, "boundary_ratio": 0.5} if experts == 2 else {}
        pipe = tiny_wan(**two)
        known = Defaults(64, 64, 9, 6, 3.0, max_sequence_length=16)
        sampled = sample.from_pipeline(pipe, known, REQUEST)
        bytes_of[experts] = doctor.examine(sampled, steps=6).state_bytes
        now = {"schedule": dit_accel.Schedule(warmup=0), "min_tokens": 0}
        with dit_accel.accelerated(pipe, "shared", **now) as handle:
            generate(pipe, known, replace(REQUEST, steps=6))
            kept = handle.report().state_bytes
        assert bytes_of[experts]["shared, residual='full'"] == kept
    kept = {name: size for name, size in bytes_of[1].items() if "residual" in name}
    assert kept and all(bytes_of[2][name] == 2 * size for name, size in kept.items())


def test_a_large_clip_is_timed_small_on_a_processor(loaded, monkeypatch):
    monkeypatch.setitem(sample.MOST, "cpu", 50)
    who = sample.from_pipeline(*loaded, replace(REQUEST, height=128, width=128, frames=9))
    assert who.kwargs["hidden_states"].shape[-3:] == (3, 8, 8)  # 48 tokens instead of 192
    assert who.scale == 4


@pytest.mark.parametrize(
    ("size", "most", "small"),
    [
        ((81, 480, 832), None, (81, 480, 832)),
        ((81, 480, 832), 10**6, (81, 480, 832)),
        ((81, 480, 832), 20000, (41, 480, 832)),
        ((1, 1024, 1024), 1500, (1, 512, 512)),
        ((1, 32, 32), 1, (1, 32, 32)),
    ],
)
def test_shrinking(size, most, small):
    assert sample._shrunk(size, 16, 4, most) == small


def test_flux_is_two_kinds_of_layers():
    pipe = tiny_flux(double=2, single=3)
    defaults = Defaults.from_pipeline(pipe)
    who = sample.from_pipeline(pipe, defaults, Request("a cat", height=64, width=64))
    assert who.kinds() == {"transformer_blocks.0": 2, "single_transformer_blocks.0": 3}
    assert doctor.examine(who, steps=4).layers == 5


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox", "hunyuan"])
def test_a_model_without_its_weights(family):
    configs = {
        "wan": {**tiny_wan(layers=2).transformer.config, "num_layers": 30},
        "flux": {**tiny_flux().transformer.config, "num_layers": 19, "num_single_layers": 38},
        "cogvideox": COG,
        "hunyuan": HUNYUAN,
    }
    classes = {"wan": "WanTransformer3DModel", "flux": "FluxTransformer2DModel"}
    config = {**configs[family]}
    config.setdefault("_class_name", classes.get(family))
    frames = 1 if family == "flux" else 9
    built = skeleton(config, (frames, 128, 128), CPU, FP32)
    with torch.no_grad():
        out = built.pipe.transformer(**built.arguments)[0]
    assert torch.isfinite(out).all()
    who = sample.from_config(config, (frames, 128, 128), CPU, FP32)
    found = doctor.examine(who, steps=50)
    layers = {"wan": 30, "flux": 57, "cogvideox": 7, "hunyuan": 8}
    tokens = {"wan": 192, "flux": 64, "cogvideox": 192, "hunyuan": 192}
    assert (found.layers, found.tokens) == (layers[family], tokens[family])
    assert found.obstacles == []


def test_models_that_cannot_be_built(tmp_path):
    with pytest.raises(ValueError, match="cannot be examined from its configuration alone"):
        family_of("MochiTransformer3DModel")
    with pytest.raises(ValueError, match="no transformer configuration"):
        read_config(str(tmp_path))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="no transformer configuration"):
        read_config(str(tmp_path / "x.json"))


def test_dense_steps_of_a_schedule():
    assert dense_steps(dit_accel.TopK(), 50) == 8
    assert dense_steps(dit_accel.Rettention(period=5), 50) == 8 + 9


def test_advice(loaded, given_times):
    found = doctor.examine(sample.from_pipeline(*loaded, REQUEST), steps=10)
    assert "no method gains a tenth" in recommend(replace(found, bound=1.05))
    slow = [replace(o, predicted=1.02) for o in found.outlook]
    assert "gives 1.02×" in recommend(replace(found, outlook=slow))
    none = [replace(o, predicted=None, why="no kernel") for o in found.outlook]
    assert "no method ran here (no kernel)" in recommend(replace(found, outlook=none))
    far = [
        replace(o, predicted={"topk": 3.0, "pooled": 2.0}.get(o.method, 1.0)) for o in found.outlook
    ]
    assert recommend(replace(found, outlook=far)).startswith("Take topk")
    assert diagnosis.WORTH > 1


def test_the_command(model, capsys):
    assert cli.run(["doctor", "--model", str(model), "--device", "cpu", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tokens"] == 72
    config = str(model / "transformer" / "config.json")
    where = ["--model", config, "--config-only", "--device", "cpu", "--size", "64x64"]
    assert cli.run(["doctor", *where, "--frames", "5"]) == 0
    out = capsys.readouterr().out
    assert "32 visual tokens (2 × 4 × 4), 3 layers, 2 heads of 64" in out
    assert cli.run(["doctor", "--model", "./none", "--config-only"]) == 2
    assert "no transformer configuration" in capsys.readouterr().err


def test_the_fastest_turn_counts(loaded, monkeypatch):
    monkeypatch.setattr(doctor, "ROUNDS", 3)
    turns = {}

    def run(who, config):
        found, handle = real(who, config)
        kind = type(config.method).__name__
        turns[kind] = turns.get(kind, 0) + 1
        base = 1.0 if kind == "Dense" else 0.5
        return dict.fromkeys(found, base + 1 / turns[kind]), handle

    real = doctor._run
    monkeypatch.setattr(doctor, "_run", run)
    found = doctor.examine(sample.from_pipeline(*loaded, REQUEST), steps=10)
    assert set(turns.values()) == {3}
    assert found.forward_seconds == pytest.approx(3 * (1 + 1 / 3))
    monkeypatch.setattr(doctor, "BUDGET", 0.0)
    turns.clear()
    doctor.examine(sample.from_pipeline(*loaded, REQUEST), steps=10)
    assert set(turns.values()) == {1}
