"""Linear attention with weights, against every pair of tokens."""

import pytest
import torch

from dit_accel import ops
from dit_accel.kernels.sparse_linear_attention import reference
from dit_accel.table import BlockTable, block_count


def case(n_q=150, n_k=200, sizes=(64, 64), d=16):
    q, k, v = (torch.randn(2, 3, n, d, requires_grad=True) for n in (n_q, n_k, n_k))
    keys = torch.rand(2, 3, n_k, requires_grad=True)
    blocks = torch.rand(
        1, 3, block_count(n_q, sizes[0]), block_count(n_k, sizes[1]), requires_grad=True
    )
    return q, k, v, keys, blocks


@pytest.mark.parametrize("weights", ["none", "keys", "blocks", "both"])
@pytest.mark.parametrize("rms", [False, True], ids=["sum", "rms"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_forward_and_backward(feature_map, rms, weights):
    for sizes, kv_len in (((64, 64), None), ((128, 64), 130), ((64, 128), torch.tensor([200, 70]))):
        q, k, v, keys, blocks = case(sizes=sizes)
        given = {"keys": keys if weights in ("keys", "both") else None}
        given |= {"blocks": blocks if weights in ("blocks", "both") else None}
        options = {"sizes": sizes, "rms": rms, "kv_len": kv_len}
        out = ops.weighted_linear_attention(q, k, v, feature_map, **given, **options)
        naive = reference.weighted_linear_attention(q, k, v, feature_map, **given, **options)
        torch.testing.assert_close(out, naive, rtol=1e-4, atol=1e-5)
        leaves = [x for x in (q, k, v, *given.values()) if x is not None]
        grad = torch.randn_like(out)
        found, expected = (torch.autograd.grad(x, leaves, grad) for x in (out, naive))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_without_weights_it_is_the_branch_of_sla():
    q, k, v, keys, blocks = case()
    plain = reference.linear_branch(torch.zeros_like(q), q, k, v, None, torch.eye(16))
    ones = {"keys": torch.ones_like(keys), "blocks": torch.ones_like(blocks)}
    for given in ({}, ones):
        torch.testing.assert_close(ops.weighted_linear_attention(q, k, v, **given), plain)


def test_the_branch_alone_is_what_is_added_to_another():
    q, k, v, _, _ = case()
    weight = torch.randn(16, 16, requires_grad=True)
    mask = torch.rand(2, 3, 3, 4) < 0.4
    table = BlockTable.from_mask(mask, 64, 64, 150, 200)
    for excluded, kv_len in ((None, None), (table, 130)):
        options = {"excluded": excluded, "kv_len": kv_len}
        out = ops.linear_attention(q, k, v, weight, "elu", **options)
        args = (torch.zeros_like(q), q, k, v, excluded, weight, None, "elu", kv_len)
        naive = reference.linear_branch(*args)
        torch.testing.assert_close(out, naive, rtol=1e-4, atol=1e-5)
        leaves, grad = (q, k, v, weight), torch.randn_like(out)
        found, expected = (torch.autograd.grad(x, leaves, grad) for x in (out, naive))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            again = ops.linear_attention(q, k, v, weight, "elu", **options)
        assert torch.equal(again, out)
    with pytest.raises(ValueError, match=r"weight is \[16, 16\], not \[4, 4\]"):
        ops.linear_attention(q, k, v, torch.ones(4, 4))


def test_padding_is_never_read():
    q, k, v, keys, blocks = case()
    with torch.no_grad():
        expected = ops.weighted_linear_attention(q, k, v, keys=keys, blocks=blocks, kv_len=100)
        for x in (k, v):
            x[:, :, 100:] = float("nan")
        found = ops.weighted_linear_attention(q, k, v, keys=keys, blocks=blocks, kv_len=100)
    assert torch.equal(found, expected) and found.isfinite().all()


def test_weights_of_another_shape_are_refused():
    q, k, v, keys, blocks = case()
    with pytest.raises(ValueError, match=r"weights of keys are \[2, 3, 200\], not \[2, 3, 199\]"):
        ops.weighted_linear_attention(q, k, v, keys=keys[..., 1:])
    with pytest.raises(ValueError, match="weights of blocks are"):
        ops.weighted_linear_attention(q, k, v, blocks=blocks, sizes=(128, 64))
    with pytest.raises(ValueError, match="feature_map is one of"):
        ops.weighted_linear_attention(q, k, v, "exp")
