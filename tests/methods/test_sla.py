"""SLA's forms, its weights file, and that a layer without weights costs nothing."""

import pytest
import torch
from runs import on, run
from tiny import tiny_wan

import dit_accel
from dit_accel import SLA, TopK, ops
from dit_accel.kernels.block_sparse_attention.reference import block_sparse_attention
from dit_accel.methods import Call
from dit_accel.ops import dispatch


def qkv(d: int = 64):
    return [torch.randn(1, 2, 300, d) for _ in range(3)]


def learned(d: int = 64, layers: int = 1) -> dict[str, torch.Tensor]:
    out = {f"layers.{i}.weight": torch.randn(d, d) / 8 for i in range(layers)}
    return out | {f"layers.{i}.bias": torch.randn(d) for i in range(layers)}


def naive_linear(q, k, v, allowed):
    a = (q.softmax(-1) @ k.softmax(-1).mT) * allowed
    return a @ v / (a.sum(-1, keepdim=True) + 1e-5)


def allowed_pairs(linear, method, q, k, call):
    tokens = [t.repeat_interleave(64, 2)[:, :, :300] for t in _masks(method, q, k, call)]
    critical, lowest = (t.repeat_interleave(64, 3)[..., :300] for t in tokens)
    return {"all": torch.ones_like(critical), "rest": ~critical, "marginal": ~critical & ~lowest}[
        linear
    ]


def _masks(method, q, k, call):
    critical = method.table(q, k, call).to_mask()
    scores = torch.stack([b.mean(-2) for b in q.split(64, 2)], 2)
    scores = scores @ torch.stack([b.mean(-2) for b in k.split(64, 2)], 2).mT
    worst = scores.topk(2, largest=False).indices  # 0.3 of 5 blocks
    return critical, torch.zeros_like(critical).scatter(-1, worst, True)


@pytest.mark.parametrize("linear", ["all", "rest", "marginal"])
def test_the_projected_form_is_the_paper(linear: str):
    q, k, v = qkv()
    tensors, call = learned(), Call(keep=0.4)
    method = SLA(keep=0.4, linear=linear, skip=0.3).with_weights(tensors)
    allowed = allowed_pairs(linear, method, q, k, call)
    branch = naive_linear(q, k, v, allowed) @ tensors["layers.0.weight"].mT
    expected = block_sparse_attention(q, k, v, method.table(q, k, call))
    expected = expected + branch + tensors["layers.0.bias"]
    torch.testing.assert_close(method(q, k, v, call), expected)


def test_the_gated_form_is_a_convex_sum():
    q, k, v = qkv()
    gate, call = torch.tensor([0.7], requires_grad=True), Call(keep=0.4)
    method = SLA(keep=0.4, combine="gate").with_weights({"layers.0.gate": gate})
    alpha = gate.sigmoid()
    linear = naive_linear(q, k, v, torch.ones(1))
    expected = alpha * block_sparse_attention(q, k, v, method.table(q, k, call))
    expected = expected + (1 - alpha) * linear
    out = method(q, k, v, call)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), gate)[0] for x in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tensors", [{}, {"layers.0.weight": torch.zeros(64, 64)}])
def test_untrained_it_is_top_k_and_the_branch_does_not_run(tensors: dict):
    q, k, v = qkv()
    with dispatch.recording() as used:
        out = SLA(keep=0.4).with_weights(tensors)(q, k, v, Call(keep=0.4))
    assert torch.equal(out, TopK(keep=0.4)(q, k, v, Call(keep=0.4)))
    assert not [name for name in used if "linear" in name]


def test_gradients_reach_the_weights_and_the_inputs():
    q, k, v = (x.requires_grad_() for x in qkv())
    weight = torch.zeros(64, 64, requires_grad=True)
    method = SLA(keep=0.4).with_weights({"layers.0.weight": weight})
    method(q, k, v, Call(keep=0.4)).square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v, weight))


def test_weights_come_back_from_a_file_and_change_only_their_layer(tmp_path):
    path, tensors = tmp_path / "sla.safetensors", learned(layers=2)
    del tensors["layers.0.weight"], tensors["layers.0.bias"]
    SLA(linear="rest").with_weights(tensors).save(path)
    method = SLA(keep=0.4, linear="rest", weights=str(path))
    q, k, v = qkv()
    plain = ops.block_sparse_attention(q, k, v, method.table(q, k, Call(keep=0.4)))
    assert torch.equal(method(q, k, v, Call(keep=0.4, layer=0)), plain)
    expected = ops.sparse_linear_attention(
        q, k, v, method.table(q, k, Call(keep=0.4)), *tensors.values(), linear="rest"
    )
    assert torch.equal(method(q, k, v, Call(keep=0.4, layer=1)), expected)


def test_weights_of_another_form_or_size_are_refused(tmp_path):
    path = tmp_path / "sla.safetensors"
    SLA(linear="rest").with_weights(learned()).save(path)
    with pytest.raises(ValueError, match="was trained with linear='rest'"):
        SLA(weights=str(path))
    with pytest.raises(ValueError, match="are for head_dim 64, but this model has 32"):
        SLA(linear="rest", weights=str(path))(*qkv(32), Call(keep=0.4))
    for name, tensor in (
        ("layers.0.gate", torch.ones(1)),
        ("weight", torch.ones(4, 4)),
        ("layers.0.weight", torch.ones(4, 3)),
    ):
        with pytest.raises(ValueError, match="SLA"):
            SLA().with_weights({name: tensor})
    with pytest.raises(ValueError, match="a bias of layer 3 without a weight"):
        SLA().with_weights({"layers.3.bias": torch.ones(4)})


def test_trained_weights_run_in_a_pipeline(tmp_path):
    path = tmp_path / "sla.safetensors"
    SLA().with_weights(learned(layers=2)).save(path)
    pipe = tiny_wan()
    with on(pipe, SLA(keep=0.4)) as handle:
        plain = run(pipe)
        assert not any("linear" in name for name in handle.report().implementations)
    with on(pipe, SLA(keep=0.4, weights=str(path))) as handle:
        out = run(pipe)
        assert any("linear" in name for name in handle.report().implementations)
    assert out.isfinite().all() and not torch.equal(out, plain)
    assert dit_accel.methods()["sla"].finetuning


def test_weights_of_another_model_are_refused_before_generation():
    pipe = tiny_wan()
    with pytest.raises(ValueError, match="are for head_dim 32, but this model has 64"):
        dit_accel.accelerate(pipe, SLA().with_weights(learned(32)))
    with pytest.raises(ValueError, match="name layer 2, but this model has 2"):
        dit_accel.accelerate(pipe, SLA().with_weights(learned(64, layers=3)))
    assert "_dit_accel" not in pipe.transformer.__dict__


@pytest.mark.parametrize("kind", [SLA, TopK])
def test_the_kept_count_as_the_checkpoint_was_trained(kind):
    """0.3 of 5 blocks is 1.5: two, or one where the count is cut off."""
    q, k, _ = qkv()
    cases = ((0.3, "up", 2), (0.3, "down", 1), (0.1, "down", 1), (1, "down", 5))
    for keep, rounding, count in cases:
        table = kind(keep=keep, rounding=rounding).table(q, k, Call(keep=keep))
        assert table.counts.eq(count).all()
    with pytest.raises(ValueError, match="rounding of the kept blocks is 'up' or 'down'"):
        kind(rounding="nearest")


def test_a_second_transformer_may_have_weights_of_its_own(tmp_path):
    q, k, v = qkv()
    first, second = learned(), learned()
    names = {f"transformer_2.{name}": x for name, x in second.items()}
    SLA(keep=0.4).with_weights(first | names).save(tmp_path / "both.safetensors")
    method = SLA(keep=0.4, weights=str(tmp_path / "both.safetensors"))
    for part, tensors in ((0, first), (1, second)):
        alone = SLA(keep=0.4).with_weights(tensors)
        expected = alone(q, k, v, Call(keep=0.4))
        assert torch.equal(method(q, k, v, Call(keep=0.4, part=part)), expected)
        assert torch.equal(alone(q, k, v, Call(keep=0.4, part=1)), expected)


def test_a_second_transformer_with_an_idle_layer_does_not_run_the_firsts():
    q, k, v = qkv()
    names = learned()
    weight = next(name for name in names if name.endswith("weight"))
    second = {f"transformer_2.{name}": torch.zeros_like(x) for name, x in names.items()}
    method = SLA(keep=0.4).with_weights(names | second)
    plain = SLA(keep=0.4)(q, k, v, Call(keep=0.4))
    for same in (method, method.replaced(keep=0.4)):
        assert torch.equal(same(q, k, v, Call(keep=0.4, part=1)), plain)
        assert not torch.equal(same(q, k, v, Call(keep=0.4, part=0)), plain)
    assert weight.startswith("layers.0.")
