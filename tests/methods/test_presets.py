"""Presets are the cheapest configurations that came near enough to dense on the tuning prompts."""

import json
from pathlib import Path

import pytest

from dit_accel.methods import find

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
LEAST = {"safe": 40, "balanced": 35, "fast": 29}  # dB, rounded


def measured(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return {row["row"]: row for row in rows}


def check(name, preset, found):
    """found: the measured row of each configuration, by (keep, period)."""
    options = find(name).presets[preset]
    row = found[options["keep"], options.get("period")]
    assert round(row["psnr"]) >= LEAST[preset], row
    cheaper = [other for other in found.values() if other["work_kept"] < row["work_kept"] - 1e-3]
    assert all(round(other["psnr"]) < LEAST[preset] for other in cheaper), cheaper


@pytest.mark.parametrize("preset", LEAST)
@pytest.mark.parametrize("name", ["topk", "sla", "pooled", "rectified"])
def test_of_methods_without_a_state(name, preset):
    family = {"sla": "topk", "rectified": "rectified-gapr"}.get(name, name)
    rows = measured("h100-tuning")
    keeps = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
    check(name, preset, {(keep, None): rows[f"{family} {keep:.0%}"] for keep in keeps})


@pytest.mark.parametrize("preset", LEAST)
@pytest.mark.parametrize("name", ["shared", "rettention"])
def test_of_methods_with_a_state(name, preset):
    rows = measured("h100-tuning-state")
    pairs = [(keep, period) for keep in (0.05, 0.1, 0.2, 0.3) for period in (0.15, 0.25, 0.4, 0.8)]
    check(name, preset, {pair: rows[f"{name}-{pair[0]}-{pair[1]}.json"] for pair in pairs})
