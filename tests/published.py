"""The published engines, naively: dense masks, no kernels, the loop of their scripts."""

import math
from contextlib import contextmanager

import torch
from diffusers.models.transformers import transformer_wan

RCM = [math.tan(t) / (1 + math.tan(t)) for t in (math.atan(80), 1.5, 1.4, 1.0)]


def error(out, expected):
    """Relative, over the whole clip."""
    return float((out - expected).norm() / expected.norm())


@contextmanager
def attending(pipe, attention, module=transformer_wan):
    """Every self-attention is `attention(layer, q, k, v, hidden)`; tensors [B, H, N, D].

    module: diffusers' own of the model.
    """
    stock, here = module.dispatch_attention_fn, {}
    hooks = []

    def dispatch(query, key, value, *rest, **more):
        if here.get("layer") is None:
            return stock(query, key, value, *rest, **more)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return attention(here["layer"], *heads_first, here["hidden"]).transpose(1, 2)

    def enter(layer):
        return lambda attn, args: here.update(layer=layer, hidden=args[0])

    transformers = (pipe.transformer, getattr(pipe, "transformer_2", None))
    for part, transformer in enumerate(t for t in transformers if t is not None):
        wan = hasattr(transformer, "blocks")
        for i, block in enumerate(transformer.blocks if wan else transformer.transformer_blocks):
            attn = block.attn1 if wan else block.attn
            hooks.append(attn.register_forward_pre_hook(enter((part, i))))
            hooks.append(attn.register_forward_hook(lambda *_: here.update(layer=None)))
    module.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        module.dispatch_attention_fn = stock
        for hook in hooks:
            hook.remove()


def sla(learned, ratio, block_q=128, block_k=64):
    """TurboDiffusion's SLA: top int(ratio · blocks) by mean scores, linear attention over all."""

    def attention(layer, q, k, v, hidden):
        n, d = q.shape[2:]
        q_mean = torch.stack([x.mean(2) for x in q.split(block_q, 2)], 2)
        k_mean = torch.stack([x.mean(2) for x in k.split(block_k, 2)], 2)
        scores = q_mean @ (k_mean - k.mean(2, keepdim=True)).mT
        best = scores.topk(max(1, int(ratio * k_mean.shape[2])), -1).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        mask = kept.repeat_interleave(block_q, 2)[:, :, :n].repeat_interleave(block_k, 3)[..., :n]
        exact = (q @ k.mT / d**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        c_q, c_k = q.softmax(-1), k.softmax(-1)
        linear = (
            c_q @ (c_k.mT @ v) / (1e-5 + (c_q * c_k.sum(2, keepdim=True)).sum(-1, keepdim=True))
        )
        part, i = layer
        own = learned[part] if isinstance(learned, (list, tuple)) else learned
        weight, bias = (own[f"blocks.{i}.self_attn.attn_op.local_attn.proj_l.{x}"]
                        for x in ("weight", "bias"))  # fmt: skip
        return exact + linear @ weight.mT + bias

    return attention


@torch.no_grad()
def clip(pipe, levels, renoise=True, seed=0, shape=(1, 16, 3, 16, 16), boundary=None):
    """x ← (1 − σ')(x − σv) + σ'ε from noise · σ₀ down to 0, or Euler steps."""
    generator = torch.Generator().manual_seed(seed)
    prompt = pipe.encode_prompt(
        "a rocket", do_classifier_free_guidance=False, max_sequence_length=16
    )[0]
    levels = [*levels, 0.0]
    x = torch.randn(shape, generator=generator) * levels[0]
    for now, then in zip(levels, levels[1:], strict=False):
        model = pipe.transformer
        if boundary is not None and now < boundary:
            model = pipe.transformer_2
        v = model(x, torch.tensor([1000 * now]), prompt, return_dict=False)[0]
        if not renoise:
            x = x - (now - then) * v
            continue
        x = x - now * v
        x = (1 - then) * x + then * torch.randn(shape, generator=generator) if then else x
    return x


def packed_top_k(ratio, n_text, block_q=128, block_k=64):
    """H3's row of text, sound and clip: the clip's queries read all text and the best blocks."""

    def attention(layer, q, k, v, hidden):
        n, d = q.shape[2:]
        clip = q[:, :, n_text:]
        q_mean = torch.stack([x.mean(2) for x in clip.split(block_q, 2)], 2)
        k_mean = torch.stack([x.mean(2) for x in k.split(block_k, 2)], 2)
        scores, forced = q_mean @ k_mean.mT, -(-n_text // block_k)
        scores[..., :forced] = -torch.inf
        best = scores.topk(max(1, int(ratio * k_mean.shape[2])), -1).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        kept[..., :forced] = True
        mask = kept.repeat_interleave(block_q, 2)[:, :, : n - n_text]
        mask = mask.repeat_interleave(block_k, 3)[..., :n]
        mask = torch.cat([mask.new_ones(*mask.shape[:2], n_text, n), mask], 2)
        return (q @ k.mT / d**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    return attention


def tiles_of(grid, tile):
    """Raster numbers of the tokens of each tile, tile after tile."""
    cells = torch.arange(math.prod(grid)).view(grid)
    steps = [range(0, n, size) for n, size in zip(grid, tile, strict=True)]
    return [
        cells[t : t + tile[0], h : h + tile[1], w : w + tile[2]].flatten()
        for t in steps[0] for h in steps[1] for w in steps[2]
    ]  # fmt: skip


def vsa(grid, tile, sparsity, gate, sections=()):
    """FastVideo's VSA, text and sound in front: dense masks over tokens, means of true counts.

    gate: (layer, hidden) → [B, N, H·D], or None where the layer has none.
    """

    def attention(layer, q, k, v, hidden):
        n_text = sum(sections)
        text = [torch.arange(n) for n in sections]
        starts = [sum(sections[:i]) for i in range(len(sections))]
        pieces = [
            p + s for t, s in zip(text, starts, strict=True) for p in t.split(math.prod(tile))
        ]
        groups = [*pieces, *(n_text + t for t in tiles_of(grid, tile))]
        n, d = q.shape[2:]
        owner = torch.empty(n, dtype=torch.long)
        for i, group in enumerate(groups):
            owner[group] = i
        q_mean, k_mean, v_mean = (
            torch.stack([x[:, :, group].mean(2) for group in groups], 2) for x in (q, k, v)
        )
        scores = q_mean @ k_mean.mT / d**0.5
        clip = len(groups) - len(pieces)
        count = max(1, math.ceil((1 - sparsity) * clip - 1e-9))
        best = scores[..., len(pieces) :].topk(count, -1).indices + len(pieces)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        kept[..., : len(pieces)] = True
        kept[:, :, : len(pieces)] = True
        mask = kept[:, :, owner][..., owner]
        out = (q @ k.mT / d**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        own = gate(layer, hidden) if gate is not None else None
        if own is None:
            return out
        own = own.unflatten(-1, (q.shape[1], d)).transpose(1, 2)
        return out + own * (scores.softmax(-1) @ v_mean)[:, :, owner]

    return attention


def ssta(grid, tile, most, window, likeness):
    """HunyuanVideo 1.5's SSTA: the clip in raster order filled with zeros to whole tiles, a dense
    mask over its tokens; text behind it. Text queries read every key that there is, no zeros."""
    filled = [math.ceil(n / size) * size for n, size in zip(grid, tile, strict=True)]
    counts = [n // size for n, size in zip(filled, tile, strict=True)]
    cells = torch.cartesian_prod(*map(torch.arange, filled))
    at = cells // torch.tensor(tile)
    owner = (at[:, 0] * counts[1] + at[:, 1]) * counts[2] + at[:, 2]
    here = (cells < torch.tensor(grid)).all(1)
    places = torch.cartesian_prod(*map(torch.arange, counts))
    if grid[0] == 1:
        window = (1, 1, 1)
    elif grid[0] <= 31:
        most = most // 2
    half, last = torch.tensor(window) // 2, torch.tensor(counts) - 1
    middle = torch.minimum(torch.maximum(places, half), last - half)
    near = ((middle[:, None] - places[None]).abs() <= half).all(-1)

    def attention(layer, q, k, v, hidden, valid=None):
        n, d = math.prod(grid), q.shape[3]
        clip = [q.new_zeros(*q.shape[:2], len(owner), d) for _ in range(3)]
        for whole, x in zip(clip, (q, k, v), strict=True):
            whole[:, :, here] = x[:, :, :n]
        tiles = range(math.prod(counts))
        q_mean, k_mean = (
            torch.stack([x[:, :, owner == i].mean(2) for i in tiles], 2) for x in clip[:2]
        )
        q_mean, k_mean = (x / x.norm(dim=-1, keepdim=True) for x in (q_mean, k_mean))
        alike = k_mean @ k_mean.mT * (1 - torch.eye(len(tiles)))
        worth = likeness * q_mean @ k_mean.mT
        worth = worth - (1 - likeness) * alike.sum(-2, keepdim=True) / (len(tiles) - 1)
        best = worth.topk(min(most, len(tiles)), -1).indices
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True) | near
        mask = kept[:, :, owner[here]][..., owner]
        keys, values = (
            torch.cat([x, y[:, :, n:]], 2) for x, y in zip(clip[1:], (k, v), strict=True)
        )
        text = k.shape[2] - n
        mask = torch.cat([mask, mask.new_ones(*mask.shape[:3], text)], -1)
        seen = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool) if valid is None else valid
        mask = (
            mask & torch.cat([seen.new_ones(len(seen), len(owner)), seen[:, n:]], 1)[:, None, None]
        )
        scores = (q[:, :, :n] @ keys.mT / d**0.5).masked_fill(~mask, -torch.inf)
        out = [scores.softmax(-1) @ values]
        if q.shape[2] > n:
            scores = (q[:, :, n:] @ k.mT / d**0.5).masked_fill(~seen[:, None, None], -torch.inf)
            out.append(scores.softmax(-1) @ v)
        return torch.cat(out, 2)

    return attention
