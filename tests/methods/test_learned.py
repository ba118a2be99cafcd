"""The learned selector: untrained it is means, its scores and its loss, and that it learns."""

import pytest
import torch

from dit_accel import SLA, Pooled, TopK
from dit_accel.config import AccelConfig, resolve
from dit_accel.methods import Call, selectors
from dit_accel.methods.selectors.learned import Router
from dit_accel.methods.trained import lessons

N, D, H, M = 320, 16, 3, 5


def qkv(n=N, n_k=None):
    return [torch.randn(2, H, m, D) for m in (n, n_k or n, n_k or n)]


def tensors_of(method, random=True):
    """Those of layer 0, trained."""
    fresh = method.fresh(H, D, 0)
    found = {n: torch.randn_like(x) / 2 if random else x for n, x in fresh.items()}
    return {f"layers.0.{name}": x.clone().requires_grad_() for name, x in found.items()}


def trained(random=True, **options):
    method = SLA(keep=0.4, block_q=64, linear=None, select="learned(rank=4)", **options)
    tensors = tensors_of(method, random)
    return method.with_weights(tensors), tensors


def means_of(x, length=None):
    return torch.stack([block.mean(2) for block in x[:, :, :length].split(64, 2)], 2)


def naive_scores(q, k, v, tensors, length=None):
    a, b, c = (tensors[f"layers.0.route_{name}"] for name in "qkv")
    q, k, v = means_of(q), means_of(k, length), means_of(v, length)
    found = torch.einsum("bhnd,bhmd->bhnm", q, k)
    found = found + torch.einsum("bhnd,hdr,hsr,bhms->bhnm", q, a, b, k)
    return found + torch.einsum("hd,bhmd->bhm", c, v)[:, :, None]


def masses(q, k, length=None):
    shares = (q @ k[:, :, :length].mT / D**0.5).softmax(-1)
    columns = torch.stack([x.sum(-1) for x in shares.split(64, 3)], 3)
    return torch.stack([x.mean(2) for x in columns.split(64, 2)], 2)


def loss_of(method, q, k, v, call):
    with lessons() as found:
        method.chosen(q, k, call, v)
    (loss,) = found
    return loss


@pytest.mark.parametrize("length", [None, 300, torch.tensor([300, 200])], ids=str)
def test_untrained_it_is_means_table_for_table(length):
    q, k, v = qkv(n_k=400)
    forced = torch.zeros(7, dtype=torch.bool)
    forced[0] = True
    call = Call((0.2, 0.4, 0.9), forced=forced, n_forced=1, kv_len=length, text_first=True)
    wanted = TopK(0.4, 64).chosen(q, k, call, v)[0].to_mask()
    fresh = SLA(0.4, 64, select="learned").with_weights(
        {n: x.detach() for n, x in tensors_of(SLA(select="learned"), random=False).items()}
    )
    for method in (TopK(0.4, 64, select="learned"), fresh, trained(random=False)[0]):
        assert torch.equal(method.chosen(q, k, call, v)[0].to_mask(), wanted)
    assert not fresh.tensors()  # as a layer without


@pytest.mark.parametrize("length", [None, 290])
def test_scores_and_loss_are_their_equations(length):
    q, k, v = qkv(n_k=N if length is None else 400)
    method, tensors = trained()
    call = Call(0.4, kv_len=length, values=v, learned=method.of(Call(0.4), q.device))
    scores = naive_scores(q, k, v, tensors, length)
    found = method.select.scores(q, k, call, (64, 64))[..., :M]
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)
    mask = method.chosen(q, k, Call(0.4, kv_len=length), v)[0].to_mask()[..., :M]
    best = torch.zeros_like(mask).scatter(-1, scores.topk(2).indices, True)
    assert torch.equal(mask, best)
    exact = masses(q, k, length)
    wanted = (exact * (exact.log() - (scores / D**0.5).log_softmax(-1))).sum(-1).mean()
    loss = loss_of(method, q, k, v, Call(0.4, kv_len=length))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    leaves = list(tensors.values())
    for x, y in zip(*(torch.autograd.grad(z, leaves) for z in (loss, wanted)), strict=True):
        assert x.any()
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_nothing_is_learned_where_nobody_asks():
    q, k, v = (x.requires_grad_() for x in qkv())
    method, _ = trained()
    with lessons() as found, torch.no_grad():
        method.chosen(q, k, Call(0.4), v)
    assert not found
    out = method(q, k, v, Call(0.4))
    assert out.requires_grad and not found
    loss = loss_of(method, q, k, v, Call(0.4))
    assert all(x is None for x in torch.autograd.grad(loss, (q, k, v), allow_unused=True))


def test_it_learns_what_means_do_not_see():
    """Blocks of keys far apart from each other hold single keys that weigh much; their mean does
    not say so, but a channel that the queries do not read does."""
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, H, N, D, generator=draw) for _ in range(3))
    spread = torch.rand(1, H, M, 1, generator=draw).repeat_interleave(64, 2) * 4
    k = k * spread
    q[..., 14:], k[..., 14:] = torch.tensor([0.0, 1.0]), torch.cat([spread, 0 * spread], -1)
    method, tensors = trained(random=False)
    optimizer = torch.optim.Adam(tensors.values(), 0.05)
    exact, losses, held = masses(q, k), [], []
    for _ in range(50):
        mask = method.chosen(q, k, Call(0.2), v)[0].to_mask()
        held.append(float((exact * mask).sum(-1).mean()))
        losses.append(loss_of(method, q, k, v, Call(0.2)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0] and held[-1] > held[0]


def test_blocks_come_from_the_best_spans():
    """0.3 of seven blocks are three: three spans of two hold twice as many."""
    q, k, v = qkv(n=448)
    select = "learned(rank=4,span=2)"
    method = SLA(keep=0.4, block_q=64, linear=None, select=select)
    method = method.with_weights(tensors_of(method))
    call = Call(0.4, values=v, learned=method.of(Call(0.4), q.device))
    spans = Router(rank=4).scores(q, k, call, (64, 128)).topk(3).indices
    mask = method.chosen(q, k, Call(0.4), v)[0].to_mask()
    inside = torch.zeros(2, H, 7, 4, dtype=torch.bool).scatter(-1, spans, True)
    inside = inside.repeat_interleave(2, -1)[..., :7]
    assert (mask.sum(-1) == 3).all() and not (mask & ~inside).any()
    fine = Router(rank=4).scores(q, k, call, (64, 64)).masked_fill(~inside, -torch.inf)
    assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, fine.topk(3).indices, True))
    exact = masses(q, k)
    coarse = torch.nn.functional.pad(exact, (0, 1)).unflatten(-1, (4, 2)).sum(-1)
    fine, wide = (Router(rank=4).scores(q, k, call, (64, 64 * n)) for n in (1, 2))
    wanted = sum(
        (x * (x.log() - (s / D**0.5).log_softmax(-1))).sum(-1).mean()
        for x, s in ((exact, fine), (coarse, wide))
    )
    loss = loss_of(method, q, k, v, Call(0.4))
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-4)


def test_what_was_trained_serves_any_method(tmp_path):
    q, k, v = qkv()
    method, _ = trained()
    path = tmp_path / "sla.safetensors"
    method.save(path)
    other = Pooled(0.4, block_q=64, select=f"learned({path})")
    call = Call(0.4)
    wanted = method.chosen(q, k, call, v)[0].to_mask()
    assert torch.equal(other.chosen(q, k, call, v)[0].to_mask(), wanted)
    assert other(q, k, v, call).isfinite().all() and other.select.files == (path,)
    part = Call(0.4, heads=(2, 0))
    mask = other.chosen(q[:, [2, 0]], k[:, [2, 0]], part, v[:, [2, 0]])[0].to_mask()
    assert torch.equal(mask, wanted[:, [2, 0]])
    untrained = TopK(0.4, 64).chosen(q, k, call, v)[0].to_mask()
    elsewhere = other.chosen(q, k, Call(0.4, layer=1), v)[0].to_mask()
    assert torch.equal(elsewhere, untrained) and not torch.equal(wanted, untrained)
    (tmp_path / "moved").mkdir()
    AccelConfig(other).save(tmp_path / "moved" / "preset.json")
    moved = path.rename(tmp_path / "moved" / path.name)
    assert resolve(tmp_path / "moved" / "preset.json").method.select.file == str(moved)


def test_beside_a_window_it_learns_as_alone():
    q, k, v = qkv()
    method = SLA(keep=0.4, block_q=64, linear=None, select="learned(rank=4) & window(t=1)")
    tensors = tensors_of(method)
    call = Call(0.4, grid=(5, 8, 8))
    alone = trained()[0].with_weights(tensors)
    both = method.with_weights(tensors).chosen(q, k, call, v)[0].to_mask()
    assert torch.equal(both, alone.chosen(q, k, call, v)[0].to_mask() | torch.eye(5).bool())
    losses = [loss_of(x, q, k, v, call) for x in (method.with_weights(tensors), alone)]
    torch.testing.assert_close(*losses)


def test_what_does_not_fit_is_refused(tmp_path):
    for text in ("learned(rank=0)", "learned(span=0)"):
        with pytest.raises(ValueError, match="rank and span are ≥ 1"):
            selectors.find(text)
    SLA().with_weights({"layers.0.weight": torch.ones(4, 4)}).save(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="holds no learned selector"):
        selectors.find(f"learned({tmp_path}/no.safetensors)")
    with pytest.raises(ValueError, match="nowhere.safetensors"):
        selectors.find("learned(nowhere.safetensors)")
    assert selectors.opens_a_file("sub & learned (x)") and not selectors.opens_a_file("learned")
    method, tensors = trained()
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"route_q of layer 0 is \[3, 16, 4\]"):
        method.chosen(q[:, :2], k[:, :2], Call(0.4), v[:, :2])
    with pytest.raises(ValueError, match="SLA with .* takes"):
        SLA().with_weights(tensors)
