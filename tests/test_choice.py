"""The public choice of blocks: parts, a share for each head, given scores; whole under compile."""

import pytest
import torch

from dit_accel import ops
from dit_accel.table import BlockTable


def qk(n_q: int = 200, n_k: int = 320) -> list[torch.Tensor]:
    return [2 * torch.randn(2, 3, n, 16) for n in (n_q, n_k)]


def same(a: BlockTable, b: BlockTable) -> bool:
    return torch.equal(a.to_mask(), b.to_mask())


def test_one_part_is_the_order_of_the_means():
    q, k = qk(192)
    means = [x.unflatten(2, (-1, 64)).mean(3) for x in (q, k)]
    scores = means[0] @ means[1].mT
    table = ops.block_table(q, k, 0.4)
    assert same(table, ops.choose_blocks(scores, 0.4, 192, 320))
    assert same(table, ops.choose_blocks((scores / 4).softmax(-1), 0.4, 192, 320))


def test_more_parts_come_nearer_to_the_exact_shares():
    q, k = (x[:, :, ::16].repeat_interleave(16, 2) + torch.randn_like(x) / 4 for x in qk(192))
    exact = (q @ k.mT / 4).softmax(-1).unflatten(-1, (5, 64)).sum(-1).unflatten(2, (3, 64)).mean(3)
    held = [
        (exact * ops.block_table(q, k, 0.4, parts=parts).to_mask()).sum().item()
        for parts in (1, 4, 64)
    ]
    assert held == sorted(held)
    assert held[2] == pytest.approx(exact.topk(2).values.sum().item())


def test_a_share_for_each_head():
    q, k = qk()
    shares = (0.2, 1.0, 0.6)
    table = ops.block_table(q, k, shares)
    assert table.counts[0, :, 0].tolist() == [1, 5, 3] and table.indices.shape[-1] == 5
    for h, share in enumerate(shares):
        assert torch.equal(table.to_mask()[:, h], ops.block_table(q, k, share).to_mask()[:, h])


@pytest.mark.parametrize(
    "keep,options,uneven",
    [
        (0.4, {}, False),
        (0.4, {"forced": torch.arange(5) < 1, "near": torch.eye(4, 5).bool()}, False),
        ((0.4, 0.4, 0.4), {}, False),
        ((0.2, 0.4, 0.4), {}, True),
        (0.4, {"mass": 0.5}, True),
    ],
)
def test_shares_of_heads_and_a_mass_make_uneven_tables(keep, options, uneven):
    q, k = qkv = qk()
    scores = torch.rand(2, 3, 4, 5).softmax(-1)
    means = ops.block_table(q, k, keep, return_means=True, **options)[0]
    given = ops.choose_blocks(scores, keep, 200, 320, **options)
    for table in (ops.block_table(*qkv, keep, **options), means, given):
        assert table.uneven == uneven


@pytest.mark.parametrize("kv_len", [None, 250, torch.tensor([320, 77])], ids=str)
def test_compiles_whole(kv_len):
    forced = torch.tensor([True, False, False, False, False])

    def model(q, k):
        options = {"forced": forced, "max_forced": 1, "kv_len": kv_len}
        table = ops.block_table(q, k, (0.2, 0.6, 0.4), parts=4, **options)
        again = ops.choose_blocks(table.to_mask().float(), (0.2, 0.6, 0.4), 200, 320, **options)
        return table.indices, table.counts, again.indices, again.bits.words

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tensors = qk()
    for a, b in zip(model(*tensors), compiled(*tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"keep": (0.2, 0.5)}, "one share for each of 3 heads, not 2"),
        ({"keep": (0.2, 0.5, 1.5)}, r"in \(0, 1\], not 1.5"),
        ({"parts": 3}, "a power of two that divides blocks of 64 and 64 tokens, not 3"),
        ({"parts": 128}, "not 128"),
        ({"block_q": 0}, "at least one token, not 0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ops.block_table(*qk(), **{"keep": 0.2, **options})


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\[B, H, 4, 5\] for 200 queries and 320 keys"):
        ops.choose_blocks(torch.zeros(2, 3, 4, 4), 0.5, 200, 320)
