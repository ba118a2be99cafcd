"""Step caches, diffusers' and cache-dit's, beside token pruning: which compose, and why not.

A cache that decides at the first block whether the whole step is skipped composes: pruning works
in the steps that it lets run. Caches of what single modules return hold all tokens and do not.
"""

from __future__ import annotations

from torch import nn

_MODULES = "it keeps what single modules returned for all tokens, which pruned ones do not match"
# Config class → the hook of the first block that decides, and its reason where it does not compose.
LEADERS = {
    "FirstBlockCacheConfig": "fbc_leader_block_hook",
    "MagCacheConfig": "mag_cache_leader_block_hook",
}
REASONS = {
    "TaylorSeerCacheConfig": _MODULES,
    "PyramidAttentionBroadcastConfig": _MODULES,
    "FasterCacheConfig": _MODULES,
    "SeaCacheConfig": "it carries its own residuals around the blocks, through adapters of its own",
    "TextKVCacheConfig": "it serves a model whose blocks hold no span",
}


def obstacle(transformer: nn.Module, first: int, last: int, blocks: int) -> str:
    """Why the cache enabled on `transformer` does not go with a span of first ≤ block < last."""
    if getattr(transformer, "_is_cached", False):
        return "cache-dit is enabled: it runs the blocks in its own loops; disable one of the two"
    if not getattr(transformer, "is_cache_enabled", False):
        return ""
    name = type(transformer._cache_config).__name__
    if name not in LEADERS:
        why = REASONS.get(name, "it is not known to compose")
        return f"the step cache of {name} is enabled: {why}; disable one of the two"
    return outside(name, first, last, blocks)


def outside(name: str, first: int, last: int, blocks: int) -> str:
    """Why a span of first ≤ block < last does not lie between the blocks that a cache reads, or
    ""."""
    if first > 0 and last < blocks:
        return ""
    return (
        f"{name} reads all tokens at the first and at the last block, so the span must lie "
        f"between them, not from {first} to {last} of {blocks}"
    )


def skips(block: nn.Module) -> bool:
    """Did the cache, if there is one, decide at `block` (which just ran) to skip the others?"""
    hooks = getattr(getattr(block, "_diffusers_hook", None), "hooks", {})
    leaders = [hooks[name] for name in LEADERS.values() if name in hooks]
    return any(not hook.state_manager.get_state().should_compute for hook in leaders)
