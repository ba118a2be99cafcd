"""How much longer the fullest of several processes has than the mean, before and after levelling.

    python benchmarks/level.py benchmarks/results/h200-profile-scenes.json

Under Ulysses each process has some heads of each layer, with the budgets of a profile's keeps: a
layer lasts as long as the largest sum of them. Printed are these, summed over the layers, over
their mean; by arithmetic, nothing runs. --heads N draws the keeps of as many layers of N heads from
the profile's own, seed 0: a wider model than the one that was profiled.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from dit_accel.methods.budget import Profile
from dit_accel.parallel.level import Held, dealt, in_turn, loads
from dit_accel.schedule import Schedule

Budgets = Sequence[tuple[float, ...]]


def excess(budgets: Budgets, ranks: int, deal: Callable[[tuple[float, ...]], Held]) -> float:
    """Σ over layers of the largest sum of a process, over that of the mean one."""
    sums = [loads(budget, deal(budget)) for budget in budgets]
    return ranks * sum(map(max, sums)) / sum(map(sum, sums))


def wider(budgets: Budgets, heads: int) -> Budgets:
    """As many layers, of so many heads drawn from all of these."""
    draw, every = random.Random(0), [keep for row in budgets for keep in row]
    return [tuple(draw.choices(every, k=heads)) for _ in budgets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--select", default="sub")
    parser.add_argument("--keep", type=float, nargs="*", default=(0.05, 0.1, 0.2))
    parser.add_argument("--heads", type=int, nargs="*", default=(12, 24, 40))
    parser.add_argument("--ranks", type=int, nargs="*", default=(2, 4, 8))
    args = parser.parse_args()
    profile = Profile.load(args.profile)
    print("| heads | keep | ranks | in turn | level |\n|---:|---:|---:|---:|---:|")
    for keep in args.keep:
        found = profile.schedule(Schedule(), keep, args.select).head_keep
        own = [keeps for _, keeps in found]
        drawn = {f"{n}, drawn": wider(own, n) for n in args.heads}
        for name, budgets in {str(len(own[0])): own, **drawn}.items():
            for ranks in args.ranks:
                heads = len(budgets[0])
                if -heads % ranks >= -(-heads // ranks):  # which diffusers refuses to fill up
                    continue
                before = excess(budgets, ranks, lambda row, n=ranks: in_turn(len(row), n))
                after = excess(budgets, ranks, lambda row, n=ranks: dealt(row, n))
                print(f"| {name} | {keep:.0%} | {ranks} | {before:.2f} | {after:.2f} |")


if __name__ == "__main__":
    main()
