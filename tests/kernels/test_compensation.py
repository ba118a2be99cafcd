"""Pooled and rectified attention against the equations, token by token, and their identities."""

import math

import pytest
import torch
import torch.nn.functional as F

from dit_accel import Pooled, ops
from dit_accel.config import AccelConfig
from dit_accel.kernels.pooled_attention import reference as pooled_reference
from dit_accel.kernels.pooled_attention import torch as pooled
from dit_accel.kernels.rectified_attention import reference as rectified_reference
from dit_accel.kernels.rectified_attention import torch as rectified
from dit_accel.methods import Call
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close, references

BLOCK = 16
KV_LENS = [None, 1, 16, 37, torch.tensor([50, 21]), torch.tensor([0, 33])]


def inputs(n_q: int = 40, n_k: int = 50, d: int = 8, keep: float = 0.4, dtype=torch.float32):
    q = torch.randn(2, n_q, 2, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, 2, n_k, d).to(dtype) for _ in range(2))
    mask = torch.rand(2, 2, block_count(n_q, BLOCK), block_count(n_k, BLOCK)) < keep
    return q, k, v, BlockTable.from_mask(mask, BLOCK, BLOCK, n_q, n_k)


def poison(k: torch.Tensor, v: torch.Tensor, kv_len: int | torch.Tensor | None) -> list[int]:
    ends = torch.as_tensor(k.shape[2] if kv_len is None else kv_len).expand(len(k)).tolist()
    for b, end in enumerate(ends):
        k[b, :, end:], v[b, :, end:] = torch.nan, torch.nan
    return ends


def by_hand_pooled(q, k, v, kept, end: int) -> list[list[float]]:
    """One head, in Python floats: Σ over kept tokens, and |m|·e^{q·k̄} for a skipped block."""
    rows, d = [], q.shape[1]
    for i, query in enumerate(q.tolist()):
        weights, values = [], []
        for m, start in enumerate(range(0, end, BLOCK)):
            tokens = range(start, min(end, start + BLOCK))
            keys = [k[j].tolist() for j in tokens]
            vals = [v[j].tolist() for j in tokens]
            if not kept[i // BLOCK][m]:
                keys, vals = (
                    [[sum(c) / len(x) for c in zip(*x, strict=True)]] for x in (keys, vals)
                )
            size = len(tokens) // len(keys)
            for key, value in zip(keys, vals, strict=True):
                score = sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(d)
                weights.append(size * math.exp(score))
                values.append(value)
        total = sum(weights) or 1.0
        pairs = list(zip(weights, values, strict=True))
        rows.append([sum(w * x[c] for w, x in pairs) / total for c in range(d)])
    return rows


@pytest.mark.parametrize("kv_len", KV_LENS)
@pytest.mark.parametrize("module", [pooled_reference, pooled], ids=["reference", "torch"])
def test_pooled_is_its_equation(module, kv_len: int | torch.Tensor | None):
    q, k, v, table = inputs(d=4)
    ends = poison(k, v, kv_len)
    out = module.pooled_attention(q, k, v, table, kv_len=kv_len)
    kept = table.to_mask()
    for b, h in ((0, 0), (1, 1)):
        hand = torch.tensor(by_hand_pooled(q[b, h], k[b, h], v[b, h], kept[b, h], ends[b]))
        torch.testing.assert_close(out[b, h], hand, rtol=1e-5, atol=1e-6)


def by_hand_rectified(q, k, v, kept, end: int, gapr: bool) -> torch.Tensor:
    """One head: the steps of METHODS in the order of the paper, with its own dense softmax."""
    d, out = q.shape[1], torch.zeros_like(q)
    starts = range(0, end, BLOCK)
    km, vm = (torch.stack([x[s : min(end, s + BLOCK)].mean(0) for s in starts]) for x in (k, v))
    for n, first in enumerate(range(0, len(q), BLOCK)):
        block = q[first : first + BLOCK]
        qm = block.mean(0)
        logits, exact, read = [], [], []
        for m, s in enumerate(starts):
            keys = k[s : min(end, s + BLOCK)]
            logits.append(qm @ km[m] / math.sqrt(d) + math.log(len(keys)))
            gain = (qm @ km[m]).abs()
            dq, dk = (block - qm).abs().mean(0), (keys - km[m]).abs().mean(0)
            vetoed = gapr and gain <= (dq @ km[m]).abs() + (qm @ dk).abs()
            exact.append(bool(kept[n, m]) or bool(vetoed))
            read += list(range(s, s + len(keys))) if kept[n, m] else []
        a = torch.stack(logits).softmax(0)
        r = sum((a[m] for m in range(len(starts)) if exact[m]), torch.zeros(()))
        c = sum((a[m] * vm[m] for m in range(len(starts)) if not exact[m]), torch.zeros(d))
        sparse = (block @ k[read].T / math.sqrt(d)).softmax(-1) @ v[read] if read else 0 * block
        out[first : first + BLOCK] = r * sparse + c
    return out


@pytest.mark.parametrize("kv_len", KV_LENS[:-1])
@pytest.mark.parametrize("gapr", [True, False])
@pytest.mark.parametrize("module", [rectified_reference, rectified], ids=["reference", "torch"])
def test_rectified_is_its_equation(module, gapr: bool, kv_len: int | torch.Tensor | None):
    q, k, v, table = inputs()
    q, k = q + 1, k + 1  # so that the veto spares some blocks and not others
    ends = poison(k, v, kv_len)
    out = module.rectified_attention(q, k, v, table, gapr=gapr, kv_len=kv_len)
    kept = table.to_mask()
    for b, h in ((0, 0), (1, 1)):
        hand = by_hand_rectified(q[b, h], k[b, h], v[b, h], kept[b, h], ends[b], gapr)
        torch.testing.assert_close(out[b, h], hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_q,n_k", [(1, 1), (63, 65), (64, 64), (1000, 1000), (130, 1000)])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooled_forward(n_q: int, n_k: int, d: int, dtype: torch.dtype):
    tensors = inputs(n_q, n_k, d, dtype=dtype)
    wide, same = references(pooled_reference.pooled_attention, *tensors, return_lse=True)
    found = pooled.pooled_attention(*tensors, return_lse=True)
    for name, *values in zip(("out", "lse"), found, wide, same, strict=True):
        assert_close(name, *values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rectified_forward(dtype: torch.dtype):
    tensors = inputs(130, 200, 64, keep=0.5, dtype=dtype)
    options = {"gapr": False}  # a veto near its threshold may fall either way in half precision
    wide, same = references(rectified_reference.rectified_attention, *tensors, **options)
    assert_close("out", rectified.rectified_attention(*tensors, **options), wide, same)


@pytest.mark.parametrize("module", [pooled_reference, pooled], ids=["reference", "torch"])
def test_pooled_with_all_blocks_is_dense(module):
    q, k, v, table = inputs(keep=1.1)
    wide = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    same = F.scaled_dot_product_attention(q, k, v)
    assert_close("out", module.pooled_attention(q, k, v, table), wide, same)


@pytest.mark.parametrize("module", [pooled_reference, pooled], ids=["reference", "torch"])
def test_pooled_is_dense_for_constant_keys(module):
    # Blocks of equal keys lose nothing when they are pooled: even with no block kept.
    q, _, v, table = inputs(n_k=48, keep=0.0)
    k = torch.randn(2, 2, 3, 1, 8).expand(-1, -1, -1, BLOCK, -1).flatten(2, 3)
    wide = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    same = F.scaled_dot_product_attention(q, k, v)
    assert_close("out", module.pooled_attention(q, k, v, table), wide, same, rtol=4)


@pytest.mark.parametrize("module", [rectified_reference, rectified], ids=["reference", "torch"])
@pytest.mark.parametrize("gapr", [True, False])
def test_rows_of_rectified_sum_to_one(module, gapr: bool):
    q, k, v, _ = inputs(n_k=150)
    mask = torch.rand(2, 2, 3, 10) < 0.3
    mask[..., 0] = True
    table = BlockTable.from_mask(mask, BLOCK, BLOCK, 40, 150)
    out = module.rectified_attention(q, k, torch.ones_like(v), table, gapr=gapr)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("module", [pooled_reference, pooled], ids=["reference", "torch"])
@pytest.mark.parametrize("kv_len", KV_LENS)
def test_pooled_backward(module, kv_len: int | torch.Tensor | None):
    q, k, v, table = inputs()
    poison(k, v, kv_len)
    grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 2, 40)

    def gradients(q, dtype: torch.dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out, lse = pooled_reference.pooled_attention(
            *leaves, table, kv_len=kv_len, return_lse=True, dtype=dtype
        )
        lse = lse.masked_fill(lse == -torch.inf, 0)
        grads = torch.autograd.grad((out, lse), leaves, (grad_out.to(dtype), grad_lse.to(dtype)))
        return [grad.nan_to_num() for grad in grads]  # of a row without a key, −inf − (−inf)

    wide, same = references(gradients, q)
    out, lse = module.pooled_attention(q, k, v, table, kv_len=kv_len, return_lse=True)
    found = module.backward(grad_out, grad_lse, q, k, v, out, lse, table, kv_len=kv_len)
    for name, *tensors in zip(("dq", "dk", "dv"), found, wide, same, strict=True):
        assert_close(name, *tensors)


def by_hand_line(q, k, v, table, ends):
    """Pooled attention and its first-order term, from every pair of tokens, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, scale = torch.zeros_like(q), q.shape[-1] ** -0.5
    kept, n_q = table.to_mask(), q.shape[2]
    for b, h, n in torch.cartesian_prod(*(torch.arange(x) for x in kept.shape[:3])).tolist():
        rows = q[b, h, n * BLOCK : min(n_q, (n + 1) * BLOCK)]
        parts = []  # of each key block: weights [rows, 1], values [rows, D], slopes
        for m, start in enumerate(range(0, ends[b], BLOCK)):
            keys, values = (x[b, h, start : min(ends[b], start + BLOCK)] for x in (k, v))
            weights = (rows @ keys.mT * scale).exp()
            if kept[b, h, n, m]:
                parts.append((weights.sum(1, keepdim=True), weights @ values, None))
                continue
            middle, count = keys.mean(0), len(keys)
            weight = count * (rows @ middle * scale).exp()[:, None]
            slope = scale / count * (keys - middle).mT @ (values - values.mean(0))
            parts.append((weight, weight * values.mean(0), slope))
        if parts:
            total = sum(weight for weight, *_ in parts)
            line = sum(
                (w / total).mean() * rows @ slope for w, _, slope in parts if slope is not None
            )
            out[b, h, n * BLOCK : n * BLOCK + len(rows)] = (
                sum(x for _, x, _ in parts) / total + line
            )
    return out


@pytest.mark.parametrize("kv_len", KV_LENS)
def test_the_line_is_its_equation(kv_len):
    q, k, v, table = inputs()
    ends = poison(k, v, kv_len)
    out = ops.pooled_attention(q, k, v, table, kv_len=kv_len, line=True)
    torch.testing.assert_close(
        out, by_hand_line(q, k, v, table, ends).float(), rtol=1e-4, atol=1e-5
    )


def of_spread(size: float):
    """q, k, v whose queries and keys lie so far from the means of their blocks, and a table."""
    torch.manual_seed(0)
    blocks = torch.randn(2, 1, 2, 8, 1, 16, dtype=torch.float64)
    tokens = blocks + size * torch.randn(2, 1, 2, 8, BLOCK, 16, dtype=torch.float64)
    q, k = tokens.flatten(3, 4).float()
    mask = torch.rand(1, 2, 8, 8) < 0.3
    return q, k, torch.randn_like(k), BlockTable.from_mask(mask, BLOCK, BLOCK, 128, 128)


def test_half_the_spread_is_half_the_error_of_means_and_a_quarter_of_that_of_lines():
    errors = {False: [], True: []}
    for size in (0.1, 0.05, 0.025):
        q, k, v, table = of_spread(size)
        dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        for line, found in errors.items():
            out = ops.pooled_attention(q, k, v, table, line=line).double()
            found.append(float((out - dense).norm() / dense.norm()))
    for line, factor in ((False, 2), (True, 4)):
        for wide, narrow in zip(errors[line], errors[line][1:], strict=False):
            assert wide / narrow == pytest.approx(factor, rel=0.05)


def test_where_values_are_constant_the_line_is_the_mean():
    q, k, v, table = of_spread(1.0)
    v = v[:, :, ::BLOCK].repeat_interleave(BLOCK, 2)
    flat, line = (ops.pooled_attention(q, k, v, table, line=line) for line in (False, True))
    torch.testing.assert_close(line, flat)
    everything = BlockTable.from_mask(torch.ones(1, 2, 8, 8).bool(), BLOCK, BLOCK, 128, 128)
    kept = [ops.pooled_attention(q, k, v, everything, line=line) for line in (False, True)]
    assert torch.equal(*kept)


def test_the_gradient_of_the_line():
    q, k, v, table = inputs(n_q=33, n_k=50)
    found, wanted = [], []
    for record, attend, dtype in (
        (found, lambda *x: ops.pooled_attention(*x, table, line=True), torch.float32),
        (wanted, lambda *x: by_hand_line(*x, table, [50, 50]), torch.float64),
    ):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        record += torch.autograd.grad(out.sin().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-5)


def test_the_tail_of_the_method():
    config = AccelConfig(Pooled(0.3, tail="line"))
    assert config.to_dict()["method"]["tail"] == "line"
    assert AccelConfig.from_dict(config.to_dict()) == config
    assert "tail" not in AccelConfig(Pooled(0.3)).to_dict()["method"]  # what ran before is the same
    assert Pooled(0.3).by_parts and not config.method.by_parts
    q, k, v, _ = of_spread(0.3)
    dense = F.scaled_dot_product_attention(q, k, v)
    flat, line = (
        (Pooled(0.3, tail=tail)(q, k, v, Call(0.3)) - dense).norm() for tail in ("mean", "line")
    )
    assert line < 0.8 * flat  # blocks of 64 are wider than those of `of_spread`
    with pytest.raises(ValueError, match="tail is 'mean' or 'line', not 'flat'"):
        Pooled(tail="flat")
