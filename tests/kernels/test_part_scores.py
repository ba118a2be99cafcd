"""Scores of blocks in parts, a number of blocks for each head, and the choice from given scores."""

import pytest
import torch

from dit_accel.kernels.block_table import reference
from dit_accel.kernels.block_table import torch as fast
from dit_accel.kernels.block_table import triton as kernel

KV_LENS = [None, 85, torch.tensor([136, 45]), torch.tensor([0, 64])]
IMPLEMENTATIONS = pytest.mark.parametrize("module", [fast, kernel], ids=["torch", "triton"])


def inputs(n_q=65, n_k=136, d=64, dtype=torch.float32, batch=2):
    return [torch.randn(batch, n, 2, d).to(dtype).transpose(1, 2) for n in (n_q, n_k)]


def same(a, b) -> bool:
    return torch.equal(a.to_mask(), b.to_mask()) and a.indices.shape == b.indices.shape


@IMPLEMENTATIONS
@pytest.mark.parametrize("kv_len", KV_LENS, ids=str)
@pytest.mark.parametrize("sizes,parts", [((64, 16), 4), ((64, 32), 2), ((16, 16), 16)])
def test_the_same_choice(module, kv_len, sizes, parts):
    q, k = (2 * x for x in inputs(2 * sizes[0] + 1 if sizes[0] < 64 else 65))
    for b, end in enumerate(torch.as_tensor(136 if kv_len is None else kv_len).expand(2).tolist()):
        k[b, :, end:] = torch.nan
    options = {"kv_len": kv_len, "parts": parts, "return_means": True, "spreads": True}
    (found, means), (plain, known) = (
        x.block_table(q, k, 0.3, *sizes, **options) for x in (module, reference)
    )
    assert same(found, plain) and torch.equal(found.bits.words, plain.bits.words)
    for name in ("q", "k", "q_far", "k_far"):
        torch.testing.assert_close(getattr(means, name), getattr(known, name))


@IMPLEMENTATIONS
@pytest.mark.parametrize("mass", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("kv_len", KV_LENS[:3], ids=str)
def test_text_neighbours_and_mass(module, mass, kv_len):
    q, k = (2 * x for x in inputs())
    forced, near = torch.rand(9) < 0.2, torch.rand(2, 9) < 0.2
    arguments = (q, k, 0.1, 64, 16, forced, kv_len, 9, mass, near, 9, 0.2)
    tables = (x.block_table(*arguments, parts=4) for x in (module, reference))
    assert same(*tables)


@IMPLEMENTATIONS
@pytest.mark.parametrize("kv_len", KV_LENS[1:3], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_share_for_each_head(module, kv_len, parts):
    q, k = inputs()
    keep = (0.5, 0.1)
    found = module.block_table(q, k, keep, 64, 16, kv_len=kv_len, parts=parts)
    assert found.indices.shape[-1] == (3 if isinstance(kv_len, int) else 5)
    for h, share in enumerate(keep):
        alone = reference.block_table(q, k, share, 64, 16, kv_len=kv_len, parts=parts)
        assert torch.equal(found.to_mask()[:, h], alone.to_mask()[:, h])
    assert same(found, reference.block_table(q, k, keep, 64, 16, kv_len=kv_len, parts=parts))


@IMPLEMENTATIONS
def test_parts_of_one_token_give_the_attention_of_blocks(module):
    q, k = (2 * x for x in inputs(48, 80, d=64))
    share = (q @ k.mT * 0.3).softmax(-1)
    exact = share.unflatten(-1, (5, 16)).sum(-1).unflatten(2, (3, 16)).mean(3)
    table = module.block_table(q, k, 0.4, 16, 16, scale=0.3, parts=16)
    best = torch.zeros_like(exact, dtype=torch.bool).scatter_(-1, exact.topk(2).indices, True)
    assert torch.equal(table.to_mask(), best)


@IMPLEMENTATIONS
def test_blocks_of_equal_tokens_need_no_parts(module):
    q, k = (torch.randn(1, 2, n, 64).repeat_interleave(16, 2) for n in (3, 9))
    exact = (q[:, :, ::16] @ k[:, :, ::16].mT / 8).softmax(-1)
    for parts in (1, 2, 4):
        mask = module.block_table(q, k, 0.3, 16, 16, parts=parts).to_mask()
        assert torch.equal(mask, exact >= exact.topk(3).values[..., -1:])


@IMPLEMENTATIONS
@pytest.mark.parametrize("mass", [0.0, 0.5])
@pytest.mark.parametrize("kv_len", KV_LENS[:3], ids=str)
@pytest.mark.parametrize("keep", [0.3, (0.1, 0.6)])
def test_choice_from_scores(module, mass, kv_len, keep):
    scores = torch.randn(2, 2, 2, 9).softmax(-1)
    if kv_len is not None:
        for b, end in enumerate(torch.as_tensor(kv_len).expand(2).tolist()):
            scores[b, ..., -(-end // 16) :] = 0
    scores = scores / scores.sum(-1, keepdim=True)
    forced, near = torch.rand(2, 9) < 0.2, torch.rand(2, 9) < 0.2
    options = (keep, 64, 16, 65, 136, forced, kv_len, 9, mass, near, 9)
    found, plain = (x.choose_blocks(scores, *options) for x in (module, reference))
    assert same(found, plain) and torch.equal(found.bits.words, plain.bits.words)


def test_heads_in_parts_of_memory_are_equal(monkeypatch):
    q, k = inputs()
    whole = kernel.block_table(q, k, (0.3, 0.2), 64, 16, parts=4)
    monkeypatch.setattr(kernel, "_LEVEL_BYTES", 1)
    assert same(kernel.block_table(q, k, (0.3, 0.2), 64, 16, parts=4), whole)
    plain = fast.block_table(q, k, 0.3, 64, 16, parts=4)
    monkeypatch.setattr(fast, "_CHUNK_CPU", 1)
    assert same(fast.block_table(q, k, 0.3, 64, 16, parts=4), plain)


@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_means_are_those_of_whole_blocks(d, dtype):
    q, k = inputs(130, 300, d, dtype)
    options = {"return_means": True, "spreads": True}
    _, whole = kernel.block_table(q, k, 0.3, 64, 64, **options)
    _, parts = kernel.block_table(q, k, 0.3, 64, 64, **options, parts=4)
    for name in ("q", "k", "q_far", "k_far"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
