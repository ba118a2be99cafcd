"""The training clips as a few small frames each, for `dit-accel evaluate` to recognise emoji by.

python assets/training/references.py --data data/emoji
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clips import Clips
from scene_set import EMOJI

from dit_accel.evaluate.recognition import FILE, References

EVERY, SIDE = 16, 36  # frames 0, 16, 32, 48, 64 of a clip at 36 × 36: 2.1 MB for 80 clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    clips = Clips.load(args.data, "cpu", stride=EVERY)
    frames = [number * EVERY for number in range(clips.rgba.shape[1])]
    known = [n for n, name in enumerate(clips.names) if name in EMOJI] or list(
        range(len(clips.names))
    )
    names = [clips.names[n] for n in known]
    References.of(clips.rgba[known], names, frames, clips.colours, SIDE).save(args.out)
    print(f"{args.out}: {len(names)} clips, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
