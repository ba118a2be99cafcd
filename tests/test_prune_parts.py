"""Token pruning's parts against their formulas: restores, contexts, thresholds."""

import pytest
import torch
from runs import run
from tiny import tiny_wan

import dit_accel
from dit_accel import Dense, Pooled, Schedule, TokenPruning
from dit_accel.pruning.context import Context
from dit_accel.pruning.criteria import pick, text_share
from dit_accel.pruning.restore import RESTORES, Memory, Past

GRID, C = (2, 3, 4), 5
N = 24


@pytest.fixture
def past():
    """Every third token ran at step 7; tokens ran last at steps 3 to 6; the order is shuffled."""
    index = torch.arange(0, N, 3)
    seen = torch.arange(N) % 4 + 3
    memory = Memory(torch.randn(2, N, C), seen, torch.randn(2, N, C), full=3)
    fresh, entered = torch.randn(2, index.numel(), C), torch.randn(2, N, C)
    return Past(memory, 7, index, fresh, entered, GRID, torch.randperm(N))


def others(past):
    return [i for i in range(N) if i not in past.index.tolist()]


def test_blend_moves_a_token_as_the_cells_around_it(past):
    got, memory = RESTORES["blend"](past), past.memory
    cells = [(c // 12, c // 4 % 3, c % 4) for c in past.order.tolist()]
    lonely = 0
    for i in others(past):
        near = [
            (j, at)
            for at, j in enumerate(past.index.tolist())
            if all(abs(a - b) <= 1 for a, b in zip(cells[i], cells[j], strict=True))
        ]
        rates = [
            (past.fresh[:, at] - memory.residual[:, j]) / (7 - memory.seen[j]) for j, at in near
        ]
        rate = torch.stack(rates).mean(0) if rates else torch.zeros(2, C)
        lonely += not rates
        want = memory.residual[:, i] + (7 - memory.seen[i]) * rate
        torch.testing.assert_close(got[:, i], want)
    assert lonely < N // 3


def test_copy_takes_what_happened_to_the_most_similar_token_that_ran(past):
    got = RESTORES["copy"](past)
    for b in range(2):
        for i in others(past):
            ran = past.entered[b, past.index]
            alike = torch.cosine_similarity(past.entered[b, i], ran, dim=-1)
            assert torch.equal(got[b, i], past.fresh[b, alike.argmax()])


@pytest.mark.parametrize("name", RESTORES)
def test_where_no_token_runs_each_way_is_the_old_residual(past, name):
    past.index, past.fresh = past.index[:0], past.fresh[:, :0]
    assert torch.equal(RESTORES[name](past), past.memory.residual)


def test_pooled_context_is_the_softmax_with_log_m():
    """40 tokens in blocks of 16, the last one short; block 1 runs, 6 text tokens come first."""
    k, v, q = (torch.randn(1, 40, 2, 8) for _ in range(3))
    context, index = Context("pooled", 16), torch.arange(16, 32)
    context.remember("layer", k, v)
    fresh = [torch.randn(1, 22, 2, 8) for _ in range(2)]
    whole = context.complete("layer", *fresh, slice(6, 22), index, 40)
    q = q[:, :22].transpose(1, 2)
    got = torch.nn.functional.scaled_dot_product_attention(q, *(x.transpose(1, 2) for x in whole))
    blocks, sizes = ((0, 16), (32, 40)), torch.tensor([1.0] * 22 + [16.0, 8.0])
    keys, values = (
        torch.cat([new, *(old[:, a:b].mean(1, keepdim=True) for a, b in blocks)], 1)
        for new, old in zip(fresh, (k, v), strict=True)
    )
    scores = q @ keys.permute(0, 2, 3, 1) / 8**0.5 + sizes.log()
    torch.testing.assert_close(got, scores.softmax(-1) @ values.transpose(1, 2))
    # what ran is remembered, what did not stays
    means = context.memory["layer"][0]
    torch.testing.assert_close(means[:, 1], fresh[0][:, 6:].mean(1))
    torch.testing.assert_close(means[:, 2], k[:, 32:].mean(1))
    assert means.shape[1] == 3 and context.nbytes() == 2 * means.nbytes


def test_context_extends_key_padding_and_refuses_other_masks():
    context = Context("stale", 16)
    mask = torch.tensor([[True] * 4 + [True, True, False]])[:, None, None]
    longer = context.mask(mask, slice(0, 4), 8)
    assert longer[0, 0, 0].tolist() == [True] * 10 + [False]
    assert context.mask(mask, slice(0, 4), 8) is longer and context.mask(None, None, 8) is None
    with pytest.raises(RuntimeError, match="key padding, not one of shape"):
        context.mask(torch.ones(1, 1, 7, 7, dtype=torch.bool), slice(0, 4), 8)
    with pytest.raises(RuntimeError, match="torch.float32"):
        context.mask(torch.zeros(1, 1, 1, 7), slice(0, 4), 8)


def test_share_of_attention_on_text_is_exact_for_blocks_of_one():
    q, k = torch.randn(2, 10, 3, 8), torch.randn(2, 14, 3, 8)
    mask = torch.ones(2, 1, 1, 14, dtype=torch.bool)
    mask[0, ..., :2] = False
    weights = (q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) / 8**0.5).masked_fill(~mask, -1e9)
    want = weights.softmax(-1)[..., :4].sum(-1).mean((0, 1))
    torch.testing.assert_close(text_share(q, k, slice(4, 14), mask, 1), want)
    means = k.clone()
    means[:, 4:12] = k[:, 4:12].mean(1, keepdim=True)
    means[:, 12:] = k[:, 12:].mean(1, keepdim=True)
    same = text_share(q, means, slice(4, 14), None, 1)
    torch.testing.assert_close(text_share(q, k, slice(4, 14), None, 8), same)


def test_threshold_takes_what_passes_it_and_no_more_than_keep():
    scores = torch.tensor([0.1, 0.5, 0.3, 0.9]).repeat_interleave(4)
    assert pick(scores, 3, 4, threshold=0.4).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert pick(scores, 1, 4, threshold=0.4).tolist() == [12, 13, 14, 15]
    assert pick(scores, 4, 4, threshold=2.0).numel() == 0
    always = torch.arange(16) < 2
    assert pick(scores, 1, 4, always, threshold=2.0).tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan(layers=3)


@pytest.fixture(scope="module")
def stock(pipe):
    return run(pipe, steps=4)


def pruned(pipe, method=None, **options):
    prune = TokenPruning(**{"start": 1, "end": 0, "refresh": 10, "last": None, **options})
    options = {"schedule": Schedule(warmup=0), "min_tokens": 0}
    with dit_accel.accelerated(pipe, method or Dense(), prune=prune, **options) as handle:
        return run(pipe, steps=4), handle.report()


def test_dynamic_pruning_runs_from_none_to_all_of_the_tokens(pipe, stock):
    out, report = pruned(pipe, keep=1.0, threshold=0.0, criterion="drift")
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4)
    assert all(step["tokens"] == 1 for step in report.steps)
    out, report = pruned(pipe, keep=1.0, threshold=1e9, criterion="drift")
    assert torch.equal(out, pruned(pipe, keep=0.0)[0])
    assert [step["tokens"] for step in report.steps] == [1, 1, 0, 0, 0, 0, 0, 0]
    _, report = pruned(pipe, keep=1.0, threshold=0.17, criterion="drift", block=16)
    shares = {step["tokens"] for step in report.steps[2:]}
    assert any(0 < share < 1 for share in shares), shares


@pytest.mark.parametrize("method", [Dense(), Pooled(keep=0.5)], ids=["dense", "pooled"])
@pytest.mark.parametrize("context", ["drop", "pooled", "stale"])
@pytest.mark.parametrize("restore", RESTORES)
def test_every_restore_goes_with_every_context(pipe, stock, restore, context, method):
    out, report = pruned(pipe, method, keep=0.5, restore=restore, context=context, block=16)
    assert (out - stock).norm() / stock.norm() < 0.1 and not report.unplanned
    assert report.state_bytes > 0


def test_context_brings_a_pruned_run_nearer_to_the_full_one(pipe, stock):
    error = {
        context: float((pruned(pipe, keep=0.5, context=context)[0] - stock).norm())
        for context in ("drop", "pooled", "stale")
    }
    assert error["stale"] < error["drop"], error
