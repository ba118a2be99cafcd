"""Ways of reading the token grid from a transformer's forward arguments, shared by the families."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.pipelines.base import Geometry

T = TypeVar("T")

# Where the text lies in the joint sequence; its length is what the attention call brings.
TEXT: dict[str, dict[str, Any]] = {
    "apart": {},
    "first": {"n_text": None, "text_first": True},
    "last": {"n_text": None},
}


def patch_size(transformer: nn.Module) -> tuple[int, int, int]:
    """Latent pixels of one token along (T, H, W)."""
    config: Any = transformer.config
    size = config.patch_size
    if isinstance(size, int):
        size = (getattr(config, "patch_size_t", None) or 1, size, size)
    t, h, w = (1,) * (3 - len(size)) + tuple(size)
    return t, h, w


def grid_of(transformer: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """(T, H, W) tokens of latents x [B, C, T, H, W] or [B, C, H, W]."""
    t, h, w = (1, *x.shape[2:])[-3:]
    p_t, p_h, p_w = patch_size(transformer)
    return t // p_t, h // p_h, w // p_w


def latents(text: str = "apart", **more: Any) -> Callable[[nn.Module, dict], Geometry]:
    """Geometry of a transformer whose `hidden_states` are latents; text: apart, first or last."""

    def geometry(transformer: nn.Module, args: dict[str, Any]) -> Geometry:
        grid = grid_of(transformer, args["hidden_states"])
        return Geometry(grid, **TEXT[text], **more)

    return geometry


def image_ids(text: str = "first", **more: Any) -> Callable[[nn.Module, dict], Geometry]:
    """Geometry of a transformer whose `img_ids` [N, 3 or more] hold (image, row, column, …)."""

    def geometry(transformer: nn.Module, args: dict[str, Any]) -> Geometry:
        return Geometry(grid_of_ids(args["img_ids"]), **TEXT[text], **more)

    return geometry


def grid_of_ids(ids: Tensor) -> tuple[int, int, int]:
    """(images, rows, columns) of ids [N, k] or [B, N, k]; (1, 1, N) when they form no grid.

    Costs a device synchronisation, once per ids tensor: pipelines hand the same one to each step.
    """
    return once(_read_ids, ids)


def _read_ids(ids: Tensor) -> tuple[int, int, int]:
    flat = ids if ids.ndim == 2 else ids[0]
    rows, columns = (flat[:, 1:3].amax(0) - flat[:, 1:3].amin(0) + 1).long().tolist()
    n = flat.shape[0]
    whole = n % (rows * columns) == 0
    return (n // (rows * columns), rows, columns) if whole else (1, 1, n)


_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def once(read: Callable[..., T], *tensors: Tensor) -> T:
    """read(*tensors), kept as long as the first of them lives and none is another or written to."""
    stamp = [(id(x), None if x.is_inference() else x._version) for x in tensors]
    kept = _KEPT.setdefault(tensors[0], {})
    if read not in kept or kept[read][0] != stamp:
        kept[read] = (stamp, read(*tensors), tensors[1:])  # held, so that their ids stay theirs
    return kept[read][1]


def sizes_of(img_shapes: Any) -> list[tuple[int, int, int]]:
    """(T, H, W) of the images of the first sample: `img_shapes` is one image's, a list of one for
    each sample, or a list of lists of them."""
    first = img_shapes[0] if isinstance(img_shapes, list) else img_shapes
    return list(first) if isinstance(first, list) else [first]


def grid_of_images(shapes: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Images (or clips) one after another, each (T, H, W) tokens: a grid when all are alike."""
    t, h, w = shapes[0]
    if all(tuple(shape) == (t, h, w) for shape in shapes):
        return (len(shapes) * t, h, w)
    return (1, 1, sum(prod(shape) for shape in shapes))
