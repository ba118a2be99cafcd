"""What makes a token worth running: scores per token, float32, higher is sooner.

Each criterion maps `Facts` to [N] scores or None (not known yet: the step then runs all tokens).
Importance often does not beat chance, so three controls are here too: a criterion is worth its name
only when it beats "stratified" at equal time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Facts:
    """What one guidance pass knows of its tokens when a selection is due.

    tokens: [B, N, C], as they enter the span.
    probe: [B, N, C] what the probe blocks did to each token at this step.
    reference: [B, N, C], the same at the step each token ran last.
    seen: int64 [N], that step.
    step: this one.
    seed, block: of the TokenPruning.
    transition: [B, N] summed Token Transition Variation of the probe blocks, or None.
    output: pass name → [B, N, P] the model's output tokens at the previous step.
    text: [N] summed share of the probe blocks' attention that goes to the text, or None.
    """

    tokens: Tensor
    probe: Tensor
    reference: Tensor
    seen: Tensor
    step: int
    seed: int
    block: int
    transition: Tensor | None = None
    output: dict[str, Tensor] = field(default_factory=dict)
    text: Tensor | None = None


def drift(facts: Facts) -> Tensor:
    """‖r_t − r_τ‖ / ‖r_τ‖: a First-Block-Cache test for each token by itself."""
    now, then = facts.probe.float(), facts.reference.float()
    far = (now - then).norm(dim=-1) / then.norm(dim=-1).clamp(min=1e-12)
    return far.mean(0)


def ttv(facts: Facts) -> Tensor | None:
    """Token Transition Variation of TransPrune (arXiv 2507.20630), averaged over the batch."""
    return None if facts.transition is None else facts.transition.mean(0)


def ttv_drift(facts: Facts) -> Tensor | None:
    """The product of both."""
    score = ttv(facts)
    return None if score is None else score * drift(facts)


def velocity(facts: Facts) -> Tensor | None:
    """Spread of a token's predicted velocity at the previous step, as RAS (arXiv 2502.10389)."""
    spreads = [x.float().std(-1).mean(0) for x in facts.output.values()]
    return torch.stack(spreads).mean(0) if spreads else None


def guidance(facts: Facts) -> Tensor | None:
    """‖v_cond − v_uncond‖ at the previous step: where the prompt matters."""
    passes = list(facts.output.values())
    if len(passes) < 2:
        return None
    return (passes[0].float() - passes[1].float()).norm(dim=-1).mean(0)


def text(facts: Facts) -> Tensor | None:
    """Share of a token's attention that goes to the text, after ToCa (arXiv 2410.05317)."""
    return facts.text


def similarity(facts: Facts) -> Tensor:
    """1 − cos(token, mean of all tokens): what is unlike the rest cannot be taken from it."""
    x = facts.tokens.float()
    return (1 - F.cosine_similarity(x, x.mean(1, keepdim=True), dim=-1)).mean(0)


def chance(facts: Facts) -> Tensor:
    """Control: new at each step, the same in each pass."""
    generator = torch.Generator().manual_seed(facts.seed * 100_003 + facts.step)
    blocks = -(-facts.seen.numel() // facts.block)
    score = torch.rand(blocks, generator=generator).to(facts.seen.device)
    return score.repeat_interleave(facts.block)[: facts.seen.numel()]


def stratified(facts: Facts) -> Tensor:
    """Control: every so-manieth block, starting one block later at each step.

    The golden ratio's multiples are spread evenly, so any number of the highest ones is a
    regular pattern, and the shift by the step rotates it.
    """
    n = facts.seen.numel()
    block = torch.arange(n, device=facts.seen.device) // facts.block
    return ((block + facts.step) * 0.6180339887498949) % 1.0


def lru(facts: Facts) -> Tensor:
    """Control: the longest not run come first."""
    age = (facts.step - facts.seen).float()
    return age + stratified(facts) * 1e-3


CRITERIA: dict[str, Callable[[Facts], Tensor | None]] = {
    "drift": drift,
    "ttv": ttv,
    "ttv*drift": ttv_drift,
    "velocity": velocity,
    "cfg": guidance,
    "similarity": similarity,
    "random": chance,
    "stratified": stratified,
    "lru": lru,
}

# Criteria of models whose blocks hold text, too.
JOINT: dict[str, Callable[[Facts], Tensor | None]] = {"text": text}


def transition_variation(x: Tensor, y: Tensor) -> Tensor:
    """One module's TTV: w_i = (‖y_i‖/‖x_i‖) · softmax_i(1 − cos(x_i, y_i)).

    Args:
        x: [B, N, C] the module's (modulated) input. y: [B, N, C] its output.

    Returns [B, N] float32; computed per sample in float32, so that half precision neither
    overflows nor mixes the samples of a batch.
    """
    x, y = x.float(), y.float()
    turn = (1 - F.cosine_similarity(x, y, dim=-1)).softmax(dim=-1)
    return turn * y.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)


def text_share(q: Tensor, k: Tensor, visual: slice, mask: Tensor | None, block: int) -> Tensor:
    """Share of the visual queries' attention that goes to text keys, mean of samples and heads.

    Args:
        q: [B, N, H, D] visual queries. k: [B, n, H, D] all keys, the visual ones at `visual`.
        mask: bool [B, 1, 1, n] key padding, or None. block: visual keys are taken as the means of
            so many, each with its size as weight, so that no N × N matrix is needed.

    Returns [N] float32.
    """
    found = k[:, visual].float()
    sizes = torch.full((-(-found.shape[1] // block),), block, device=k.device)
    sizes[-1] = found.shape[1] - (len(sizes) - 1) * block
    padded = F.pad(found, (0, 0, 0, 0, 0, len(sizes) * block - found.shape[1]))
    means = padded.unflatten(1, (len(sizes), block)).sum(2) / sizes[:, None, None]
    words = torch.cat([k[:, : visual.start], k[:, visual.stop :]], dim=1).float()
    valid = None
    if mask is not None:
        valid = torch.cat([mask[..., : visual.start], mask[..., visual.stop :]], dim=-1)
    shares = []
    for rows in q.split(4096, dim=1):  # [B, H, rows, keys] each
        rows = rows.float().transpose(1, 2) / q.shape[-1] ** 0.5
        to_text = rows @ words.permute(0, 2, 3, 1)
        if valid is not None:
            to_text = to_text.masked_fill(~valid, -torch.inf)
        to_picture = rows @ means.permute(0, 2, 3, 1) + sizes.log()
        shares.append((to_text.logsumexp(-1) - to_picture.logsumexp(-1)).sigmoid().mean((0, 1)))
    return torch.cat(shares)


def pick(
    scores: Tensor,
    count: int,
    block: int,
    always: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """int64 tokens of the `count` blocks with the highest mean score, in ascending order.

    always: bool [N], tokens whose blocks are taken first. threshold: of the others only those with
    at least this mean; counting them waits for the device.
    """
    n = scores.numel()
    blocks = -(-n // block)
    padded = F.pad(scores.float(), (0, blocks * block - n))
    sizes = torch.full((blocks,), block, device=scores.device)
    sizes[-1] = n - (blocks - 1) * block
    means = padded.view(blocks, block).sum(1) / sizes
    if always is not None:
        held = F.pad(always, (0, blocks * block - n)).view(blocks, block).any(1)
        means = means.masked_fill(held, torch.inf)
        count = max(count, int(held.sum()))
    if threshold is not None:
        count = min(count, int((means >= threshold).sum()))
    best = means.topk(count).indices.sort().values
    tokens = (best[:, None] * block + torch.arange(block, device=scores.device)).flatten()
    return tokens[tokens < n]
