"""mp4 files, written and read through imageio's PyAV plugin."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dit_accel.inputs.text import check_file

if TYPE_CHECKING:
    from imageio.plugins.pyav import PyAVPlugin


BT709 = 1


def encode(path: Path, frames: np.ndarray, fps: float, tags: dict[str, str]) -> None:
    """Write frames, uint8 [T, H, W, 3], as H.264, 4:2:0, BT.709, index first: what every browser
    plays. Odd sides repeat one row; tags: of the container."""
    height, width = (side + side % 2 for side in frames.shape[1:3])
    with _opened(path, "w", options={"movflags": "+faststart"}) as file:
        file.init_video_stream("libx264", fps=float(fps), pixel_format="yuv420p")
        file.container_metadata.update(tags)
        # Rate factor, size and colour tags are not in the plugin's words: its stream takes them.
        stream = file._video_stream
        assert stream is not None, "init_video_stream made it"
        stream.options, (stream.height, stream.width) = {"crf": "14"}, (height, width)
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        matrix = "out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
        file.set_video_filter([("scale", matrix), ("format", "yuv420p")])
        sides = ((0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0))
        for frame in frames:
            file.write_frame(np.pad(frame, sides, mode="edge"))


@contextmanager
def _opened(path: str | Path, mode: str, **options: object) -> Iterator[PyAVPlugin]:
    """imageio's PyAV plugin; after an error it is closed at once and writes nothing more.

    Whenever it closes it collects all garbage, a quarter of a second beside a loaded model: what
    stood before is kept out of that.
    """
    from imageio.v3 import imopen  # what measures but writes no clip does without

    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        # imageio's annotations do not know the arguments of its plugins
        file = imopen(path, mode, plugin="pyav", **options)  # type: ignore[call-overload]
        try:
            yield file
            file.close()
        except BaseException:
            file._video_stream = None
            for close in (file.close, file.request.finish):
                with suppress(Exception):
                    close()
            file._container = None
            raise
        finally:
            file.close = lambda: None  # which its finaliser calls once more
    finally:
        if mine:
            gc.unfreeze()


@contextmanager
def _reader(path: str | Path) -> Iterator[PyAVPlugin]:
    check_file(path, "clip")
    try:
        with _opened(path, "r") as file:
            yield file
    except MemoryError:
        raise
    except Exception as error:  # FFmpeg's, PyAV's and imageio's
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"clip {path} cannot be read: {why}") from None


def read(path: str | Path) -> np.ndarray:
    """The frames of a clip, uint8 [T, H, W, 3]; ValueError for what is none."""
    with _reader(path) as file:
        frames = list(file.iter(format="rgb24"))
        if not frames:
            raise ValueError("it has no frames")
        return np.stack(frames)


def rate(path: str | Path) -> float | None:
    """Frames a second of a clip, where it says so; ValueError for what is none."""
    with _reader(path) as file:
        return float(file.metadata().get("fps") or 0) or None


def tags(path: str | Path) -> dict[str, str]:
    """The container's tags of a clip; ValueError for what is none."""
    with _reader(path) as file:
        return dict(file.container_metadata)
