"""VSA against the published form, tokens in any layout; its weights; what it refuses."""

import math

import pytest
import torch
from published import vsa as published

import dit_accel
from dit_accel import VSA
from dit_accel.config import AccelConfig
from dit_accel.forward.order import inverse, token_order
from dit_accel.methods import Call

GRID = (5, 6, 7)  # tiles of 4, 4, 4 are short on every side


def qkvg(n, d=32, heads=2):
    return [torch.randn(1, heads, n, d) for _ in range(4)]


def gate_of(gate):
    return lambda layer, hidden: gate.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tile", [(4, 4, 4), (2, 3, 4), (4, 4, 8)])
@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_it_is_the_published_form(tile, keep):
    q, k, v, gate = qkvg(math.prod(GRID))
    expected = published(GRID, tile, 1 - keep, gate_of(gate))((0, 0), q, k, v, None)
    call = Call(keep=keep, grid=GRID, gate=gate)
    torch.testing.assert_close(VSA(tile=tile)(q, k, v, call), expected, rtol=1e-4, atol=1e-5)
    plain = published(GRID, tile, 1 - keep, None)((0, 0), q, k, v, None)
    out = VSA(tile=tile)(q, k, v, Call(keep=keep, grid=GRID))
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_tokens_that_come_in_tiles_are_not_moved():
    q, k, v, gate = qkvg(math.prod(GRID))
    index = token_order("tile", GRID, (4, 4, 4))
    laid = [x[:, :, index] for x in (q, k, v, gate)]
    expected = VSA()(q, k, v, Call(keep=0.3, grid=GRID, gate=gate))
    out = VSA()(*laid[:3], Call(keep=0.3, grid=GRID, gate=laid[3], index=index))
    torch.testing.assert_close(out[:, :, inverse(index)], expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("sections", [(70,), (20, 66, 3)])
def test_text_is_always_read_and_reads_everything(sections, first):
    n, text = math.prod(GRID), sum(sections)
    q, k, v, gate = qkvg(n + text)
    expected = published(GRID, (4, 4, 4), 0.7, gate_of(gate), sections)((0, 0), q, k, v, None)
    call = Call(keep=0.3, grid=GRID, text_first=first, sections=sections)
    if first:
        call.gate = gate
        out = VSA()(q, k, v, call)
    else:
        q, k, v, call.gate = (
            torch.cat([x[:, :, text:], x[:, :, :text]], 2) for x in (q, k, v, gate)
        )
        out = VSA()(q, k, v, call)
        out = torch.cat([out[:, :, n:], out[:, :, :n]], 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 5])
def test_queries_of_the_clip_alone(padding):
    """Joint models whose text attends by itself; padded text comes last and is not read."""
    n, text = math.prod(GRID), 70
    q, k, v, gate = qkvg(n + text)
    call = Call(keep=0.3, grid=GRID, gate=gate)
    expected = VSA()(q, k, v, call)[:, :, :n]
    k, v = (torch.cat([x, torch.full((1, 2, padding, 32), torch.nan)], 2) for x in (k, v))
    call = Call(keep=0.3, grid=GRID, gate=gate[:, :, :n], kv_len=n + text if padding else None)
    torch.testing.assert_close(VSA()(q[:, :, :n], k, v, call), expected)


def test_gradients_reach_inputs_and_gate():
    q, k, v, _ = (x.requires_grad_() for x in qkvg(math.prod(GRID)))
    weight = torch.zeros(64, 24, requires_grad=True)
    method = VSA(keep=0.3).with_weights({"layers.0.weight": weight})
    hidden = torch.randn(1, math.prod(GRID), 24)
    gate = method.gate(hidden, (0, 0), 2).transpose(1, 2)
    out = method(q, k, v, Call(keep=0.3, grid=GRID, gate=gate))
    naive = published(GRID, (4, 4, 4), 0.7, gate_of(gate))((0, 0), q, k, v, None)
    target = torch.randn_like(out)
    grads = [torch.autograd.grad((x * target).sum(), (q, k, v, weight), retain_graph=True)
             for x in (out, naive)]  # fmt: skip
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_weights_come_back_from_a_file_and_idle_gates_are_left_out(tmp_path):
    tensors = {"layers.0.weight": torch.randn(64, 24), "layers.0.bias": torch.randn(64)}
    zero = {"layers.1.weight": torch.zeros(64, 24)}
    VSA(tile=(2, 4, 4)).with_weights(tensors | zero).save(tmp_path / "vsa.safetensors")
    method = VSA(tile=(2, 4, 4), weights=str(tmp_path / "vsa.safetensors"))
    assert set(method.tensors()) == set(tensors)
    hidden = torch.randn(1, 5, 24)
    expected = torch.nn.functional.linear(hidden, *tensors.values()).view(1, 5, 2, 32)
    torch.testing.assert_close(method.gate(hidden, (0, 0), 2), expected)
    assert method.gate(hidden, (0, 1), 2) is None
    with pytest.raises(ValueError, match=r"was trained with tile=\[2, 4, 4\]: give VSA the same"):
        VSA(weights=str(tmp_path / "vsa.safetensors"))
    with pytest.raises(ValueError, match="has 64 channels, which heads of 48"):
        method.check(48, 2)


def test_its_tiles_decide_the_order_of_tokens():
    config = AccelConfig(VSA(tile=(4, 4, 8)))
    assert (config.order, config.tile) == ("tile", (4, 4, 8))
    assert AccelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="lays tokens out in its own tiles"):
        AccelConfig(VSA(), order="hilbert")
    with pytest.raises(ValueError, match="vsa needs whole tiles of tokens"):
        AccelConfig(VSA(), prune=dit_accel.TokenPruning())


def test_what_it_refuses():
    q, k, v, _ = qkvg(20)
    for call in (Call(keep=0.3), Call(keep=0.3, grid=(1, 4, 5), kv_len=torch.tensor([8]))):
        with pytest.raises(ValueError, match="VSA takes a clip's grid"):
            VSA()(q, k, v, call)
    with pytest.raises(ValueError, match="of at most 128"):
        VSA(tile=(4, 8, 8))
    with pytest.raises(ValueError, match="takes layers.<number>.weight or"):
        VSA().with_weights({"layers.0.gate": torch.ones(1)})
    out = dit_accel.attention(q, k, v, VSA(keep=1.0), grid=(1, 4, 5))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense)
