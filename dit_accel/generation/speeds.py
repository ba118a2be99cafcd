"""Profiles: one word for method, keep, selector, schedule and step cache together.

What each is, and what was measured of it, stands in speeds.json, which benchmarks/profiles.py
writes. Imports nothing heavy.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

NAMES = ("conservative", "balanced", "fast")


@lru_cache
def _data() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("speeds.json").read_text("utf-8"))


def options(name: str) -> dict[str, Any]:
    """The options of generation.options.How that a profile stands for; ValueError for an unknown
    one."""
    if name not in NAMES:
        raise ValueError(f"speed is one of {', '.join(NAMES)}, not {name!r}")
    return dict(_data()["profiles"][name]["options"])


def measured(name: str) -> dict[str, float]:
    """Its figures: PSNR to the dense clip in dB, shares of the work, speed-up; see speeds.json."""
    options(name)
    return dict(_data()["profiles"][name]["measured"])
