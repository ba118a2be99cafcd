"""Which scenes are drawn for training, and which never are: one explicit rule.

Eighty of the archive's emoji (scene_emoji.txt), chosen to look unlike one another. Never trained
on: an emoji before its held-out colour (`emoji_set.held_out`), and one pair of emoji in sixteen.
"""

from __future__ import annotations

import random
import zlib
from itertools import combinations
from pathlib import Path

from emoji_set import COLOURS, held_out

from dit_accel.inputs.scene import MOTIONS, PATTERNS, PLACES, Backdrop, Object, Scene, Vocabulary

EMOJI = tuple((Path(__file__).parent / "scene_emoji.txt").read_text().splitlines())
VOCABULARY = Vocabulary(EMOJI, tuple(COLOURS))
Shares = tuple[float, float, float]  # of scenes with one, two and three emoji
COUNTS = {256: (0.25, 0.75, 0.0), 384: (0.25, 0.55, 0.2), 512: (0.25, 0.5, 0.25)}  # to this side
MANY = {256: (0.2, 0.8, 0.0), 512: (0.15, 0.45, 0.4)}  # the same while training
BACKDROPS = (0.3, 0.3, 0.2, 0.2)  # as PATTERNS
SIZED, PLACED, UNRELATED, STILL = 0.4, 0.5, 0.25, 0.4


def pair_is_held_out(first: str, second: str) -> bool:
    """True for one pair of emoji in sixteen: a hash of both names, so it never moves."""
    return zlib.crc32(" ".join(sorted((first, second))).encode()) % 16 == 0


def is_held_out(scene: Scene) -> bool:
    """True for a scene with a pair or an emoji on a colour that was never trained on."""
    names = [thing.name for thing in scene.objects]
    colours = {scene.backdrop.colour, scene.backdrop.second}
    pairs = any(pair_is_held_out(*pair) for pair in combinations(names, 2))
    return pairs or any(held_out(name) in colours for name in names)


def draw(
    rng: random.Random, side: int, held: bool = False, counts: dict[int, Shares] = COUNTS
) -> Scene:
    """A random scene for a canvas of `side` pixels, all trained on or (`held`) all held out."""
    shares = next(c for s, c in counts.items() if side <= s)
    while True:
        scene = _any(rng, shares)
        if is_held_out(scene) == held:
            return scene


def _any(rng: random.Random, shares: Shares) -> Scene:
    count = rng.choices((1, 2, 3), shares)[0]
    objects = tuple(Object(name, _size(rng)) for name in rng.sample(EMOJI, count))
    between = ["left of", "right of", "above", "below"]
    relations = tuple(
        "and" if rng.random() < UNRELATED else rng.choice(between) for _ in objects[1:]
    )
    place = rng.choice(PLACES) if count == 1 and rng.random() < PLACED else None
    pattern = rng.choices(PATTERNS, BACKDROPS)[0]
    colour, second = rng.sample(list(COLOURS), 2)
    backdrop = Backdrop(pattern, colour, second if pattern == "ramp" else None)
    motion = None if rng.random() < STILL else rng.choice(MOTIONS)
    return Scene(objects, backdrop, relations, place, motion)


def _size(rng: random.Random) -> str | None:
    return rng.choice(("small", "large")) if rng.random() < SIZED else None
