"""Windows by axis: alone, beside scores, in every method."""

import itertools

import pytest
import torch

import dit_accel
from dit_accel.cli.options import words
from dit_accel.forward.order import token_order
from dit_accel.methods import Call, find, selectors
from dit_accel.methods.sla import SLA
from dit_accel.methods.topk import TopK

GRID = (3, 10, 9)  # 270 tokens, five blocks of 64
SIZES = {"block_q": 64, "block_k": 64}
SHAPES = [
    {"t": 1, "h": 3, "w": 3},
    {"t": 2, "h": 5, "w": None},
    {"t": 1, "h": 3, "w": 3, "dilation": (1, 2, 3)},
    {"t": 2, "h": 2, "w": 1, "dilation": (2, 1, 2)},
]


def qkv(n=270, n_k=None):
    return [2 * torch.randn(1, 2, m, 16) for m in (n, n_k or n, n_k or n)]


def written(shape):
    """The selector's text."""
    given = {k: "x".join(map(str, v)) if k == "dilation" else v for k, v in shape.items()}
    return f"window({','.join(f'{k}={v}' for k, v in given.items() if v is not None)})"


def naive(n, size, step):
    """The places of an axis that each of its n places sees: as neighborhood attention has it."""
    found = []
    for i in range(n):
        group = list(range(i % step, n, step))  # those whole steps away
        size_here = len(group) if size is None else min(size, len(group))
        if size is None:
            group, size_here = list(range(n)), n
        begin = min(max(0, i // step - size_here // 2), len(group) - size_here) if size else 0
        found.append(set(group[begin : begin + size_here]))
    return found


def touched(shape, index, first, n_k):
    """The mask of blocks by a loop over all pairs of tokens."""
    dilation = shape.get("dilation", (1, 1, 1))
    axes = [naive(n, shape.get(x), s) for n, x, s in zip(GRID, "thw", dilation, strict=True)]
    places = list(itertools.product(*map(range, GRID)))
    places = places if index is None else [places[i] for i in index.tolist()]
    mask = torch.zeros(5, -(-n_k // 64), dtype=torch.bool)
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        if all(y in axis[x] for x, y, axis in zip(a, b, axes, strict=True)):
            mask[i // 64, (first + j) // 64] = True
    return mask


@pytest.mark.parametrize(
    "shape,order,text",
    zip(SHAPES, ("raster", "tile", "tile", "raster"), (0, 40, 40, 40), strict=True),
    ids=str,
)
def test_a_window_is_the_blocks_that_its_tokens_touch(shape, order, text):
    index, n_k = token_order(order, GRID, (1, 4, 4)), 270 + text
    forced = torch.zeros(-(-n_k // 64), dtype=torch.bool)
    forced[: 1 if text else 0] = True
    q, k, _ = qkv(270, n_k)
    call = Call(0.2, grid=GRID, index=index, text_first=True, forced=forced, n_forced=1)
    table = TopK(0.2, **SIZES, select=written(shape)).table(q, k, call)
    expected = touched(shape, index, text, n_k) | forced
    assert not expected.all()
    assert torch.equal(table.to_mask(), expected.expand(1, 2, -1, -1))
    part = Call(0.2, grid=GRID, index=index, text_first=True, first=128, queries=270)
    part.forced, part.n_forced = forced, 1
    rows = TopK(0.2, **SIZES, select=written(shape)).table(q[:, :, 128:256], k, part)
    assert torch.equal(rows.to_mask()[0, 0], expected[2:4])


@pytest.mark.parametrize("size", [1, 4, 5, 9])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_every_token_has_as_many_neighbours(size, step):
    from dit_accel.methods.selectors.window import _seen

    seen = _seen(9, size, step)
    most = torch.tensor([len(range(i % step, 9, step)) for i in range(9)])
    assert torch.equal(seen.sum(1), most.clamp(max=size).float())
    assert [set(row.nonzero()[:, 0].tolist()) for row in seen] == naive(9, size, step)


def test_a_window_of_everything_is_dense():
    q, k, v = qkv()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for text in ("window", "window(t=3,h=10,w=9)"):
        out = dit_accel.attention(q, k, v, TopK(0.1, select=text), grid=GRID)
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["topk", "pooled", "rectified", "shared", "sla"])
def test_a_window_stands_beside_the_scores_of_every_method(name):
    """The union of what either chooses, and the output of that table."""
    q, k, v = qkv()
    call, seen = Call(0.3, grid=GRID), []
    call.note = seen.append
    plain = {"mass": 0.0, "neighbours": None} if name == "rectified" else {}
    method = find(name)(0.3, **SIZES, **plain, select="sub & window(t=1,h=3,w=3)")
    out = method(q, k, v, call)
    scored = TopK(0.3, **SIZES, select="sub").table(q, k, Call(0.3))
    window = TopK(0.3, **SIZES, select="window(t=1,h=3,w=3)").table(q, k, Call(0.3, grid=GRID))
    union = scored.to_mask() | window.to_mask()
    assert (union.sum() > scored.counts.sum()) and union.sum() < union.numel()
    table = method.table(q, k, Call(0.3, grid=GRID)) if name == "shared" else seen[-1]
    assert torch.equal(table.to_mask(), union) and out.isfinite().all()
    assert window.uneven and not table.uneven  # a few blocks beside as many in each row
    alone = find(name)(0.3, **SIZES, **plain, select="window(t=1,h=3,w=3)")
    assert alone(q, k, v, Call(0.3, grid=GRID)).isfinite().all()


def test_pooled_over_a_window_is_near_tokens_and_the_means_of_the_others():
    """FIT's and AllMem's pattern: nothing outside of the window is lost."""
    q, k, v = qkv()
    k[:, :, 128:192], v[:, :, 128:192] = k[:, :, 128:129], v[:, :, 128:129]  # a block of one token
    method = find("pooled")(0.3, **SIZES, select="window(t=1,h=3,w=3)")
    mask = method.table(q, k, Call(0.3, grid=GRID)).to_mask()[0, 0]
    assert not mask[0, 2]
    tokens = mask[:1].repeat_interleave(64, 1)[:, :270].clone()
    tokens[:, 128:192] = True
    tokens[:, 192:] = True
    k[:, :, 192:], v[:, :, 192:] = k[:, :, 192:193], v[:, :, 192:193]
    k[:, :, 256:], v[:, :, 256:] = k[:, :, 256:257], v[:, :, 256:257]
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, :64], k, v, attn_mask=tokens)
    out = method(q, k, v, Call(0.3, grid=GRID))[:, :, :64]
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


def test_padding_is_never_read():
    q, k, _ = qkv(270, 350)
    for length in (300, torch.tensor([300])):
        call = Call(0.3, grid=GRID, kv_len=length)
        mask = TopK(0.3, **SIZES, select="window").table(q, k, call).to_mask()
        assert mask[..., :5].all() and not mask[..., 5:].any()


def test_nearest_is_the_window_of_rettention():
    q, k, _ = qkv()
    index = token_order("tile", GRID, (1, 4, 4))
    call = Call(0.5, grid=GRID, index=index)
    mine = TopK(0.5, **SIZES, select="nearest").table(q, k, call)
    other = find("rettention")(0.5, **SIZES).table(q, k, call)
    assert torch.equal(mine.to_mask(), other.to_mask())


def test_the_nearest_frame_wins_in_wide_pictures():
    """Seven frames of one row of blocks, whose frames are the last digit of a distance."""
    grid = (7, 8, 512)
    q = torch.randn(1, 1, 7 * 8 * 512, 4)
    index = token_order("tile", grid, (1, 8, 8))
    call = Call(64 * 3 / 448, grid=grid, index=index)
    mask = TopK(0.5, **SIZES, select="nearest").table(q, q, call).to_mask()[0, 0]
    seen = mask[3 * 64].unflatten(0, (7, 64)).nonzero()  # (frame, column) of blocks
    farthest = seen[:, 1].max()
    assert seen[seen[:, 1] == farthest][:, 0].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: TopK(select="window(t=0)"), "sizes and dilations ≥ 1, not window"),
        (lambda: TopK(select="window(dilation=2)"), "dilation is a list"),
        (lambda: TopK(select="window(d=2)"), "selector window does not take d=2"),
        (lambda: TopK(select="sub & door"), "unknown selector 'sub & door'"),
        (
            lambda: dit_accel.AccelConfig(TopK(select="nearest"), prune=dit_accel.TokenPruning()),
            "nearest looks where tokens lie",
        ),
        (
            lambda: dit_accel.AccelConfig(
                TopK(select="window(t=1)"), dit_accel.Schedule(head_keep=((0, (0.1,)),))
            ),
            "the selector window\\(1\\) reads the same blocks",
        ),
        (
            lambda: dit_accel.attention(*qkv(), TopK(select="window(t=1)")),
            "needs the grid of its 270 queries, not None",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_texts_are_read_again():
    for text in ("window", "window(3)", "window(h=8,w=8)", "window(w=5,dilation=1x2x2)"):
        assert str(selectors.find(text)) == text
    both = "sub(8) & window(t=1,h=3,w=3) & nearest"
    method = TopK(select=both)
    assert str(method.select) == both and selectors.find(both) == method.select
    assert method.select.placed and method.select.counted
    config = dit_accel.AccelConfig(method)
    assert dit_accel.AccelConfig.from_dict(config.to_dict()) == config
    rows = "topk/window(t=1,h=3,w=3)@0.1, pooled,sub(8)"
    assert words(rows) == ["topk/window(t=1,h=3,w=3)@0.1", "pooled", "sub(8)"]


def test_keep_of_one_leaves_a_window_as_it_is():
    """`keep` says nothing of it; methods that choose as many blocks as it says are dense."""
    assert TopK(1.0, select="window(t=1)").runs_at_one and not TopK(1.0).runs_at_one
    assert SLA(1.0, linear_layers=(0,)).runs_at_one and not SLA(1.0).runs_at_one
    learned = SLA(1.0).with_weights({"layers.0.weight": torch.eye(64)})
    assert learned.runs_at_one
