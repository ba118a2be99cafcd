"""Each scored selector by its identity: where it must be another one, or what is known."""

import pytest
import torch

from dit_accel.methods import Call
from dit_accel.methods.selectors.chunks import borders, chunked
from dit_accel.methods.selectors.relative import _rounded
from dit_accel.methods.selectors.slash import sampled_shares
from dit_accel.methods.topk import TopK

N, M = 640, 10


def qkv():
    """Tokens of a block have a part in common."""
    common = torch.randn(3, 1, 2, M, 16).repeat_interleave(64, 3)
    return list(common + torch.randn(3, 1, 2, N, 16))


def mask(select, q, k, v=None, keep=0.3, **call):
    method = TopK(0.3, block_q=64, select=select)
    return method.chosen(q, k, Call(keep, **call), v)[0].to_mask()


def exact_shares(q, k):
    """[B, H, M, M]: softmax weights summed over key blocks, their mean over a query block."""
    weight = (q @ k.mT / 4).softmax(-1)
    return weight.unflatten(2, (M, 64)).mean(3).unflatten(3, (M, 64)).sum(4)


def near(reach=1):
    far = (torch.arange(M)[:, None] - torch.arange(M)).abs()
    return far <= reach


# relative: AnchorAttention and SALE


def test_a_threshold_of_nothing_or_everything():
    q, k, _ = qkv()
    assert mask("relative(1e9)", q, k, keep=1.0).all()
    assert (mask("relative(-1e9)", q, k, keep=1.0) == near()).all()
    constant = torch.ones_like(k)
    assert mask("relative", q, constant, keep=1.0).all()


def test_what_is_above_the_threshold_is_kept_up_to_the_cap():
    q, k, _ = qkv()
    share = exact_shares(q, k)
    for theta in (0.5, 2.0):
        held = (share * near()).sum(-1, keepdim=True)
        above = share >= held * torch.tensor(-theta).exp()
        found = mask(f"relative(theta={theta},parts=64)", q, k, keep=1.0)
        assert torch.equal(found, above | near()) and not found.all()
        assert not torch.equal(found, near().expand_as(found))
        best = mask("sub(64)", q, k, keep=0.3)
        capped = mask(f"relative(theta={theta},parts=64)", q, k, keep=0.3)
        assert torch.equal(capped, (above & best) | near())


def test_what_the_text_holds_is_read_anyway():
    q, k, _ = qkv()
    forced = torch.zeros(M, dtype=torch.bool)
    forced[4] = True
    found = mask("relative(-1e9)", q, k, keep=1.0, forced=forced, n_forced=1)
    assert (found == (near() | forced)).all()


def test_an_estimate_in_few_bits():
    q, k, _ = qkv()
    for bits, levels in ((4, 7), (8, 127)):
        step = q.abs().amax(-1, keepdim=True) / levels
        rounded = _rounded(q, bits)
        assert ((rounded - q).abs() <= step / 2 + 1e-6).all()
        assert ((rounded / step).round() - rounded / step).abs().max() < 1e-3
    assert (_rounded(torch.zeros(1, 1, 2, 4), 4) == 0).all()
    fine, coarse = (
        mask(f"relative(theta=2,parts=64,bits={bits})", q, k, keep=1.0) for bits in (8, 4)
    )
    exact = mask("relative(theta=2,parts=64)", q, k, keep=1.0)
    assert (fine == exact).float().mean() > 0.99 and (coarse == exact).float().mean() > 0.9


# valued: Dynamic Mask Attention


def test_values_of_one_size_leave_the_choice_to_the_means():
    q, k, v = qkv()
    means = mask("means", q, k)
    v[:] = torch.nn.functional.normalize(torch.randn(1, 2, M, 16), dim=-1).repeat_interleave(64, 2)
    assert torch.equal(mask("valued", q, k, v), means)
    v[:, :, 192:256] *= 1e9
    assert mask("valued", q, k, v)[..., 3].all()
    v[:, :, 192:256] = 0
    assert not mask("valued", q, k, v)[..., 3].any()
    with pytest.raises(ValueError, match="valued looks at v"):
        mask("valued", q, k)


# regions and tree: BiFormer, Superlinear, HiP


def test_regions_of_one_block_or_of_all_blocks_are_the_means():
    q, k, _ = qkv()
    means = mask("means", q, k)
    assert torch.equal(mask("regions(factor=1e9)", q, k), means)
    assert torch.equal(mask("regions(group=1,factor=1)", q, k), means)


def test_blocks_come_from_the_best_regions():
    q, k, _ = qkv()
    found = mask("regions(group=5,factor=1)", q, k)  # one region of two
    halves = found.unflatten(-1, (2, 5)).any(-1)
    assert (halves.sum(-1) == 1).all()
    q_mean = q.unflatten(2, (M, 64)).mean(3)
    best = (q_mean @ k.unflatten(2, (2, 320)).mean(3).mT).argmax(-1)
    assert torch.equal(halves.int().argmax(-1), best)


def test_a_tree_finds_the_best_where_scores_have_one_peak():
    place = torch.arange(16.0)
    for peak in (0, 3, 8, 15):
        scores = -((place - peak - 0.1) ** 2)
        k = scores.repeat_interleave(64)[None, None, :, None]
        q = torch.ones(1, 1, 64, 1)
        for keep in (3 / 16, 4 / 16, 7 / 16):
            found = mask("tree", q, k, keep=keep)
            assert torch.equal(found, mask("means", q, k, keep=keep))


def test_a_tree_misses_what_hides_beside_a_bad_middle():
    scores = torch.tensor([9.0, 0, 0, 0, 1, 1, 1, 1])
    k, q = scores.repeat_interleave(64)[None, None, :, None], torch.ones(1, 1, 64, 1)
    assert not mask("tree", q, k, keep=1 / 8)[..., 0].any()
    assert mask("means", q, k, keep=1 / 8)[..., 0].all()


# slash: MInference


def test_a_key_that_all_queries_like_is_a_column():
    q, k, _ = qkv()
    q[..., 0], k[:, :, 300, 0] = 8.0, 8.0
    found = mask("slash", q, k, keep=0.1)
    assert found[..., 4].all() and (found.sum(-1) == 1).all()


@pytest.mark.parametrize("text", [0, 64])
def test_scores_of_a_distance_are_a_diagonal(text):
    angle = torch.arange(N + text) / N
    phase = torch.stack([angle.cos(), angle.sin()], -1)[None, None] * 300
    k = phase
    turned = torch.arange(N) / N + 128 / N  # each query is like the key 128 behind it
    q = torch.stack([(turned + text / N).cos(), (turned + text / N).sin()], -1)[None, None] * 300
    found = mask("slash", q, k, keep=0.05, text_first=True)
    rows = torch.arange(M - 3)
    assert found[0, 0, rows, rows + 2 + text // 64].all()


def test_all_queries_give_the_exact_shares():
    q, k, _ = qkv()
    shares = sampled_shares(q, k, Call(0.3), (64, 64), 1)
    torch.testing.assert_close(shares, exact_shares(q, k))
    some = sampled_shares(q, k[:, :, :600], Call(0.3), (64, 64), 8)
    weight = (q[:, :, ::8] @ k[:, :, :600].mT / 4).softmax(-1).unflatten(2, (M, 8)).mean(3)
    torch.testing.assert_close(some[..., 9], weight[..., 576:].sum(-1))


# chunks: DHSA


def test_chunks_that_are_blocks_are_the_means(monkeypatch):
    q, k, _ = qkv()
    fixed = torch.zeros(1, 2, N, dtype=torch.bool)
    fixed[..., 64::64] = True
    monkeypatch.setattr("dit_accel.methods.selectors.chunks.borders", lambda x, count, least: fixed)
    assert torch.equal(mask("chunks", q, k), mask("means", q, k))


def test_chunks_end_where_tokens_change():
    ends = [40, 100, 230, 500]
    x = torch.randn(1, 1, 5, 16).repeat_interleave(torch.tensor([40, 60, 130, 270, 140]), 2)
    x = x + 0.01 * torch.randn(1, 1, N, 16)
    found = borders(x, 5, 16)
    assert found[0, 0].nonzero()[:, 0].tolist() == ends
    smooth = chunked(x, found)[0, 0]
    torch.testing.assert_close(smooth[50], x[0, 0, 40:100].mean(0) * 60**0.5)
    assert (borders(torch.randn(1, 1, N, 16), 40, 16)[0, 0].nonzero()[:, 0].diff() >= 16).all()
    assert not borders(torch.randn(1, 1, 30, 16), 4, 16).any()


@pytest.mark.parametrize(
    "text,message",
    [
        ("relative(parts=3)", "1, 2, 4, 8, 16, 32 or 64 parts, not 3"),
        ("relative(bits=1)", "bits is 2 to 8 or None, not 1"),
        ("relative(theta=much)", "theta is a number, not 'much'"),
        ("relative(reach=-1)", "reach is a number of blocks"),
        ("regions(factor=0.5)", "group and factor are ≥ 1, not 8 and 0.5"),
        ("slash(3)", "every is 1, 2, 4"),
        ("chunks(0)", "at least one token, not 0"),
        ("tree(2)", "selector tree does not take 2"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TopK(select=text)
