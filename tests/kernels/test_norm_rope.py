"""The norm and rotary embedding of queries and keys, in torch and in Triton's interpreter."""

import pytest
import torch
from torch import nn

from dit_accel import ops
from dit_accel.kernels.norm_rope import reference, triton
from dit_accel.kernels.norm_rope import torch as fast
from dit_accel.testing import assert_close, references

HALF = torch.float16
SHAPES = [  # batch, tokens, heads, channels of a head, batch of the cosines
    (1, 1, 1, 64, 1),
    (2, 37, 5, 64, 1),
    (1, 9, 12, 128, 1),
    (2, 5, 3, 80, 2),
    (1, 3, 40, 128, 1),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, normed: bool = True):
    batch, n, heads, d, of = shape
    q, k, _ = torch.randn(batch, n, 3 * heads * d).to(dtype).chunk(3, dim=-1)  # fused projections
    angles = (6.28 * torch.rand(of, n, 1, d // 2)).repeat_interleave(2, -1)
    weights = [(1 + 0.2 * torch.randn(heads * d)).to(dtype) if normed else None for _ in range(2)]
    return (q, k, angles.cos(), angles.sin(), heads, *weights, 1e-6)


def check(made, args) -> None:
    wide, same = references(reference.norm_rope, *args)
    for name, *x in zip("qk", made, wide, same, strict=True):
        assert x[0].is_contiguous() and x[0].dtype == args[0].dtype
        assert_close(name, *x)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_torch(shape: tuple[int, ...], dtype: torch.dtype, normed: bool):
    args = inputs(shape, dtype, normed)
    check(fast.norm_rope(*args), args)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shape,dtype", [*((s, HALF) for s in SHAPES), (SHAPES[1], torch.float32)])
def test_in_triton(shape: tuple[int, ...], dtype: torch.dtype, normed: bool, device: str):
    given = inputs(shape, dtype, normed)
    args = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in given)
    check(triton.norm_rope(*args), args)


def test_it_is_what_wan_does():
    """Against diffusers' own processor, up to attention."""
    from diffusers.models.transformers import transformer_wan as wan

    q, k, cos, sin, heads, *weights, eps = inputs((2, 30, 3, 64, 1), torch.float32)
    seen = []
    attn = wan.WanAttention(heads * 64, heads, 64, eps, processor=wan.WanAttnProcessor())
    for norm, weight in zip((attn.norm_q, attn.norm_k), weights, strict=True):
        norm.weight = nn.Parameter(weight)
    attn.to_q, attn.to_k, attn.to_v = (nn.Module() for _ in range(3))
    for layer, made in ((attn.to_q, q), (attn.to_k, k), (attn.to_v, k)):
        layer.forward = lambda x, made=made: made
    own = wan.dispatch_attention_fn
    wan.dispatch_attention_fn = lambda q, k, v, **rest: seen.extend((q, k)) or v
    try:
        attn(torch.zeros(2, 30, heads * 64), rotary_emb=(cos, sin))
    finally:
        wan.dispatch_attention_fn = own
    torch.testing.assert_close(ops.norm_rope(q, k, cos, sin, heads, *weights, eps), tuple(seen))


def test_gradients_are_those_of_the_reference():
    q, k, cos, sin, heads, *weights, eps = inputs((1, 4, 2, 8, 1), torch.float64)
    given = [x.detach().clone().requires_grad_() for x in (q, k, *weights)]

    def squares(fn) -> torch.Tensor:
        made = fn(*given[:2], cos, sin, heads, *given[2:], eps)
        return sum((x.double() * torch.arange(x.numel()).view(x.shape)).sum() for x in made)

    for mine, theirs in zip(
        torch.autograd.grad(squares(ops.norm_rope), given),
        torch.autograd.grad(squares(reference.norm_rope), given),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_torch_library_finds_no_fault():
    args = inputs((2, 9, 3, 16, 1), torch.float32)
    torch.library.opcheck(torch.ops.dit_accel.norm_rope.default, args)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"k": (2, 9, 40)}, "both"),
        ({"heads": 5}, "5 heads of an even D"),
        ({"cos": (1, 8, 1, 16)}, "cos and sin are"),
        ({"sin": (3, 9, 1, 16)}, "cos and sin are"),
        ({"q_weight": (16,)}, r"a weight is \[48\], not \[16\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, said: str):
    names = ("q", "k", "cos", "sin", "heads", "q_weight", "k_weight", "eps")
    args = dict(zip(names, inputs((2, 9, 3, 16, 1), torch.float32), strict=True))
    made = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=said):
        ops.norm_rope(**args | made)
