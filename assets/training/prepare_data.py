"""Make the training archive: webp animations from npm → one small AVIF clip each + captions.json.

    python assets/training/prepare_data.py --out data/emoji  # downloads 730 MB
    python assets/training/prepare_data.py --out data/emoji --source unpacked/package/assets

A clip is 512×256: left the colours multiplied by alpha, right the alpha, so that
`left + (1 − alpha) · background` composites it and coding errors add nothing but themselves.
AV1 takes the room of h264 at 1.5 dB more, and Pillow alone reads it.
Animations loop; one shorter than 65 frames is wrapped around. Clips already there are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from emoji import EMOJI_DATA
from emoji_set import COLOURS, code_points, held_out, is_chosen
from PIL import Image

PACKAGES = [f"@lobehub/fluent-emoji-anim-{i}" for i in range(1, 5)]
FRAMES, SIZE, FPS = 65, 256, 24
CODEC = {"quality": 60, "speed": 6, "subsampling": "4:4:4", "max_threads": 1}


def download(folder: Path) -> Path:
    """Fetch and unpack the four packages with npm; the folder of webp files."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
    for archive in sorted(folder.glob("*.tgz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package" / "assets"


def choose(source: Path) -> list[tuple[Path, str, int]]:
    """Path, short name and frame count of every animation that the rule keeps, by file name."""
    names = {
        tuple(ord(c) for c in text if c != "\ufe0f"): entry["en"].strip(":").replace("_", " ")
        for text, entry in EMOJI_DATA.items()
    }
    chosen = []
    for path in sorted(source.glob("*.webp")):
        points = code_points(path.stem)
        if points is None or points not in names:
            continue
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            if image.size == (SIZE, SIZE) and is_chosen(points, names[points], frames):
                chosen.append((path, names[points].lower(), frames))
    return chosen


def read(path: Path) -> np.ndarray:
    """The animation as [65, 256, 256, 4] uint8 RGBA, wrapped around where it is shorter."""
    with Image.open(path) as image:
        frames = []
        for i in range(min(FRAMES, image.n_frames)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGBA")))
    return np.stack([frames[i % len(frames)] for i in range(FRAMES)])


def encode(rgba: np.ndarray, path: Path) -> None:
    """Write the pair (colour·alpha | alpha), 4:4:4; the file appears only when complete."""
    alpha = rgba[..., 3:].astype(np.uint16)
    colour = ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
    both = np.concatenate([colour, rgba[..., 3:].repeat(3, axis=-1)], axis=2)
    first, *rest = (Image.fromarray(frame) for frame in both)
    partial = path.with_suffix(".part")
    first.save(partial, "AVIF", save_all=True, append_images=rest, duration=1000 // FPS, **CODEC)
    partial.rename(path)


def convert(source: Path, path: Path) -> None:
    """One animation, unless its clip is there already."""
    if not path.exists():
        encode(read(source), path)
        print(f"{path.name} {path.stat().st_size} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument("--source", type=Path, help="folder of unpacked webp files (no download)")
    parser.add_argument("--limit", type=int, help="only the first N emoji")
    args = parser.parse_args()
    chosen = choose(args.source or download(args.out.parent / "npm"))[: args.limit]
    args.out.mkdir(parents=True, exist_ok=True)
    files = [args.out / f"{path.stem}.avif" for path, _, _ in chosen]
    with ProcessPoolExecutor() as pool:
        list(pool.map(convert, (path for path, _, _ in chosen), files))
    clips = [
        {"file": file.name, "name": name, "frames": frames, "held_out": held_out(name)}
        for file, (_, name, frames) in zip(files, chosen, strict=True)
    ]
    manifest = {"fps": FPS, "frames": FRAMES, "size": SIZE, "colours": COLOURS, "clips": clips}
    (args.out / "captions.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    total = sum(f.stat().st_size for f in args.out.glob("*.avif"))
    print(f"{len(clips)} clips, {total / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
