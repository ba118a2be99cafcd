"""The public operators: exact properties, gradients, torch.compile, and what they refuse."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dit_accel import ops
from dit_accel.kernels.block_sparse_attention import reference
from dit_accel.kernels.pooled_attention import reference as pooled
from dit_accel.kernels.rectified_attention import reference as rectified
from dit_accel.ops import dispatch, registration, tables
from dit_accel.table import BlockTable
from dit_accel.testing import assert_close

IMPLEMENTATIONS = ["reference", "torch"]


def qkv(n_q: int = 200, n_k: int = 300, d: int = 16, grad: bool = False) -> list[torch.Tensor]:
    shapes = [(2, 2, n_q, d), (2, 2, n_k, d), (2, 2, n_k, d)]
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DIT_ACCEL_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("n_q,n_k", [(1, 1), (64, 64), (65, 63), (1000, 1000), (100, 1000)])
def test_all_blocks_is_dense(implementation: str, n_q: int, n_k: int):
    q, k, v = qkv(n_q, n_k)
    out = ops.block_sparse_attention(q, k, v, ops.block_table(q, k, 1.0))
    wide = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_close("out", out, wide, F.scaled_dot_product_attention(q, k, v))


def test_all_blocks_of_valid_keys_is_dense(implementation: str):
    q, k, v = qkv()
    k[:, :, 130:], v[:, :, 130:] = torch.nan, torch.nan
    table = ops.block_table(q, k, 1.0, kv_len=130)
    out = ops.block_sparse_attention(q, k, v, table, kv_len=130)
    cut = k[:, :, :130], v[:, :, :130]
    wide = F.scaled_dot_product_attention(q.double(), *(x.double() for x in cut))
    assert_close("out", out, wide, F.scaled_dot_product_attention(q, *cut))


def test_layout_of_the_result_is_that_of_q(implementation: str):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    out = ops.block_sparse_attention(q, k, v, ops.block_table(q, k, 0.5))
    assert out.stride() == q.stride()


def test_keep_rounds_up_to_one_block(implementation: str):
    q, k, v = qkv()
    table = ops.block_table(q, k, 1e-6)
    assert (table.counts == 1).all()
    assert ops.block_sparse_attention(q, k, v, table).isfinite().all()


def test_max_forced_bounds_the_width(implementation: str):
    q, k, _ = qkv(200, 640)
    forced = torch.zeros(10, dtype=torch.bool)
    forced[[1, 4]] = True
    assert ops.block_table(q, k, 0.3, forced=forced).indices.shape[-1] == 5
    table = ops.block_table(q, k, 0.3, forced=forced, max_forced=4)
    assert table.indices.shape[-1] == 7 and (table.counts == 5).all()
    assert table.to_mask()[..., [1, 4]].all()


def gradients(fn, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = fn(*leaves)
    return torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)


def test_gradients(implementation: str):
    tensors = qkv(130, 150)
    table = ops.block_table(*tensors[:2], 0.5)

    def naive(q, k, v):
        options = {"return_lse": True, "dtype": q.dtype}
        return reference.block_sparse_attention(q, k, v, table, **options)

    found = gradients(lambda *x: ops.block_sparse_attention(*x, table, return_lse=True), tensors)
    wide, same = gradients(naive, [x.double() for x in tensors]), gradients(naive, tensors)
    for name, *grads in zip(("dq", "dk", "dv"), found, wide, same, strict=True):
        assert_close(name, *grads)


def test_gradients_with_checkpointing():
    tensors = qkv(130, 150)
    table = ops.block_table(*tensors[:2], 0.5)

    def sparse(q, k, v):
        return ops.block_sparse_attention(q, k, v, table, return_lse=True)

    def again(*tensors):
        return torch.utils.checkpoint.checkpoint(sparse, *tensors, use_reentrant=False)

    for a, b in zip(gradients(sparse, tensors), gradients(again, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "kv_len", [None, 250, torch.tensor([300, 77])], ids=["all", "int", "batch"]
)
@pytest.mark.parametrize("keep", [0.4, (0.2, 0.6)], ids=str)
def test_compiles_whole(kv_len: int | torch.Tensor | None, keep: float | tuple[float, ...]):
    forced = torch.tensor([True, False, False, False, False])

    def model(q, k, v):
        table = ops.block_table(q, k, keep, forced=forced, kv_len=kv_len)
        out, lse = ops.block_sparse_attention(q, k, v, table, return_lse=True, kv_len=kv_len)
        return out.square().sum() + lse.sum() + table.density()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tensors, results = qkv(grad=True), []
    for fn in (model, compiled):
        loss = fn(*tensors)
        results.append((loss, *torch.autograd.grad(loss, tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


COMPENSATED = [ops.pooled_attention, ops.rectified_attention]


@pytest.mark.parametrize("op", COMPENSATED)
@pytest.mark.parametrize("mass", [0.0, 0.5])
def test_compensated_operators_compile_whole(op, mass):
    def model(q, k, v):
        table = ops.block_table(q, k, 0.4, kv_len=250, mass=mass)
        return op(q, k, v, table, kv_len=250).square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tensors = qkv()
    torch.testing.assert_close(compiled(*tensors), model(*tensors))
    tensors = [x.requires_grad_() for x in tensors]
    grads = [torch.autograd.grad(fn(*tensors), tensors) for fn in (model, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


LENGTHS = [None, 250, torch.tensor([300, 77])]


@pytest.mark.parametrize("op", COMPENSATED)
@pytest.mark.parametrize("kv_len", LENGTHS, ids=["all", "int", "batch"])
def test_means_of_the_table_give_the_same_bits(op, kv_len, implementation: str):
    def model(q, k, v):
        options = {"kv_len": kv_len, "return_means": True, "spreads": True}
        table, means = ops.block_table(q, k, 0.4, **options)
        return op(q, k, v, table, kv_len=kv_len, means=means), means.q, means.k_far

    q, k, v = qkv()
    if kv_len is not None:
        k[0, :, 300 if isinstance(kv_len, torch.Tensor) else kv_len :] = torch.nan
    out = model(q, k, v)
    table = ops.block_table(q, k, 0.4, kv_len=kv_len)
    assert torch.equal(out[0], op(q, k, v, table, kv_len=kv_len))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(q, k, v)
    for a, b in zip(compiled, out, strict=True):
        assert torch.equal(a, b)
    assert not out[1].requires_grad
    leaves = [x.nan_to_num().requires_grad_() for x in (q, k, v)]
    loss = model(*leaves)[0].sum()
    plain = op(*leaves, ops.block_table(*leaves[:2], 0.4, kv_len=kv_len), kv_len=kv_len).sum()
    grads = (torch.autograd.grad(x, leaves) for x in (loss, plain))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("made,given,known", [(None, None, True), (None, 300, True)]
    + [(200, 200, True), (200, None, False), (None, 200, False), (200, 150, False)])  # fmt: skip
@pytest.mark.parametrize("op", ["pooled_attention", "rectified_attention"])
def test_a_table_hands_on_its_bits_of_the_same_keys(monkeypatch, op, made, given, known):
    q, k, v = qkv()
    table, _ = ops.block_table(q, k, 0.4, kv_len=made, return_means=True)
    expected = getattr(ops, op)(q, k, v, replace(table, bits=None), kv_len=given)
    handed, real = [], getattr(registration, op)

    def spy(*args):
        handed.extend(x for x in args if x is table.bits.words)
        return real(*args)

    monkeypatch.setattr(registration, op, spy)
    out = getattr(ops, op)(q, k, v, table, kv_len=given)
    assert bool(handed) == known and torch.equal(out, expected)


LINEAR = {"weight": torch.eye(16), "linear": "all"}


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    "op,options",
    [
        (ops.block_sparse_attention, {}),
        (ops.block_sparse_attention, {"precision": "int8"}),
        (ops.pooled_attention, {}),
        (ops.rectified_attention, {}),
        (ops.sparse_linear_attention, LINEAR),
        (ops.sparse_linear_attention, LINEAR | {"linear": "rest"}),
    ],
    ids=lambda x: getattr(x, "__name__", None) or ",".join(x) or "plain",
)
@pytest.mark.parametrize("wrap", [lambda fn: fn, torch.compile(backend="aot_eager")])
def test_a_kernel_is_told_whether_rows_are_uneven(monkeypatch, op, options, uneven, wrap):
    q, k, v = qkv()
    table, told, real = ops.block_table(q, k, (0.2, 0.6) if uneven else 0.4), [], dispatch.select

    def spy(name, *args, **features):
        found = real(name, *args, **features)
        if name.endswith("linear_branch"):
            return found

        def fn(q, k, v, table, *args, **options):
            told.append(table.uneven)
            return found.fn(q, k, v, table, *args, **options)

        return replace(found, fn=fn)

    monkeypatch.setattr(dispatch, "select", spy)
    wrap(lambda *tensors: op(*tensors, table, **options))(q, k, v)
    assert told == [uneven]


def test_means_of_other_tensors_are_refused():
    q, k, v = qkv()
    table, means = ops.block_table(q, k, 0.4, kv_len=250, return_means=True)
    ops.pooled_attention(q, k, v, table, kv_len=250, means=means)
    for bad, message in (
        ({"kv_len": 249}, "another kv_len"),
        ({"kv_len": torch.tensor([250, 250])}, "another kv_len"),
        ({"kv_len": 250, "table": ops.block_table(q, k, 0.4, 128)}, r"\[2, 2, 2, 16\]"),
    ):
        bad = {"table": table, **bad}
        with pytest.raises(ValueError, match=message):
            ops.pooled_attention(q, k, v, means=means, **bad)
    with pytest.raises(TypeError, match="BlockMeans, not Tensor"):
        ops.pooled_attention(q, k, v, table, means=means.k)
    with pytest.raises(ValueError, match="spreads=True"):
        ops.rectified_attention(q, k, v, table, kv_len=250, means=means)
    ops.rectified_attention(q, k, v, table, kv_len=250, means=means, gapr=False)


@pytest.mark.parametrize("module", [pooled, rectified])
def test_gradients_of_compensated_operators(implementation: str, module):
    name = module.__name__.split(".")[-2]
    tensors = qkv(130, 150)
    table = ops.block_table(*tensors[:2], 0.3, block_k=32, block_q=32)

    def naive(q, k, v):
        return getattr(module, name)(q, k, v, table, dtype=q.dtype), torch.zeros(())

    def found(q, k, v):
        return getattr(ops, name)(q, k, v, table), torch.zeros(())

    runs = (found, tensors), (naive, [x.double() for x in tensors]), (naive, tensors)
    for name, *grads in zip(("dq", "dk", "dv"), *(gradients(*run) for run in runs), strict=True):
        assert_close(name, *grads)


@pytest.mark.parametrize("length", [None, torch.tensor([150, 64])])
@pytest.mark.parametrize("means,spreads", [(False, False), (True, False), (True, True)])
def test_registration(means: bool, spreads: bool, length: torch.Tensor | None):
    q, k, v = qkv(130, 150, grad=True)
    torch.library.opcheck(
        tables.block_table,
        (q.detach(), k.detach(), [0.5], 64, 64, torch.ones(3, dtype=torch.bool), length, None, 3)
        + (0.3, None, 0, 0.1, means, spreads, 4 if spreads else 1),
    )
    scores = torch.rand(2, 2, 3, 3)
    options = ([0.5, 0.4], 64, 64, 130, 150, None, length, None, None, 0.0, None, 0)
    torch.library.opcheck(tables.choose_blocks, (scores, *options))
    table, known = ops.block_table(q, k, 0.5, kv_len=length, return_means=True, spreads=True)
    tensors, rest = (q, k, v, table.indices, table.counts), (64, 64, 0.25)
    last = (length, None, *[True] * means)  # with means as of an uneven table
    torch.library.opcheck(registration.block_sparse_attention, (*tensors, *rest, *last))
    given = (known.k, table.bits.words) if means else (None, None)
    torch.library.opcheck(registration.pooled_attention, (*tensors, *given, *rest, *last))
    tensors = [x.detach() for x in tensors]
    known = [known.q, known.k, known.q_far, known.k_far][: 2 * (means + spreads)]
    rest = (known, given[1], *rest, spreads, *last)
    torch.library.opcheck(registration.rectified_attention, (*tensors, *rest))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"keep": 0}, r"\(0, 1\], not 0"),
        ({"keep": 1.5}, "not 1.5"),
        ({"keep": True}, "not True"),
        ({"block_k": 0}, "at least one token"),
        ({"kv_len": 0}, "between 1 and N_k = 300, not 0"),
        ({"kv_len": 301}, "not 301"),
        ({"kv_len": torch.tensor([1, 2, 3])}, r"\[B\] = \[2\]"),
        ({"kv_len": torch.tensor([1.0, 2.0])}, "of integers"),
        ({"forced": torch.ones(5)}, "bool tensor"),
        ({"forced": torch.ones(4, dtype=torch.bool)}, r"broadcasts to .* \[2, 2, 4, 5\]"),
    ],
)
def test_block_table_refuses(options: dict, message: str):
    q, k, _ = qkv()
    with pytest.raises(ValueError, match=message):
        ops.block_table(q, k, **{"keep": 0.5, **options})


def test_attention_refuses():
    q, k, v = qkv()
    table = ops.block_table(q, k, 0.5)
    for bad, message in (
        ((q, k, v[:, :, 1:]), "k and v are"),
        ((q[:, :1], k, v), "share B, H and D"),
        ((q[:, :, :0], k, v), "at least one token"),
        ((q.half(), k, v), "share one floating dtype"),
        ((q[:, :, 1:], k, v), r"\(N_q, N_k\) = \(200, 300\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.block_sparse_attention(*bad, table)
    with pytest.raises(TypeError, match="BlockTable, not Tensor"):
        ops.block_sparse_attention(q, k, v, table.indices)
    with pytest.raises(ValueError, match="serves"):
        other = BlockTable(table.indices[:1], table.counts[:1], 64, 64, 200, 300)
        ops.block_sparse_attention(q, k, v, other)


def test_int8_is_near_and_compiles_whole():
    q, k, v = qkv(130, 300, 64)
    table = ops.block_table(q, k, 0.5, kv_len=250)

    def attend(q, k, v, precision="int8"):
        options = {"return_lse": True, "kv_len": 250, "precision": precision}
        return ops.block_sparse_attention(q, k, v, table, **options)

    exact, found = attend(q, k, v, None), attend(q, k, v)
    assert 0.001 < ((found[0] - exact[0]).norm() / exact[0].norm()).item() < 0.05
    torch.testing.assert_close(found[1], exact[1], atol=0.05, rtol=0)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    for a, b in zip(compiled, found, strict=True):
        assert torch.equal(a, b)


def test_int8_in_a_layout_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIT_ACCEL_KERNELS", "reference")
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    out = ops.block_sparse_attention(q, k, v, ops.block_table(q, k, 0.5), precision="int8")
    assert out.stride() == q.stride()


def test_what_precision_refuses():
    q, k, v = qkv()
    table = ops.block_table(q, k, 0.5)
    with pytest.raises(ValueError, match="'int8', 'int8-hadamard' or None"):
        ops.block_sparse_attention(q, k, v, table, precision="fp4")
    with pytest.raises(ValueError, match="no gradient"):
        ops.block_sparse_attention(q.requires_grad_(), k, v, table, precision="int8")
