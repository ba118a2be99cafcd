"""Layers of linear attention alone, among sparse ones."""

import pytest
import torch
from runs import on, run
from tiny import tiny_flux, tiny_wan

from dit_accel import SLA
from dit_accel.cli.finetune import MethodOptions, _settings
from dit_accel.config import AccelConfig
from dit_accel.evaluate.profile import linear_error
from dit_accel.kernels.sparse_linear_attention import reference
from dit_accel.methods import Call
from dit_accel.methods.budget import Profile, linear_layers
from dit_accel.table import BlockTable

N, D, H = 300, 16, 2


def qkv(n_k=N):
    return [torch.randn(2, H, n, D, requires_grad=True) for n in (N, n_k, n_k)]


def tensors_of(layer=1):
    weight, bias = torch.randn(D, D) / 4, torch.randn(D)
    found = {f"layers.{layer}.weight": weight, f"layers.{layer}.bias": bias}
    return {name: x.requires_grad_() for name, x in found.items()}


def naive(q, k, v, weight, bias, feature_map="softmax", kv_len=None):
    return (
        reference.weighted_linear_attention(q, k, v, feature_map, kv_len=kv_len) @ weight.mT + bias
    )


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
@pytest.mark.parametrize("combine", ["project", "gate"])
@pytest.mark.parametrize("length", [None, 350, torch.tensor([350, 400])], ids=str)
def test_it_is_its_equation_forward_and_backward(length, combine, feature_map):
    q, k, v = qkv(N if length is None else 400)
    tensors = tensors_of()
    options = {"linear": "rest", "combine": combine, "feature_map": feature_map}
    method = SLA(0.4, linear_layers=(1,), **options).with_weights(tensors)
    noted: list[BlockTable] = []
    out = method(q, k, v, Call(0.4, layer=1, kv_len=length, note=noted.append))
    expected = naive(q, k, v, *tensors.values(), feature_map, length)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    leaves, grad = [q, k, v, *tensors.values()], torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    assert [float(table.density()) for table in noted] == [0]


def test_other_layers_are_as_without_any():
    q, k, v = qkv()
    tensors = tensors_of(0)
    mixed = SLA(0.4, linear_layers=(1,)).with_weights(tensors)
    plain = SLA(0.4).with_weights(tensors)
    assert torch.equal(mixed(q, k, v, Call(0.4)), plain(q, k, v, Call(0.4)))
    assert SLA(0.4, linear_layers=()) == SLA(0.4)


def test_no_weights_are_a_projection_of_one_and_zeros_leave_the_bias():
    q, k, v = qkv()
    method, call = SLA(0.4, linear_layers=(1,)), Call(0.4, layer=1)
    expected = naive(q, k, v, torch.eye(D), torch.zeros(D))
    torch.testing.assert_close(method(q, k, v, call), expected)
    fresh = {f"layers.1.{name}": x for name, x in method.fresh_of(1, H, D, 0).items()}
    torch.testing.assert_close(method.with_weights(fresh)(q, k, v, call), expected)
    zero = {"layers.1.weight": torch.zeros(D, D), "layers.1.bias": torch.arange(D).float()}
    out = method.with_weights(zero)(q, k, v, call)
    assert torch.equal(out, zero["layers.1.bias"].expand_as(out))


def test_a_branch_weighs_there_too():
    q, k, v = qkv()
    method = SLA(0.4, branch="gated & rms", linear_layers=(1,))
    fresh = method.fresh_of(1, H, D, 0)
    tensors = {f"layers.1.{name}": torch.randn_like(x) for name, x in fresh.items()}
    own = {name.rpartition(".")[2]: x for name, x in tensors.items()}
    logits = torch.einsum("bhnd,hd->bhn", k, own["key_weight"]) + own["key_bias"][:, None]
    linear = reference.weighted_linear_attention(q, k, v, keys=logits.sigmoid(), rms=True)
    out = method.with_weights(tensors)(q, k, v, Call(0.4, layer=1))
    expected = linear @ own["weight"].mT + own["bias"]
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [tiny_wan, tiny_flux])
def test_a_pipeline_runs_with_both_kinds(make):
    pipe = make()
    with on(pipe, SLA(keep=0.4, linear_layers=(1,))) as handle:
        out = run(pipe)
        rows = handle.report().layers
        assert not handle.report().fallbacks
    assert out.isfinite().all()
    assert [row["kept"] > 0 for row in rows] == [True, False, *[True] * (len(rows) - 2)]
    with (
        pytest.raises(ValueError, match="name layer 9, but this model has"),
        on(pipe, SLA(linear_layers=(9,))),
    ):
        pass


def test_configurations_and_files_name_the_layers(tmp_path):
    config = AccelConfig(SLA(linear_layers=(2, 1)))
    assert config.method.linear_layers == (1, 2)
    assert AccelConfig.from_dict(config.to_dict()) == config
    assert "linear_layers" not in AccelConfig(SLA()).to_dict()["method"]
    path = str(tmp_path / "sla.safetensors")
    SLA(linear_layers=(1,)).with_weights(tensors_of()).save(path)
    assert SLA(linear_layers=(1,), weights=path).tensors()
    with pytest.raises(ValueError, match=r"was trained with linear_layers=\[1\]"):
        SLA(weights=path)
    for layers in ((1, 1), (-1,)):
        with pytest.raises(ValueError, match="linear_layers are numbers of layers"):
            SLA(linear_layers=layers)


def test_a_profile_chooses_the_layers(tmp_path):
    errors = {"0": 0.5, "1": 0.1, "2": 0.3, "3": 0.2}
    profile = Profile("pooled", {"means": {}}, {}, {}, {}, errors)
    path = tmp_path / "profile.json"
    profile.save(path)
    assert linear_layers(f"{path}@0.75") == (1, 2, 3) and linear_layers(f"{path}@0") == ()
    assert linear_layers("3,1") == (3, 1)
    asked = _settings({"out": "x"}, MethodOptions(linear_layers=f"{path}@0.5"))
    assert asked.method == SLA(keep=0.1, linear_layers=(1, 3))
    assert asked.to_dict()["method"]["linear_layers"] == [1, 3]
    assert "linear_layers" not in _settings({"out": "x"}, MethodOptions()).to_dict()["method"]
    Profile("pooled", {"means": {}}, {}, {}).save(path)
    for text, match in (
        (f"{path}@0.5", "tried no linear attention: dit-accel profile --linear"),
        ("one", "linear layers are numbers, 1,2,5, or a profile"),
        (f"{path}@most", "linear layers are numbers, 1,2,5, or a profile"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_layers(text)
    with pytest.raises(ValueError, match=r"a share of the layers lies in \[0, 1\], not 2"):
        profile.linear_layers(2)


def test_the_error_is_that_of_the_best_projection():
    q, k, v = (x.detach() for x in qkv())
    linear = reference.weighted_linear_attention(q, k, v)
    given = linear @ torch.randn(D, D) + torch.randn(D)
    assert linear_error(q, k, v, given, "softmax", None) < 1e-6
    noise = torch.randn_like(given) * given.std()
    error = linear_error(q, k, v, given + noise, "softmax", None)
    x = torch.cat([linear, torch.ones_like(linear[..., :1])], -1).flatten(0, 2).double()
    y = (given + noise).flatten(0, 2).double()
    left = y - x @ torch.linalg.lstsq(x, y).solution
    assert error == pytest.approx(float((left.norm() / y.norm()) ** 2), rel=1e-4)
