"""Where sparse attention errs, by layer, head and step, on a model's own activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.api import accelerated
from dit_accel.config import AccelConfig
from dit_accel.evaluate.probe import Probe
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.generation.run import ProgressFn, generate
from dit_accel.methods import Call, Method
from dit_accel.methods.budget import Profile
from dit_accel.methods.pooled import Pooled
from dit_accel.methods.selectors import find
from dit_accel.methods.selectors.both import Both
from dit_accel.methods.selectors.estimates import shares
from dit_accel.methods.selectors.learned import EXACT
from dit_accel.methods.sla import SLA
from dit_accel.methods.sorts import CLUSTERS, KINDS
from dit_accel.pipelines.denoisers import transformers_of
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


KEEPS = (0.03, 0.06, 0.12, 0.25, 0.5)
SELECTORS = ("means", "sub")
EVERY = 4  # steps between two looks
Looks = dict[tuple[str, int, float], list[list[float]]]  # (tried, layer, keep) → of looks, of heads


def check_tried(names: Sequence[str]) -> list[str]:
    """The selectors as their texts; ValueError for one that does not read what `keep` says, so that
    it cannot be held against others."""
    found = [find(name) for name in names]
    for selector in found:
        if isinstance(selector, Both) or not selector.counted:
            raise ValueError(
                f"{selector} reads more than keep says: a profile holds selectors against each "
                "other at the same keep"
            )
    return list(dict.fromkeys(map(str, found)))


def check_sorts(names: Sequence[str]) -> list[str]:
    """Orders that are the same at each call; ValueError for another."""
    fixed = [kind for kind in KINDS if kind != CLUSTERS]
    for name in names:
        if name not in fixed:
            raise ValueError(f"orders to try are some of {', '.join(fixed)}, not {name!r}")
    return list(dict.fromkeys(names))


class Look:
    """What a probe shows, tried at each keep with each selector, and in each order of the heads'
    tokens, in the first guidance pass."""

    def __init__(
        self,
        method: Method,
        keeps: Sequence[float],
        selectors: Sequence[str],
        sorts: Sequence[str] = (),
        linear: str | None = None,
        mass: bool = False,
    ) -> None:
        self.tried = {name: method.replaced(select=name) for name in selectors}
        self.sorted = {name: method.replaced(sort=name) for name in sorts}
        self.keeps = tuple(keeps)
        self.features = linear
        self.linear: dict[int, list[float]] = {}
        self.wants_mass = mass
        self.mass: Looks = {}
        self.layers: dict[tuple[int, int], list[float]] = {}
        self.fresh: dict[int, Tensor] = {}  # of this look, by layer
        self.heads: Looks = {}
        self.sorts: Looks = {}
        self.steps: dict[tuple[str, int, float], list[float]] = {}
        self.masks: dict[int, Tensor] = {}
        self.same: dict[int, list[float]] = {}
        self.first, self.last = "", -EVERY

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, call: Call) -> None:
        self.first = self.first or call.passname
        if call.passname != self.first or (call.step - self.last) % EVERY:
            return
        self.last = call.step
        norm = out.float().square().sum()
        for tried, looks in ((self.tried, self.heads), (self.sorted, self.sorts)):
            for (name, method), keep in product(tried.items(), self.keeps):
                mine = replace(
                    call, keep=keep, state={}, together={}, across={}, note=lambda table: None
                )
                lost = (method(q, k, v, mine).float() - out.float()).square().sum((0, 2, 3)) / norm
                looks.setdefault((name, call.layer, keep), []).append(lost.tolist())
                if tried is self.tried:
                    error = float(lost.sum().sqrt())
                    self.steps.setdefault((name, call.step, keep), []).append(error)
        if self.features is not None:
            lost_here = linear_error(q, k, v, out, self.features, call.kv_len)
            self.linear.setdefault(call.layer, []).append(lost_here)
        middle = replace(
            call, keep=self.keeps[len(self.keeps) // 2], state={}, together={}, across={}
        )
        mask = next(reversed(self.tried.values())).chosen(q, k, middle, v)[0].to_mask()
        if self.wants_mass:
            self._see_mass(q, k, v, call)
        if call.layer in self.fresh:
            self.fresh = {}
        for earlier, other in self.fresh.items():
            if other.shape == mask.shape:
                both = (other & mask).sum((0, 2, 3)) / mask.sum((0, 2, 3))
                self.layers.setdefault((call.layer, earlier), []).append(float(both.min()))
        self.fresh[call.layer] = mask
        known = self.masks.get(call.layer)
        if known is not None and known.shape == mask.shape:
            same = float((known & mask).sum() / mask.sum())
            self.same.setdefault(call.layer, []).append(same)
        self.masks[call.layer] = mask

    def _see_mass(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        """What share of the exact attention the blocks hold that each selector chooses."""
        exact: dict[tuple[int, int], Tensor] = {}
        for (name, method), keep in product(self.tried.items(), self.keeps):
            sizes = method.sizes(q, call)
            if sizes not in exact:
                exact[sizes] = shares(q, k, call, sizes, EXACT)
            mine = replace(call, keep=keep, state={}, together={}, across={})
            mask = method.chosen(q, k, mine, v)[0].to_mask()
            held = (exact[sizes] * mask).sum(-1).mean((0, 2))
            self.mass.setdefault((name, call.layer, keep), []).append(held.tolist())

    def profile(self, method: str) -> Profile:
        steps: dict[str, dict[str, dict[str, float]]] = {}
        for (name, step, keep), errors in sorted(self.steps.items()):
            steps.setdefault(name, {}).setdefault(str(step), {})[str(keep)] = fmean(errors)
        overlap = {str(layer): fmean(found) for layer, found in sorted(self.same.items())}
        linear = {str(layer): fmean(found) for layer, found in sorted(self.linear.items())}
        layers: dict[str, dict[str, float]] = {}
        for (layer, earlier), found in sorted(self.layers.items()):
            layers.setdefault(str(layer), {})[str(earlier)] = fmean(found)
        heads, sorts, mass = map(_by_head, (self.heads, self.sorts, self.mass))
        return Profile(method, heads, steps, overlap, sorts, linear, layers, mass)


def linear_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, feature_map: str, kv_len: int | Tensor | None
) -> float:
    """‖O − O_lin Wᵀ − b‖² / ‖O‖² at the W and b, of all heads together, that make it least."""
    found = ops.weighted_linear_attention(q, k, v, feature_map, kv_len=kv_len)
    x, y = (z.double().flatten(0, 2) for z in (found, out))
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    best = torch.linalg.pinv(x.mT @ x, hermitian=True) @ (x.mT @ y)
    return float((y - x @ best).square().sum() / y.square().sum())


def _by_head(looks: Looks) -> dict[str, dict[str, list[dict[str, float]]]]:
    """name → layer → head → keep → mean error."""
    heads: dict[str, dict[str, list[dict[str, float]]]] = {}
    for (name, layer, keep), found in sorted(looks.items()):
        means = [fmean(errors) for errors in zip(*found, strict=True)]
        row = heads.setdefault(name, {}).setdefault(str(layer), [{} for _ in means])
        for curve, error in zip(row, means, strict=True):
            curve[str(keep)] = error
    return heads


def measure(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    config: AccelConfig,
    keeps: Sequence[float] = KEEPS,
    selectors: Sequence[str] = SELECTORS,
    sorts: Sequence[str] = (),
    linear: bool = False,
    mass: bool = False,
    progress: ProgressFn = lambda phase, done, total: None,
) -> Profile:
    """One dense generation in which `config.method` also runs at each keep with each selector, and
    with its own in each order of the heads' tokens.

    Looks at every fourth step, in `config.order`. shared is tried without its state, as pooled:
    what is measured is its choice of blocks. linear: linear attention is tried, too, with SLA's
    feature map, at its best projection. mass: the share of the attention that chosen blocks hold is
    measured, too, by dense scores. Raises ValueError for a method that chooses none, and
    when no call could be looked at.
    """
    method = config.method
    if not method.chooses:
        raise ValueError(
            f"{method.name} chooses no blocks: profile shared, pooled, topk or another"
        )
    if method.stateful:
        method = Pooled(method.keep, method.block_q, method.block_k, select=method.select)
    method = method.replaced(sort="none")
    features = getattr(method, "feature_map", SLA.feature_map) if linear else None
    look = Look(method, keeps, check_tried(selectors), check_sorts(sorts), features, mass)
    watched = replace(
        config, method=Probe(see=look), schedule=Schedule(warmup=0), prune=None, min_tokens=0
    )
    with accelerated(pipe, watched):
        generate(pipe, defaults, request, progress)
    if not look.heads:
        raise ValueError(
            "no attention call could be measured: the model's attention must stay dense "
            "(see dit-accel doctor)"
        )
    return replace(look.profile(method.name), model=type(transformers_of(pipe)[0]).__name__)
