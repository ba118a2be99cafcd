"""Queries and keys turned before they are rounded: an identity, and what it is for."""

import pytest
import torch

from dit_accel import TopK, ops
from dit_accel.kernels.int8_attention.rotate import hadamard, rotated

TURNED = "int8-hadamard"


@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_it_leaves_the_logits(d):
    turn, grown = hadamard(d)
    torch.testing.assert_close(turn @ turn.T, grown * torch.eye(d))
    assert torch.equal(turn.bfloat16().float(), turn)
    q, k = (torch.randn(2, 70, 3, d, dtype=torch.float64).transpose(1, 2) for _ in "qk")
    q1, k1, scale = rotated(q, k, 0.3)
    assert q1.stride() == q.stride()
    torch.testing.assert_close(scale * q1 @ k1.mT, 0.3 * q @ k.mT)
    assert not torch.allclose(q1, q)


def test_the_matrix_is_sylvesters():
    part = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    turn, _ = hadamard(8)
    assert torch.equal(turn, torch.kron(part, torch.kron(part, part)) / 2)


def test_it_is_whole_under_compile():
    q, k, v = (torch.randn(1, 1, 130, 64) for _ in "qkv")
    table = ops.block_table(q, k, 0.5)

    def attend(q, k, v):
        return ops.block_sparse_attention(q, k, v, table, precision=TURNED)

    whole = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(whole(q, k, v), attend(q, k, v))


def attended(q, k, v, precision):
    table = ops.block_table(q, k, 0.5)
    return ops.block_sparse_attention(q, k, v, table, return_lse=True, precision=precision)


def errors(q, k, v):
    exact, lse = attended(q, k, v, None)
    found = []
    for precision in ("int8", TURNED):
        out, mine = attended(q, k, v, precision)
        assert (mine - lse).abs().max() < 0.5
        found.append(float((out - exact).norm() / exact.norm()))
    return found


def test_channels_that_stand_out_cost_a_fifth():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 128) for _ in "qkv")
    plain, turned = errors(q, k, v)
    assert abs(turned - plain) < 0.1 * plain
    for channel in (3, 70):  # large in k, small in q, as normalised keys of real models
        k[..., channel] *= 20
        q[..., channel] *= 0.1
    plain, turned = errors(q, k, v)
    assert turned < 0.4 * plain


def test_a_method_takes_it_by_name():
    assert TopK(precision=TURNED).precision == TURNED
    with pytest.raises(ValueError, match="'int8', 'int8-hadamard' or None"):
        TopK(precision="int4")
