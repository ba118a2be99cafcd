"""SSTA against the published form: short tiles, windows at borders, text, padding, any layout."""

import math

import pytest
import torch
from published import ssta as published

from dit_accel import SSTA, TokenPruning
from dit_accel.config import AccelConfig
from dit_accel.forward.order import inverse, token_order
from dit_accel.methods import Call

TILE = (2, 4, 8)


def qkv(n, d=32, heads=2, batch=1):
    return [torch.randn(batch, heads, n, d) for _ in range(3)]


@pytest.mark.parametrize("tile", [TILE, (2, 8, 8), (6, 8, 8)])
@pytest.mark.parametrize("grid", [(5, 9, 17), (6, 8, 8), (1, 19, 33), (33, 4, 8)])
@pytest.mark.parametrize("text", [0, 70])
def test_it_is_the_published_form(grid, tile, text):
    n = math.prod(grid)
    q, k, v = qkv(n + text)
    method = SSTA(most=4, tile=tile, window=(3, 1, 3))
    expected = published(grid, tile, 4, (3, 1, 3), 0.7)((0, 0), q, k, v, None)[:, :, :n]
    noted = []
    out = method(q[:, :, :n], k, v, Call(keep=1.0, grid=grid, note=noted.append))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert noted[0].density() <= 1 and noted[0].uneven


def test_keep_lowers_the_number_and_text_may_come_first():
    grid, n = (4, 12, 16), 4 * 12 * 16
    q, k, v = qkv(n + 30)
    half = published(grid, TILE, 12, (1, 1, 1), 0.7)((0, 0), q, k, v, None)[:, :, :n]
    method = SSTA(tile=TILE, window=(1, 1, 1))
    out = method(q[:, :, :n], k, v, Call(keep=0.5, grid=grid))  # 6 of 12
    torch.testing.assert_close(out, half, rtol=1e-4, atol=1e-5)
    k, v = (torch.cat([x[:, :, n:], x[:, :, :n]], 2) for x in (k, v))
    out = method(q[:, :, :n], k, v, Call(keep=0.5, grid=grid, text_first=True))
    torch.testing.assert_close(out, half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [9, torch.tensor([9, 30])])
def test_padded_text(lengths):
    grid, n = (3, 6, 9), 3 * 6 * 9
    q, k, v = qkv(n + 30, batch=2)
    valid = torch.arange(n + 30) < n + torch.as_tensor(lengths).expand(2)[:, None]
    expected = published(grid, TILE, 6, (3, 3, 3), 0.7)((0, 0), q, k, v, None, valid)
    call = Call(keep=1.0, grid=grid, kv_len=n + lengths)
    out = SSTA(tile=TILE, most=6)(q[:, :, :n], k, v, call)
    torch.testing.assert_close(out, expected[:, :, :n], rtol=1e-4, atol=1e-5)


def test_padded_text_in_front():
    grid, n, lengths = (3, 6, 9), 3 * 6 * 9, torch.tensor([9, 30])
    q, k, v = qkv(n + 30, batch=2)
    call = Call(keep=1.0, grid=grid, kv_len=n + lengths)
    method = SSTA(tile=TILE, most=6)
    expected = method(q[:, :, :n], k, v, call)
    orders = [[*range(n, n + a), *range(n), *range(n + a, n + 30)] for a in lengths.tolist()]
    k, v = (torch.stack([row[:, o] for row, o in zip(x, orders, strict=True)]) for x in (k, v))
    call.text_first = True
    torch.testing.assert_close(method(q[:, :, :n], k, v, call), expected)


def test_tokens_that_come_in_tiles_and_gradients():
    grid = (5, 9, 17)
    q, k, v = (x.requires_grad_() for x in qkv(math.prod(grid)))
    index = token_order("tile", grid, TILE)
    method = SSTA(tile=TILE, most=6)
    expected = method(q, k, v, Call(keep=1.0, grid=grid))
    laid = [x[:, :, index] for x in (q, k, v)]
    out = method(*laid, Call(keep=1.0, grid=grid, index=index))[:, :, inverse(index)]
    torch.testing.assert_close(out, expected)
    naive = published(grid, TILE, 6, (3, 3, 3), 0.7)((0, 0), q, k, v, None)
    weight = torch.randn_like(out)
    mine = torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True)
    theirs = torch.autograd.grad((naive * weight).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tile": (3, 3, 3)}, "multiple of 64"),
        ({"window": (2, 3, 3)}, "window is odd"),
        ({"window": (3, 3)}, "three sizes"),
        ({"most": 0}, "most is ≥ 1"),
        ({"likeness": 1.5}, "likeness in"),
        ({"select": "sub"}, "own choice"),
    ],
)
def test_what_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        SSTA(**options)


def test_a_call_without_a_clip_and_a_preset(tmp_path):
    q, k, v = qkv(64)
    with pytest.raises(ValueError, match="a clip's grid"):
        SSTA()(q, k, v, Call(keep=1.0))
    config = AccelConfig(SSTA(most=8))
    assert AccelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="whole tiles"):
        AccelConfig(SSTA(), prune=TokenPruning())
