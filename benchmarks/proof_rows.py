"""Preset files for rows of `dit-accel evaluate` that its grammar has no word for.

    python benchmarks/proof_rows.py rows                          # files to give to --rows
    python benchmarks/proof_rows.py rows --profile profile.json   # also budgets of the heads
    python benchmarks/proof_rows.py rows --reuse none 4 8 --per-head profile.json

Every file is one choice more than the one before it, at as much kept work: query blocks of 64, the
order tile, more in the early steps, a budget for each head. With --reuse or --per-head the files
are others: `sub` at a keep, each with one of these reuses; with an order for each head, or with a
selector.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dit_accel import Schedule
from dit_accel.config import AccelConfig, resolve
from dit_accel.evaluate.profiled import falling
from dit_accel.methods import Method
from dit_accel.methods.budget import Profile

METHODS = ("shared", "topk", "pooled")
STEPS = 20  # of a run
FULL = (3, 5, 8, 13)  # full steps of `shared`, which by itself has 3, 8, 13 and 18


def curve(keep: float) -> Schedule:
    """More in the first sparse steps, less in the others, `keep` on average."""
    return falling(Schedule(), keep, STEPS)


def files(keep: float, profile: Path | None) -> dict[str, AccelConfig]:
    """Name → configuration."""
    found: dict[str, AccelConfig] = {}
    for name in METHODS:
        method: Method = replace(resolve(f"{name}/sub@{keep}").method, block_q=64)
        end = f"{keep:.0%}".rstrip("%")
        found[f"{name}-q64-{end}"] = AccelConfig(method)
        found[f"{name}-q64-tile-{end}"] = tiled = AccelConfig(method, order="tile")
        if name == "shared":
            method = replace(method, period=1.0)
            tiled = AccelConfig(method, Schedule(refresh=FULL[1:]), order="tile")
        else:
            tiled = replace(tiled, schedule=curve(keep))
        found[f"{name}-q64-tile-steps-{end}"] = tiled
        if profile is not None:
            budget = Profile.load(profile).schedule(tiled.schedule, keep, "sub")
            found[f"{name}-q64-tile-steps-heads-{end}"] = replace(tiled, schedule=budget)
    return found


def reused(keep: float, reuses: Sequence[str]) -> dict[str, AccelConfig]:
    """Name → configuration: tables that serve again, at as much kept work."""
    return {
        f"{name}-reuse-{text.replace('+', '-')}-{keep:.0%}".rstrip("%"): AccelConfig(
            replace(resolve(f"{name}/sub@{keep}").method, reuse=text)
        )
        for name in METHODS
        for text in reuses
    }


def per_head(keep: float, profile: Path) -> dict[str, AccelConfig]:
    """Name → configuration: `sub` in the order time, as a control, and in each head's own order,
    more in the early steps, too; each head's own selector. Of these what the profile tried."""
    known, own = Profile.load(profile), f"per-head({profile})"
    found: dict[str, AccelConfig] = {}
    for name in METHODS:
        method, end = resolve(f"{name}/sub@{keep}").method, f"{keep:.0%}".rstrip("%")
        if known.sorts:
            ordered = AccelConfig(replace(method, sort=own))
            found[f"{name}-order-time-{end}"] = AccelConfig(method, order="time")
            found[f"{name}-sort-heads-{end}"] = ordered
            if name != "shared":  # which has its full steps early as it is
                early = replace(ordered, schedule=curve(keep))
                found[f"{name}-sort-heads-steps-{end}"] = early
        if len(known.heads) > 1:
            found[f"{name}-select-heads-{end}"] = AccelConfig(replace(method, select=own))
    return found


def late() -> dict[str, AccelConfig]:
    """Dense for a while, then nearly nothing."""
    names = (("topk/sub", 0.5), ("pooled/sub", 0.5), ("shared/sub", 0.3), ("shared/sub", 0.5))
    return {
        f"{name.replace('/', '-')}-5-after-{share:.0%}".rstrip("%"): AccelConfig(
            resolve(f"{name}@0.05").method, Schedule(warmup=share)
        )
        for name, share in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", type=Path, help="of `dit-accel profile --try sub`")
    parser.add_argument("--keep", type=float, nargs="*", default=(0.1, 0.2))
    parser.add_argument("--reuse", nargs="*", default=(), help="none, 4, 8+drift0.9 …")
    parser.add_argument(
        "--per-head", type=Path, help="of `dit-accel profile --try sub --try slash --sorts none,…`"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    others = bool(args.reuse or args.per_head)
    found = {} if others else late()
    for keep in args.keep:
        found |= reused(keep, args.reuse)
        found |= per_head(keep, args.per_head) if args.per_head else {}
        found |= {} if others else files(keep, args.profile)
    for name, config in found.items():
        config.save(args.out / f"{name}.json")
    print(",".join(f"{args.out}/{name}.json" for name in found))


if __name__ == "__main__":
    main()
