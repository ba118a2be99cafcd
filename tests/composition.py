"""What goes with what, observed by running tiny pipelines; writes docs/reference/composition.md.

python tests/composition.py
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from runs import run
from tiny import tiny_flux, tiny_wan

import dit_accel
from dit_accel import Schedule, TokenPruning
from dit_accel.config import resolve

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "composition.md"
START, END = "<!-- written by tests/composition.py -->", "<!-- end -->"
NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}
STEPS = 5
METHODS = tuple(name for name in dit_accel.methods() if name != "dense")
COLUMNS = (*METHODS, "pruning", "pruning + topk")
PIPES = {"Wan": lambda: tiny_wan(layers=3), "Flux": lambda: tiny_flux(double=2, single=2)}


held: list[Any] = []  # blocks that are entered, for as long as this runs


class Feature(NamedTuple):
    """Something of diffusers, peft or cache-dit that a user switches on.

    same: it does not change what is computed."""

    name: str
    switch_on: Callable[[Any], Any]
    same: bool = True


def first_block_cache(pipe):
    threshold = 0.15 if hasattr(pipe.transformer, "blocks") else 0.55  # skips some steps, not all
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def step_cached(pipe):
    threshold = 0.15 if hasattr(pipe.transformer, "blocks") else 0.55
    held.append(dit_accel.step_cached(pipe, threshold))
    held[-1].__enter__()


def mag_cache(pipe):
    config = MagCacheConfig(
        threshold=0.3, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )
    pipe.transformer.enable_cache(config)


def taylor_seer(pipe):
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1", r"\w+_blocks\.\d+\.attn"],
    )
    pipe.transformer.enable_cache(config)


def pyramid(pipe):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(1, 999),
        current_timestep_callback=lambda: pipe.current_timestep,
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
    )
    pipe.transformer.enable_cache(config)


def faster_cache(pipe):
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 999),
        current_timestep_callback=lambda: pipe.current_timestep,
        spatial_attention_block_identifiers=(r"^blocks.*attn1", r"^transformer_blocks.*attn"),
        attention_weight_callback=lambda module: 0.5,
        is_guidance_distilled=True,
    )
    pipe.transformer.enable_cache(config)


def cache_dit(pipe):
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=10.0, max_warmup_steps=2
    )
    cache_dit.enable_cache(pipe, cache_config=config)


def compiled(pipe):
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def model_offload(pipe):
    """What enable_model_cpu_offload attaches; it refuses to run without an accelerator."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))


def sequential_offload(pipe):
    """What enable_sequential_cpu_offload attaches: weights are on "meta" between their uses."""
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, torch.device("cpu"))


def group_offload(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def lora(pipe):
    pipe.load_lora_weights(_lora_weights(type(pipe)), adapter_name="style")
    pipe.set_adapters(["style"], [0.7])


@cache
def _lora_weights(kind: type[DiffusionPipeline]) -> dict[str, torch.Tensor]:
    generator, found = torch.Generator().manual_seed(0), {}
    pipe = next(build() for build in PIPES.values() if isinstance(build(), kind))
    for name, module in pipe.transformer.named_modules():
        if name.endswith((".to_q", ".to_v", "ffn.net.2", "ff.net.2")):
            for part, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                weight = torch.randn(shape, generator=generator) * 0.05
                found[f"transformer.{name}.lora_{part}.weight"] = weight
    return found


def fused_qkv(pipe):
    pipe.transformer.fuse_qkv_projections()


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def backend(pipe):
    pipe.transformer.set_attention_backend("_native_math")


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("step_cached", step_cached, same=False),
        Feature("FirstBlockCache", first_block_cache, same=False),
        Feature("MagCache", mag_cache, same=False),
        Feature("TaylorSeer", taylor_seer, same=False),
        Feature("PyramidAttentionBroadcast", pyramid, same=False),
        Feature("FasterCache", faster_cache, same=False),
        Feature("cache-dit", cache_dit, same=False),
        Feature("compile_repeated_blocks(fullgraph=True)", compiled),
        Feature("model offload", model_offload),
        Feature("group offload", group_offload),
        Feature("sequential offload", sequential_offload),
        Feature("LoRA", lora, same=False),
        Feature("fuse_qkv_projections", fused_qkv),
        Feature("layerwise casting (float8)", layerwise_casting, same=False),
        Feature("set_attention_backend", backend),
    )
}


def options(column: str, all_kept: bool) -> dict[str, Any]:
    """`accelerate`'s arguments: everything kept, or little of it."""
    if column.startswith("pruning"):
        keep = 1.0 if all_kept else 0.5
        prune = TokenPruning(keep=keep, start=1, end=0, refresh=3, criterion="drift")
        method = resolve("topk" if "topk" in column else "dense").method
    else:
        prune, method = None, resolve(column).method
    if method.name != "dense":
        # in so short a run a period by share makes every second step a full one
        rare = {"period": STEPS} if method.stateful else {}
        # tiles that need no filling, which counts in a softmax
        whole = {"tile": (1, 8, 8), "window": (1, 1, 1)} if method.name == "ssta" else {}
        method = type(method)(keep=0.999 if all_kept else 0.5, **rare, **whole)
    return {"method": method, "prune": prune, **NOW}


def go(pipe: Any) -> torch.Tensor:
    return run(pipe, steps=STEPS, size=128 if hasattr(pipe.transformer, "blocks") else 64)


@contextlib.contextmanager
def quiet():
    """cache-dit and diffusers say much; and set_attention_backend sets one for the process, too."""
    logging.disable(logging.WARNING)
    active = _AttentionBackendRegistry._active_backend
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch._dynamo.reset()
        _AttentionBackendRegistry._active_backend = active


@cache
def plain(model: str, name: str) -> torch.Tensor:
    """The feature without dit_accel."""
    pipe = PIPES[model]()
    FEATURES[name].switch_on(pipe)
    return go(pipe)


@cache
def stock(model: str) -> torch.Tensor:
    """Neither."""
    return go(PIPES[model]())


@cache
def alone(model: str, column: str) -> torch.Tensor:
    """dit_accel without the feature."""
    pipe = PIPES[model]()
    dit_accel.accelerate(pipe, **options(column, all_kept=False))
    return go(pipe)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-3 * b.norm())


def observe(model: str, name: str, column: str) -> str:
    """ "yes", or the reason of a refusal. AssertionError where the two do not go together.

    With all kept the output is that of the feature alone, in both orders of switching on, and after
    `restore`; with little kept it is finite and the same in both orders and in the next generation;
    where the feature does not change what is computed, it is dit_accel's alone.
    """
    with quiet():
        return _observe(model, FEATURES[name], column)


def _observe(model: str, feature: Feature, column: str) -> str:
    reference = plain(model, feature.name)
    changed = not (near if feature.same else torch.equal)(reference, stock(model))
    assert changed != feature.same, "the feature does not do what it says"
    outputs = []
    for feature_first in (True, False):
        pipe = PIPES[model]()
        if feature_first:
            feature.switch_on(pipe)
        handle = dit_accel.accelerate(pipe, **options(column, all_kept=True))
        if not feature_first:
            feature.switch_on(pipe)
        try:
            assert near(go(pipe), reference), "all kept, yet another output"
        except RuntimeError as error:
            _, _, why = str(error).partition("cannot run token pruning: ")
            assert why, error
            handle.restore()
            outputs.append(f"no: {why}")
            continue
        handle = dit_accel.accelerate(pipe, **options(column, all_kept=False))
        out = go(pipe)
        assert out.isfinite().all() and not torch.equal(out, reference), "nothing was left out"
        assert torch.equal(go(pipe), out), "the next generation differs"
        assert not handle.report().unplanned, handle.report().unplanned
        if feature.same:
            assert near(out, alone(model, column)), "another output than without the feature"
        handle.restore()
        assert near(go(pipe), reference), "not restored"
        outputs.append(out)
    first, then = outputs
    if isinstance(first, str):
        assert first == then
        return first
    assert near(first, then), "the order of switching on matters"
    return "yes"


def render() -> str:
    """The generated part of docs/reference/composition.md."""
    lines, reasons = [START], []
    for model in PIPES:
        lines += [
            "",
            f"**{model}**",
            "",
            _line(("", *COLUMNS)),
            _line(["---"] * (len(COLUMNS) + 1)),
        ]
        for name in FEATURES:
            cells = [observe(model, name, column) for column in COLUMNS]
            for cell in cells:
                if cell.startswith("no: ") and cell not in reasons:
                    reasons.append(cell)
            lines.append(_line((name, *(_cell(cell, reasons) for cell in cells))))
    lines += ["", *(f"{i}. {why[4:]}" for i, why in enumerate(reasons, 1)), "", END]
    return "\n".join(lines)


def _cell(found: str, reasons: list[str]) -> str:
    return found if found == "yes" else f"no ({reasons.index(found) + 1})"


def documented() -> dict[tuple[str, str, str], str]:
    """(model, feature, column) → what the page says: "yes" or "no: reason"."""
    text = PAGE.read_text().split(START)[1].split(END)[0]
    reasons = dict(line.split(". ", 1) for line in text.splitlines() if line[:1].isdigit())
    found, model = {}, ""
    for line in text.splitlines():
        if line.startswith("**"):
            model = line.strip("*")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] in FEATURES:
            for column, cell in zip(COLUMNS, cells[1:], strict=True):
                number = cell.removeprefix("no (").removesuffix(")")
                found[model, cells[0], column] = cell if cell == "yes" else f"no: {reasons[number]}"
    return found


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    found, text = render(), PAGE.read_text()
    PAGE.write_text(text.split(START)[0] + found + text.split(END)[-1])


if __name__ == "__main__":
    sys.exit(main())
