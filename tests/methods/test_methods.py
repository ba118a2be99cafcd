"""Every method end to end on stock Wan and Flux pipelines, and what each of them promises."""

import pytest
import torch
from runs import on, run
from tiny import tiny_flux, tiny_wan
from torch.nn.functional import scaled_dot_product_attention

import dit_accel
from dit_accel import SLA, Pooled, Rectified, Rettention, SharedResidual, TopK
from dit_accel.methods import Call

METHODS = {
    "topk": TopK,
    "pooled": Pooled,
    "rectified": Rectified,
    "rettention": Rettention,
    "shared": SharedResidual,
    "sla": SLA,
}


@pytest.fixture(scope="module", params=["wan", "flux"])
def case(request):
    pipe = tiny_wan() if request.param == "wan" else tiny_flux()
    return pipe, run(pipe)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_dense(case, name: str):
    pipe, stock = case
    with on(pipe, METHODS[name](keep=0.999)) as handle:
        torch.testing.assert_close(run(pipe), stock, rtol=2e-3, atol=2e-3)
        report = handle.report()
    assert report.kept == 1 and not report.fallbacks and report.implementations


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_a_sparse_run_is_finite_different_and_reported(case, name: str, order: str):
    pipe, stock = case
    with on(pipe, METHODS[name](keep=0.3), order=order) as handle:
        out = run(pipe)
        again = run(pipe)
        report = handle.report()
    assert torch.isfinite(out).all() and not torch.equal(out, stock)
    assert torch.equal(out, again)
    assert 0.3 <= report.kept < 1 and all(row["sparse"] for row in report.layers)
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_in_and_out(name: str):
    q, k, v = (torch.randn(1, 2, 300, 64).bfloat16() for _ in range(3))
    out = METHODS[name](keep=0.4)(q, k, v, Call(keep=0.4, grid=(3, 10, 10), state={}))
    assert out.dtype == torch.bfloat16 and out.shape == q.shape and out.isfinite().all()


def test_pooled_is_nearer_to_dense_than_dropping():
    base = torch.randn(1, 2, 10, 64).repeat_interleave(64, 2)
    q, k, v = (base.roll(i, -1) + 0.5 * torch.randn_like(base) for i in range(3))
    dense = scaled_dot_product_attention(q, k, v)
    errors = {}
    for kind in (TopK, Rectified, Pooled):
        method = kind(keep=0.2) if kind is not Rectified else kind(0.2, mass=0, neighbours=None)
        out = dit_accel.attention(q, k, v, method)
        errors[kind.__name__] = (out - dense).norm().item()
    assert errors["Pooled"] < errors["TopK"] / 2 and errors["Rectified"] < errors["TopK"]


@pytest.mark.parametrize(
    "kind,options,match",
    [
        (Rectified, {"mass": 1.0}, "mass is a share"),
        (Rectified, {"neighbours": -1}, "neighbours is a number"),
        (SLA, {"linear": "most"}, "linear is one of"),
        (SLA, {"combine": "sum"}, "combine is one of"),
        (SLA, {"skip": 1.0}, "skip is a share"),
        (SLA, {"weights": "nowhere.safetensors"}, "no weights file nowhere"),
        (Rettention, {"residual": "half"}, "residual is one of"),
        (Rettention, {"window": "round"}, "window is one of"),
        (Rettention, {"period": 0}, "period is a number"),
    ],
)
def test_wrong_options_are_named(kind: type, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        kind(**options)


def test_options_survive_a_preset_file(tmp_path):
    for method in (Rectified(mass=0.5, gapr=False), SLA(linear="rest"), Rettention(residual="fp8")):
        config = dit_accel.AccelConfig(method)
        config.save(tmp_path / "preset.json")
        assert dit_accel.config.resolve(tmp_path / "preset.json") == config


@pytest.mark.parametrize("name", METHODS)
def test_presets_build(name: str):
    for preset in ("safe", "balanced", "fast"):
        assert dit_accel.config.resolve(f"{name}:{preset}").method.name == name
