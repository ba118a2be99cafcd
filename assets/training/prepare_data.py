"""Make the training archive: webp animations from npm → one small h264 clip each + captions.json.

    python assets/training/prepare_data.py --out data/emoji  # downloads 730 MB
    python assets/training/prepare_data.py --out data/emoji --source unpacked/package/assets

A clip is 512×256: left the colours multiplied by alpha, right the alpha, so that
`left + (1 − alpha) · background` composites it and coding errors add nothing but themselves.
Animations loop; one shorter than 65 frames is wrapped around. Clips already there are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
from pathlib import Path

import av
import numpy as np
from emoji import EMOJI_DATA
from emoji_set import COLOURS, code_points, held_out, is_chosen
from PIL import Image

PACKAGES = [f"@lobehub/fluent-emoji-anim-{i}" for i in range(1, 5)]
FRAMES, SIZE, FPS = 65, 256, 24
CODEC = {"preset": "fast", "crf": "23"}


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
    """Write the pair (colour·alpha | alpha) as h264, 4:4:4; the file appears only when complete."""
    alpha = rgba[..., 3:].astype(np.uint16)
    colour = ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)
    both = np.concatenate([colour, rgba[..., 3:].repeat(3, axis=-1)], axis=2)
    partial = path.with_suffix(".part")
    with av.open(partial, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=CODEC)
        stream.height, stream.width = both.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.thread_count = 1
        for frame in both:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument("--source", type=Path, help="folder of unpacked webp files (no download)")
    parser.add_argument("--limit", type=int, help="only the first N emoji")
    args = parser.parse_args()
    chosen = choose(args.source or download(args.out.parent / "npm"))[: args.limit]
    args.out.mkdir(parents=True, exist_ok=True)
    clips = []
    for number, (path, name, frames) in enumerate(chosen, 1):
        file = args.out / f"{path.stem}.mp4"
        if not file.exists():
            encode(read(path), file)
            print(f"{number}/{len(chosen)} {name} {file.stat().st_size} bytes", flush=True)
        clips.append(
            {"file": file.name, "name": name, "frames": frames, "held_out": held_out(name)}
        )
    manifest = {"fps": FPS, "frames": FRAMES, "size": SIZE, "colours": COLOURS, "clips": clips}
    (args.out / "captions.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    total = sum(f.stat().st_size for f in args.out.glob("*.mp4"))
    print(f"{len(clips)} clips, {total / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
