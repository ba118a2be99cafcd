"""Branches in place of the linear one: a memory that trains in each call, and learned latents."""

import pytest
import torch

from dit_accel import SLA, ops
from dit_accel.methods import Call

N, D, H = 200, 16, 2


def qkv(n_k=N):
    return [torch.randn(2, H, n, D, requires_grad=True) for n in (N, n_k, n_k)]


def method_of(branch, **options):
    """An SLA that is its branch alone: nothing is exact, W = 1."""
    method = SLA(0.4, block_q=64, branch=branch, **options)
    tensors = {f"layers.0.{n}": torch.randn_like(x) for n, x in method.fresh(H, D, 0).items()}
    tensors |= {"layers.0.weight": torch.eye(D), "layers.0.bias": torch.zeros(D)}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    return method.with_weights(tensors), tensors


def branch_of(method, q, k, v, call):
    table = method.table(q, k, call)
    exact = ops.block_sparse_attention(q, k, v, table, kv_len=call.kv_len)
    return method(q, k, v, call) - exact


def check(out, expected, leaves):
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=5e-3, atol=1e-3)


def descended(q, k, v, rate, steps, length=None):
    """φ(q) M of one head, every step by the gradient of the loss itself."""
    fq, fk, v = q.relu(), k[:length].relu(), v[:length]
    memory, size = torch.zeros(D, D), fk.square().sum()
    for _ in range(steps):
        memory = memory - 2 * rate.sigmoid() / size * (fk.mT @ (fk @ memory - v))
    return fq @ memory


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("length", [None, 150])
def test_a_memory_descends_the_gradient_of_its_loss(steps, length):
    q, k, v = qkv()
    method, tensors = method_of(f"memory({steps})", feature_map="relu")
    rates = tensors["layers.0.memory_rate"]
    expected = torch.stack(
        [
            torch.stack([descended(*x, rates[h], steps, length) for h, x in enumerate(heads)])
            for heads in (list(zip(*(x[b] for x in (q, k, v)), strict=True)) for b in (0, 1))
        ]
    )
    # the loss is what the steps go down
    memory = torch.randn(D, D, requires_grad=True)
    fk = k[0, 0].detach().relu()
    loss = (fk @ memory - v[0, 0].detach()).square().sum() / 2
    (grad,) = torch.autograd.grad(loss, memory)
    torch.testing.assert_close(grad, fk.mT @ (fk @ memory - v[0, 0]).detach())
    check(branch_of(method, q, k, v, Call(0.4, kv_len=length)), expected, (q, k, v, rates))


def test_one_step_is_linear_attention_without_a_divisor():
    q, k, v = qkv()
    memory, tensors = method_of("memory(1) & rms")
    plain = SLA(0.4, block_q=64, branch="rms").with_weights(
        {name: x for name, x in tensors.items() if "memory" not in name}
    )
    call = Call(0.4)
    torch.testing.assert_close(memory(q, k, v, call), plain(q, k, v, call), rtol=1e-3, atol=1e-4)


def test_a_long_training_remembers_and_no_rate_diverges():
    q, k, _ = qkv()
    right = torch.randn(D, D)
    v = k.relu() @ right
    method, tensors = method_of("memory(400)", feature_map="relu")
    for rate in (0.0, 20.0):
        tensors["layers.0.memory_rate"] = torch.full((H,), rate)
        out = branch_of(method.with_weights(tensors), q, k, v, Call(0.4))
        torch.testing.assert_close(out, q.relu() @ right, rtol=1e-2, atol=1e-2)


def read(q, k, v, latents, held, length=None):
    """One head's attention to the latents of blocks of 64, one after another."""
    keys, values, logs, blocks = [], [], [], []
    for m, (kb, vb) in enumerate(zip(k[:length].split(64), v[:length].split(64), strict=True)):
        for u in latents:
            weights = (kb @ u).softmax(0)
            keys.append(weights @ kb)
            values.append(weights @ vb)
            logs.append(torch.tensor(len(kb) / len(latents)).log())
            blocks.append(m)
    scores = q @ torch.stack(keys).mT / D**0.5 + torch.stack(logs)
    scores = scores.masked_fill(~held[:, blocks], -torch.inf)
    return scores.softmax(-1).nan_to_num() @ torch.stack(values)


@pytest.mark.parametrize("linear", ["all", "rest"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("length", [None, 150])
def test_latents_read_blocks_and_are_read(length, count, linear):
    q, k, v = qkv()
    method, tensors = method_of(f"latents({count})", linear=linear)
    latents, call = tensors["layers.0.latents"], Call(0.4, kv_len=length)
    held = torch.ones(2, H, N, 4, dtype=torch.bool)
    if linear == "rest":
        held = ~method.table(q, k, call).to_mask().repeat_interleave(64, 2)[:, :, :N]
    expected = torch.stack(
        [
            torch.stack(
                [read(q[b, h], k[b, h], v[b, h], latents[h], held[b, h], length) for h in (0, 1)]
            )
            for b in (0, 1)
        ]
    )
    check(branch_of(method, q, k, v, call), expected, (q, k, v, latents))


def test_a_latent_that_asks_for_nothing_is_the_mean_of_its_block():
    q, k, v = qkv()
    method, tensors = method_of("latents")
    fresh = method.fresh(H, D, 0)["latents"]
    assert not fresh.any() and SLA(branch="latents(2)").fresh(H, D, 0)["latents"].any()
    out = branch_of(method.with_weights(tensors | {"layers.0.latents": fresh}), q, k, v, Call(0.4))
    means_k, means_v = (ops.block_means(x, 64) for x in (k, v))
    logs = torch.tensor([64.0, 64.0, 64.0, 8.0]).log()
    expected = (q @ means_k.mT / D**0.5 + logs).softmax(-1) @ means_v
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_where_everything_is_exact_nothing_is_left_for_latents():
    q, k, v = qkv()
    method, _ = method_of("latents", linear="rest")
    table = ops.block_table(q, k, 1.0)
    exact = ops.block_sparse_attention(q, k, v, table)
    torch.testing.assert_close(method(q, k, v, Call(1.0)), exact)
