"""The Python lines that make a clip again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from PIL import Image

from dit_accel.config import AccelConfig
from dit_accel.generation.boost import STOCK, Boost
from dit_accel.generation.loading import EMBEDDED, EMBEDDED_NAME
from dit_accel.generation.trained import Trained
from dit_accel.methods import Method
from dit_accel.methods.branches.base import Branch
from dit_accel.methods.reuse import Reuse
from dit_accel.methods.selectors import Selector
from dit_accel.methods.sorts import Sort


def recipe(
    config: AccelConfig,
    where: dict[str, str],
    values: dict[str, object],
    seed: int,
    boost: Boost = STOCK,
    sampler: str | None = None,
    trained: Trained | None = None,
) -> str:
    """The Python lines that make the accelerated clip again."""
    kind = where["pipeline"]
    embedded = where["model"] in (EMBEDDED_NAME, str(EMBEDDED))
    arguments = [f"    {name}={_literal(value)}," for name, value in values.items()]
    name = "EMBEDDED" if embedded else _literal(where["model"])
    run = _shortest(config) if trained is None else _from_trained(config, trained.config)
    load = f"pipe = {kind}.from_pretrained({name}, torch_dtype=torch.{where['dtype']})"
    lines = [
        *(["from dataclasses import replace", ""] if "replace(" in run else []),
        "import torch",
        f"from diffusers import {kind}",
        "",
        "import dit_accel",
        *(["from dit_accel.boost import Boost"] if boost != STOCK else []),
        *(["from dit_accel.loading import EMBEDDED"] if embedded else []),
        *(["from dit_accel.media.pictures import read_picture"] if "image" in values else []),
        *(["from dit_accel.samplers import install"] if sampler is not None else []),
        "",
        load if where["device"] == "cpu" else f"{load}.to({_literal(where['device'])})",
        *([_loading(trained)] if trained is not None else []),
        *([f"{boost}.switch_on(pipe)"] if boost != STOCK else []),
        *([f"install(pipe, {_literal(sampler)})"] if sampler is not None else []),
        f"handle = dit_accel.accelerate(pipe, {run})",
        "output = pipe(",
        *arguments,
        f'    generator=torch.Generator("cpu").manual_seed({seed}),',
        ")",
        "print(handle.report())",
    ]
    return "\n".join(lines)


def _loading(trained: Trained) -> str:
    files = ", ".join(map(_literal, trained.files))
    grid = "" if trained.sampler else ", sampler=False"
    return f"loaded = dit_accel.load_checkpoint(pipe, {files}{grid}, attention=False)"


def _from_trained(config: AccelConfig, trained: AccelConfig | None) -> str:
    """The configuration as changes of what came with a checkpoint, if it is of that method."""
    mine = config.method
    if trained is None or type(mine) is not type(trained.method) or getattr(mine, "weights", None):
        return _shortest(config)
    method = _replaced("loaded.config.method", mine, trained.method)
    changes = [f"{name}={text}" for name, text in _differing(config, trained) if name != "method"]
    if method != "loaded.config.method":
        changes.insert(0, f"method={method}")
    return f"replace(loaded.config, {', '.join(changes)})" if changes else "loaded.config"


def _replaced(name: str, mine: Method, other: Method) -> str:
    changes = ", ".join(f"{field}={text}" for field, text in _differing(mine, other))
    return f"{name}.replaced({changes})" if changes else name


def _differing(mine: Any, other: Any) -> Iterable[tuple[str, str]]:
    for item in fields(mine):
        value = getattr(mine, item.name)
        if value != getattr(other, item.name):
            yield item.name, _spelled(value)


def _literal(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict) and set(value) == {"file"}:  # a picture, in the facts of a clip
        return f"read_picture({_literal(str(value['file']))})"
    if isinstance(value, Image.Image):
        return f"read_picture({_literal(str(getattr(value, 'filename', 'picture.png')))})"
    return repr(value)


def _shortest(config: AccelConfig) -> str:
    plain = AccelConfig(config.method)
    return _spelled(config.method) if config == plain else _spelled(config)


def _spelled(value: object) -> str:
    """A dataclass as Python text, without the fields that have their default value."""
    if isinstance(value, Selector | Reuse | Sort | Branch):
        return _literal(str(value))
    if not is_dataclass(value):
        return _literal(value)
    return f"dit_accel.{type(value).__name__}({', '.join(_changed(value))})"


def _changed(value: Any) -> Iterable[str]:
    for item in fields(value):
        mine, default = getattr(value, item.name), item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        if mine != default:
            yield f"{item.name}={_spelled(mine)}"
