"""The branches of SLA: each against every pair of tokens, and where it is the plain one."""

import pytest
import torch
from runs import on, run
from tiny import tiny_flux, tiny_wan
from torch.nn import functional as F

from dit_accel import SLA, TopK, ops
from dit_accel.config import AccelConfig
from dit_accel.kernels.sparse_linear_attention import reference
from dit_accel.methods import Call, branches
from dit_accel.methods.branches.decay import distances
from dit_accel.ops import dispatch
from dit_accel.pruning.config import TokenPruning

GRID = (5, 8, 8)
N, D, H, WIDTH = 320, 16, 3, 24
ALL = [name for name in branches.infos() if name != "plain"]
WEIGHING = [
    *("decay", "gated", "rala", "rms", "decay & gated", "decay & rms", "gated & conv"),
    *("gated & rms", "rala & rms"),
]


def qkv(n=N, n_k=None):
    return [torch.randn(2, H, m, D, requires_grad=True) for m in (n, n_k or n, n_k or n)]


def method_of(branch, random=True, **options):
    """An SLA with a trained W, and its branch's tensors: random ones, or fresh."""
    method = SLA(keep=0.4, block_q=64, branch=branch, **options)
    tensors = {f"layers.0.{name}": x for name, x in method.fresh(H, D, WIDTH).items()}
    own = ("weight", "bias", "gate")
    for name, x in tensors.items():
        if random or name.rpartition(".")[2] in own:
            tensors[name] = (torch.randn_like(x) / 4).requires_grad_()
    return method.with_weights(tensors), tensors


def call_of(method, n_text=0, **options):
    hidden = torch.linspace(-1, 1, 2 * N * WIDTH).view(2, N, WIDTH)
    gate = method.gate(hidden, (0, 0), H)
    gate = None if gate is None else gate.transpose(1, 2)
    forced = None
    if n_text:
        forced = torch.zeros((N + n_text + 63) // 64, dtype=torch.bool)
        forced[N // 64 :] = True
    return Call(keep=0.4, grid=GRID, gate=gate, forced=forced, n_forced=2, **options)


def naive(method, tensors, q, k, v, call):
    """O of an SLA whose branch weighs, by definition, all keys of one kind."""
    mine = {name.rpartition(".")[2]: x for name, x in tensors.items()}
    keys = torch.ones(2, H, k.shape[2])
    blocks = torch.ones(1, H, (q.shape[2] + 63) // 64, (k.shape[2] + 63) // 64)
    if "key_weight" in mine:
        logits = (k * mine["key_weight"][:, None]).sum(-1) + mine["key_bias"][:, None]
        keys = keys * 2 / (1 + (-logits).exp())
    if "focus" in mine:
        logits = mine["focus"][:, None] * (q.mean(2, keepdim=True) * k).sum(-1) / D**0.5
        keys = keys * k.shape[2] * logits.softmax(-1)
    if "decay" in mine:
        far = distances(GRID, (q.shape[2], 0, 0), k.shape[2], (64, 64), call.index, q.device)
        falls = (mine["decay"][:, :, None, None] * far).sum(1)
        blocks = blocks * (falls.amin(-1, keepdim=True) - falls).exp()
    table = method.table(q, k, call)
    if method.linear == "rest":
        blocks = blocks * ~table.to_mask()
    rms = "rms" in str(method.branch)
    args = (q, k, v, method.feature_map, keys, blocks, (64, 64), rms)
    linear = reference.weighted_linear_attention(*args)
    out = ops.block_sparse_attention(q, k, v, table)
    if method.combine == "gate":
        alpha = mine["gate"].sigmoid()
        return alpha * out + (1 - alpha) * linear
    gate = 1 if call.gate is None else call.gate
    out = out + gate * (linear @ mine["weight"].mT) + mine["bias"]
    if "conv" in mine:
        x = v[:, :, :N].transpose(2, 3).reshape(2 * H, D, *GRID)
        x = F.conv3d(x, mine["conv"][:, None], padding=(1, 2, 2), groups=D)
        out = out + x.reshape(2, H, D, N).transpose(2, 3)
    return out


@pytest.mark.parametrize("branch", WEIGHING)
@pytest.mark.parametrize(
    "options",
    [{}, {"linear": "rest"}, {"combine": "gate"}, {"feature_map": "elu"}, {"feature_map": "relu"}],
    ids=str,
)
def test_each_branch_is_its_equation_forward_and_backward(branch, options):
    if "combine" in options and ("conv" in branch or "rala" in branch):
        options = {**options, "combine": "project"}
    q, k, v = qkv()
    method, tensors = method_of(branch, **options)
    call = call_of(method)
    out, expected = method(q, k, v, call), naive(method, tensors, q, k, v, call)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    leaves = [q, k, v, *tensors.values()]
    grad = torch.randn_like(out)
    found, wanted = (
        torch.autograd.grad(x, leaves, grad, retain_graph=True) for x in (out, expected)
    )
    for name, x, y in zip(["q", "k", "v", *tensors], found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("branch", ["decay", "gated", "rala", "conv"])
@pytest.mark.parametrize("linear", ["all", "rest", "marginal"])
def test_training_starts_at_plain_sla(branch, linear):
    q, k, v = qkv()
    method, tensors = method_of(branch, random=False, linear=linear, skip=0.3)
    plain = SLA(keep=0.4, block_q=64, linear=linear, skip=0.3)
    own = {name: x for name, x in tensors.items() if name.rpartition(".")[2] in plain.parts}
    expected = plain.with_weights(own)(q, k, v, Call(keep=0.4))
    torch.testing.assert_close(method(q, k, v, call_of(method)), expected)


@pytest.mark.parametrize("branch", ALL)
def test_without_weights_it_is_top_k_bit_for_bit(branch):
    q, k, v = qkv()
    method = SLA(keep=0.4, block_q=64, branch=branch)
    fresh = {f"layers.0.{name}": x for name, x in method.fresh(H, D, WIDTH).items()}
    for mine in (method, method.with_weights(fresh)):
        out = mine(q, k, v, Call(keep=0.4, grid=GRID))
        assert torch.equal(out, TopK(keep=0.4, block_q=64)(q, k, v, Call(keep=0.4)))


def test_a_steep_decay_leaves_the_own_block_and_the_text():
    q, k, v = qkv(n_k=N + 40)
    method, tensors = method_of("decay")
    tensors["layers.0.decay"] = torch.full((H, 3), 1e4)
    call = call_of(method, n_text=40)
    own = torch.cat([torch.eye(5), torch.ones(5, 1)], 1)[None, None]
    linear = reference.weighted_linear_attention(q, k, v, blocks=own)
    linear = linear @ tensors["layers.0.weight"].mT + tensors["layers.0.bias"]
    expected = ops.block_sparse_attention(q, k, v, method.table(q, k, call)) + linear
    out = method.with_weights(tensors)(q, k, v, call)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_distances_are_those_of_the_picture():
    """Blocks of 64 tokens are frames here: only frames are apart. In tiles of rows, rows."""
    far = distances(GRID, (N, 0, 0), N, (64, 64), None, torch.device("cpu"))
    apart = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
    assert torch.equal(far[0], apart) and not far[1:].any()
    columns = torch.arange(N).view(5, 8, 8).permute(1, 0, 2).flatten()  # rows of all frames
    far = distances(GRID, (N, 0, 0), N, (40, 40), columns, torch.device("cpu"))
    apart = (torch.arange(8.0)[:, None] - torch.arange(8.0)).abs()
    assert torch.equal(far[1], apart) and not far[[0, 2]].any()


def test_rms_is_the_plain_branch_over_its_root_mean_square():
    q, k, v = qkv()
    method, tensors = method_of("rms")
    weight, bias = tensors.values()
    call = Call(keep=0.4)
    plain = reference.linear_branch(torch.zeros_like(q), q, k, v, None, torch.eye(D))
    linear = plain / plain.square().mean(-1, keepdim=True).sqrt()
    expected = ops.block_sparse_attention(q, k, v, method.table(q, k, call))
    expected = expected + linear @ weight.mT + bias
    torch.testing.assert_close(method(q, k, v, call), expected, rtol=1e-4, atol=1e-4)
    same = torch.where(torch.arange(D) % 2 == 0, 1.0, -1.0).expand_as(v)  # rms 1 everywhere
    other = SLA(keep=0.4, block_q=64).with_weights(tensors)
    torch.testing.assert_close(
        method(q, k, same, call), other(q, k, same, call), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    "branch,features,fused",
    [
        *[("rms", "softmax", True), ("gated & rms", "elu", True), ("rala", "relu", True)],
        *[("gated", "softmax", False), ("rms & decay", "softmax", False)],
    ],
)
def test_the_kernels_run_where_they_can_be_told_of_the_weights(branch, features, fused):
    q, k, v = qkv()
    method, _ = method_of(branch, feature_map=features, linear="rest")
    with dispatch.recording() as used:
        method(q, k, v, call_of(method))
    assert any("linear_branch" in name for name in used) == fused


@pytest.mark.parametrize("branch", [*ALL, "gated & rms"])
def test_half_precision_stays_near(branch):
    q, k, v = (x.detach() for x in qkv())
    method, _ = method_of(branch)
    call = call_of(method)
    with torch.no_grad():
        out = method(*(x.bfloat16() for x in (q, k, v)), call)
        exact = method(*(x.bfloat16().float() for x in (q, k, v)), call)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("text", ["none", "before", "after"])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_kernel_that_is_one_at_its_middle_adds_the_values(ordered, text):
    n_text = 0 if text == "none" else 30
    q, k, v = qkv(n_k=N + n_text)
    method = SLA(keep=0.4, block_q=64, linear=None, branch="conv(3x3x5)")
    kernel = torch.zeros(D, 3, 3, 5)
    kernel[:, 1, 1, 2] = 1
    index = torch.randperm(N) if ordered else None
    call = Call(keep=0.4, grid=GRID, index=index, text_first=text == "before")
    out = method.with_weights({"layers.0.conv": kernel})(q, k, v, call)
    own = v[:, :, n_text:] if text == "before" else v[:, :, :N]
    torch.testing.assert_close(out, method(q, k, v, call) + own)
    kernel = torch.zeros(D, 3, 3, 5)
    kernel[:, 1, 1, 3] = 1  # the value to the right
    cells = torch.arange(N) if index is None else index
    raster = torch.empty_like(own).index_copy(2, cells, own).unflatten(2, GRID)
    right = F.pad(raster, (0, 0, 0, 1))[:, :, :, :, 1:].flatten(2, 4)[:, :, cells]
    out = method.with_weights({"layers.0.conv": kernel})(q, k, v, call)
    torch.testing.assert_close(out, method(q, k, v, call) + right)


@pytest.mark.parametrize(
    "branch", ["decay & gated", "rala", "conv", "decay & conv", "memory", "latents(2) & rms"]
)
def test_a_part_of_the_heads_and_of_the_queries_give_their_part(branch):
    q, k, v = qkv()
    method, _ = method_of(branch)
    call = call_of(method)
    whole = method(q, k, v, call)
    mine = [0, 2]
    part = Call(keep=0.4, grid=GRID, heads=(0, 2), gate=call.gate)
    part.gate = None if call.gate is None else call.gate[:, mine]
    out = method(q[:, mine], k[:, mine], v[:, mine], part)
    torch.testing.assert_close(out, whole[:, mine])
    assert method.serves_rows == (branch != "rala")
    if method.serves_rows:
        rows = Call(keep=0.4, grid=GRID, first=128, queries=N)
        out = method(q[:, :, 128:256], k, v, rows)
        torch.testing.assert_close(out, whole[:, :, 128:256], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", [*ALL, "decay & rms & conv(1x3x3)"])
def test_padding_is_never_read(branch):
    q, k, v = (x.detach() for x in qkv(n_k=400))
    k[:, :, 350:], v[:, :, 350:] = float("nan"), float("nan")
    method, _ = method_of(branch)
    with torch.no_grad():
        short = method(q, k[:, :, :350], v[:, :, :350], call_of(method))
        for length in (350, torch.tensor([350, 350])):
            out = method(q, k, v, call_of(method, kv_len=length))
            assert out.isfinite().all()
            torch.testing.assert_close(out, short, rtol=1e-4, atol=1e-5)


def test_a_configuration_and_a_file_name_their_branch(tmp_path):
    config = AccelConfig(SLA(keep=0.4, branch="decay & conv(1x3x3)"))
    assert AccelConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["method"]["branch"] == "decay & conv(1x3x3)"
    assert "branch" not in AccelConfig(SLA()).to_dict()["method"]
    method, tensors = method_of("gated")
    method.save(tmp_path / "gated.safetensors")
    again = SLA(keep=0.4, branch="gated", weights=str(tmp_path / "gated.safetensors"))
    assert again.tensors().keys() == tensors.keys()
    with pytest.raises(ValueError, match="was trained with branch='gated': give SLA the same"):
        SLA(weights=str(tmp_path / "gated.safetensors"))
    plain = {name: x for name, x in tensors.items() if "key" not in name}
    SLA().with_weights(plain).save(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="was trained with branch='plain'"):
        SLA(branch="decay", weights=str(tmp_path / "plain.safetensors"))


@pytest.mark.parametrize(
    "options,match",
    [
        ({"branch": "fade"}, "unknown branch 'fade': choose one of plain, decay"),
        ({"branch": "decay & decay"}, "has decay twice"),
        ({"branch": "conv(2x3x3)"}, "three odd sizes"),
        ({"branch": "conv(fast)"}, "size is a list"),
        ({"branch": "decay", "linear": None}, "linear=None has none"),
        ({"branch": "memory & decay"}, "memory is in place of the linear branch"),
        ({"branch": "memory & latents"}, "memory is in place of the linear branch"),
        ({"branch": "memory", "linear": "rest"}, "take linear='all', not 'rest'"),
        ({"branch": "memory(0)"}, "a number of steps ≥ 1"),
        ({"branch": "latents(0)"}, "a number of latents ≥ 1"),
        ({"branch": "conv", "sort": "time"}, "sort=time moves them"),
    ],
    ids=str,
)
def test_what_does_not_go_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SLA(**options)


def test_what_a_call_lacks_is_refused():
    with pytest.raises(ValueError, match="branch=conv looks where tokens lie"):
        AccelConfig(SLA(branch="conv"), prune=TokenPruning())
    q, k, v = qkv()
    method, _ = method_of("decay")
    with pytest.raises(ValueError, match="branch decay looks where tokens lie and needs the grid"):
        method(q, k, v, Call(keep=0.4))
    with pytest.raises(ValueError, match=r"decay of layer 0 is \[3, 3\], but this model's heads"):
        method(*(x[:, :2] for x in (q, k, v)), Call(keep=0.4, grid=GRID))


@pytest.mark.parametrize("make", [tiny_wan, tiny_flux])
def test_the_picture_is_found_in_every_order(make):
    """With all blocks kept an order changes nothing, a convolution of the picture included."""
    pipe = make()
    tensors = {f"layers.{i}.conv": torch.randn(64, 3, 3, 3) / 9 for i in (0, 1)}
    method = SLA(keep=0.999, linear=None, branch="conv(3x3x3)").with_weights(tensors)
    found = []
    for order in ("raster", "tile", "hilbert"):
        with on(pipe, method, order=order) as handle:
            found.append(run(pipe))
            assert handle.report().kept == 1 and not handle.report().fallbacks
    with on(pipe, TopK(keep=0.999)):
        assert not torch.allclose(found[0], run(pipe), atol=0.05)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", [tiny_wan, tiny_flux])
def test_rala_reads_what_the_attention_is_given(make):
    pipe = make()
    width = 128
    method = SLA(keep=0.4, branch="rala")
    heads = width // 64
    tensors = {
        f"layers.{i}.{name}": torch.randn_like(x) / 4
        for i in (0, 1)
        for name, x in method.fresh(heads, 64, width).items()
    }
    found = {}
    for name in ("whole", "no gate"):
        mine = {n: torch.zeros_like(x) if "out_weight" in n else x for n, x in tensors.items()}
        mine = tensors if name == "whole" else mine
        with on(pipe, method.with_weights(mine)) as handle:
            found[name] = run(pipe)
            assert not handle.report().fallbacks
    assert found["whole"].isfinite().all()
    assert not torch.equal(found["whole"], found["no gate"])
