"""A checkpoint as one small file, to go on from: coarse matrices, a byte coder behind them.

    python assets/training/squeeze.py data/scenes/dit assets/training/scenes.checkpoint

A matrix is rounded, row by row, to steps of 0.4 of the row's root mean square, 3.4 bits a weight
after Huffman coding: 11 % of noise on the weights, which training takes out again within a few
hundred steps. Vectors and embeddings stay bfloat16. Not for generating.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch
from run_state import Progress, load
from safetensors.torch import load as read_bytes
from safetensors.torch import save as write_bytes
from torch import Tensor

STEP = 0.4
SMALLEST = 30_000
EXACT = ("shared", "relative_attention")


def _coded(levels: Tensor) -> Tensor:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(levels.numpy().tobytes()) + coder.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def squeeze(tensors: dict[str, Tensor], progress: Progress, extra: dict) -> bytes:
    """The file's bytes."""
    out, shapes = {}, {}
    for name, tensor in tensors.items():
        exact = tensor.dim() < 2 or tensor.numel() < SMALLEST or any(e in name for e in EXACT)
        if exact:
            out[name] = tensor.to(torch.bfloat16).contiguous()
            continue
        rows = tensor.float().flatten(1)
        scale = (STEP * rows.square().mean(1, keepdim=True).sqrt()).clamp(min=1e-12)
        out[f"{name}:levels"] = _coded((rows / scale).round().clamp(-127, 127).to(torch.int8))
        out[f"{name}:scale"] = scale.to(torch.float32)
        shapes[name] = list(tensor.shape)
    state = {"step": progress.step, "seconds": progress.seconds, **extra}
    return write_bytes(out, {"state": json.dumps(state), "shapes": json.dumps(shapes)})


def restore(file: Path) -> tuple[dict[str, Tensor], Progress, dict]:
    """What `run_state.load` gives for a folder; ValueError for another file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        facts = json.loads(data[8 : 8 + size])["__metadata__"]
        state, shapes = json.loads(facts["state"]), json.loads(facts["shapes"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"Expected a file of squeeze.py, {file} is none: {error!r}.") from None
    stored = read_bytes(data)
    tensors = {name: t for name, t in stored.items() if ":" not in name}
    for name, shape in shapes.items():
        levels = zlib.decompress(stored[f"{name}:levels"].numpy().tobytes(), -15)
        rows = torch.frombuffer(bytearray(levels), dtype=torch.int8).view(shape[0], -1).float()
        tensors[name] = (rows * stored[f"{name}:scale"]).view(shape)
    return tensors, Progress(state.pop("step"), state.pop("seconds")), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder that train_scenes.py wrote")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    args.file.write_bytes(squeeze(*load(args.checkpoint)))
    print(f"{args.file}: {args.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
