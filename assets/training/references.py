"""The training clips as a few small frames each, for `dit-accel evaluate` to recognise emoji by.

python assets/training/references.py --data data/emoji
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clips import Clips
from scene_set import EMOJI

from dit_accel.evaluate.recognition import FILE, References

EVERY = 16  # frames 0, 16, 32, 48, 64 of a clip
SIDE, SCENE_SIDE = 16, 36  # 2.2 MB for 438 clips; 2.1 MB for the 80 of scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--scenes", action="store_true", help="only the emoji of scenes, larger")
    args = parser.parse_args()
    references = small(args.data, args.scenes)
    references.save(args.out)
    print(f"{args.out}: {len(references.names)} clips, {args.out.stat().st_size / 1e6:.1f} MB")


def small(data: Path, scenes: bool) -> References:
    """A few frames of the archive's clips, or of those that scenes are made of."""
    clips = Clips.load(data, "cpu", stride=EVERY)
    frames = [number * EVERY for number in range(clips.rgba.shape[1])]
    kept = [n for n, name in enumerate(clips.names) if not scenes or name in EMOJI]
    names, side = [clips.names[n] for n in kept], SCENE_SIDE if scenes else SIDE
    return References.of(clips.rgba[kept], names, frames, clips.colours, side)


if __name__ == "__main__":
    main()
