"""The settings a visitor can change, drawn from the one description of options, and the request
that their values make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from dit_accel.app.ask import PRIVATE, STOCK, Ask, BadField, Limits
from dit_accel.app.catalog import PRESETS
from dit_accel.config import DEFAULT
from dit_accel.forward.order import ORDERS
from dit_accel.generation.options import How, What, Where, described
from dit_accel.methods import find, infos, selectors
from dit_accel.methods.sorts import KINDS
from dit_accel.pruning.config import TokenPruning

SIDES = ("left", "right")
# what goes with no sparse method, too
BESIDE = ("prune", "step_cache", "compile", "dense", "quantize", "speed")
TRAINED = "trained"  # the method of a side that runs its checkpoint as it was trained
LEVELS = ("safe", "balanced", "fast")
Opened = Callable[[str, str], Path]  # (kind, token) → a file that the visitor sent

_CHOICES: dict[str, tuple[str, ...]] = {
    "order": ORDERS,
    "prune": tuple(TokenPruning.presets),
    "quantize": ("int8", "fp8"),
    "speed": ("conservative", "balanced", "fast"),
    "dense": ("auto", "native", "_native_cudnn", "kernel"),
    "sort": KINDS,
    "select": tuple(name for name, info in selectors.infos().items() if not info.needs),
    "sampler": ("rcm", "dmd", "flow:5", "renoise:5"),
}
_LABELS = {
    "fps": "Frames a second",
    "heads": "Budget of each head",
    "lora": "LoRA",
    "select": "Selector",
    "warmup": "Warm-up",
    "step_keep": "Budget of each step",
    "negative": "Negative prompt",
    "image": "First picture",
    "dense": "Dense backend",
}
_HINTS = {"number": "decimal", "whole": "numeric"}


@dataclass(frozen=True)
class Control:
    """One field: `kind` is text, whole, number, switch or file; `choices` are proposals."""

    name: str
    label: str
    help: str
    kind: str
    choices: tuple[str, ...] = ()

    @property
    def keyboard(self) -> str:
        """Which keyboard a phone shows."""
        return _HINTS.get(self.kind, "text")


@dataclass(frozen=True)
class Kind:
    """A method as the page offers it.

    own: level, or "" where there is none → option → its own value, as it would be typed; empty
    where that is not known before a checkpoint is loaded.
    """

    value: str
    label: str
    about: str
    own: Mapping[str, Mapping[str, str]]
    prunes: bool


def clip_controls() -> list[Control]:
    """What the clip is made of, but its prompt."""
    return [c for c in _controls(What) if c.name != "prompt"]


def side_controls(limits: Limits) -> list[Control]:
    """What a side runs, but its method."""
    hidden = ("method", *(PRIVATE if limits.public else ()))
    return [c for c in _controls(How) if c.name not in hidden]


def weights_controls(limits: Limits) -> list[Control]:
    """What is loaded over the model's weights: files of the server, and so not of a public page."""
    return [
        replace(control, help=f"{control.help.rstrip('.')}, with a comma between.", kind="text")
        for control in _controls(Where)
        if control.name == "checkpoint" and not limits.public
    ]


def _controls(group: type) -> Iterator[Control]:
    hints = get_type_hints(group)
    for name, option in described(group).items():
        yield Control(name, _label(name), option.text, _kind(hints[name]), _CHOICES.get(name, ()))


def _label(name: str) -> str:
    """How the page calls an option."""
    return _LABELS.get(name, name.replace("_", " ").capitalize())


def _kind(hint: Any) -> str:
    kinds = {int: "whole", float: "number", bool: "switch", Path: "file"}
    return kinds.get(_plain(hint), "text")


def _plain(hint: Any) -> Any:
    if isinstance(hint, UnionType) or get_args(hint):
        return next(x for x in get_args(hint) if x is not type(None))
    return hint


def kinds(limits: Limits) -> list[Kind]:
    """The methods and, where the page is not public, the presets that come with the package and
    what a checkpoint was trained for."""
    found = []
    for name, info in infos().items():
        method = find(name)
        own = {level: _own(f"{name}:{level}") for level in method.presets} or {"": _own(name)}
        needs = (
            " Needs weights that were fine-tuned for the model (dit-accel finetune); without them "
            "it is plain top-k."
            if info.finetuning
            else ""
        )
        about = f"{info.description[0].upper()}{info.description[1:]}.{needs}"
        found.append(Kind(name, name, about, own, not method.stateful))
    for name, path in {} if limits.public else PRESETS.items():
        about = f"The preset {name} that comes with the package, with the weights it needs."
        own = {"": _own(str(path))}
        found.append(Kind(f"preset:{name}", f"preset {name}", about, own, False))
    if not limits.public:
        about = "What the checkpoint under Model was trained for: a method, a share of blocks."
        found.append(Kind(TRAINED, "as trained", about, {}, True))
    return found


def _own(method: str) -> dict[str, str]:
    """What a method or a preset's file runs where its options are left empty."""
    config = How(method).config()
    return {
        "keep": f"{config.method.keep:g}",
        "warmup": f"{config.schedule.warmup:g}",
        "select": str(config.method.select),
        "reuse": str(config.method.reuse),
        "order": config.order,
        "min_tokens": "" if config.min_tokens is None else str(config.min_tokens),
    }


def read(values: Any, limits: Limits, opened: Opened) -> Ask:
    """The request that a form's values make, as JSON has them: empty ones are left to the model.

    Raises BadField, or ValueError for what is no form.
    """
    if not isinstance(values, Mapping):
        raise ValueError("A request is an object of fields and values.")
    apart = ("model", "checkpoint", *SIDES)
    given = {name: value for name, value in values.items() if name not in apart}
    if isinstance(given.get("image"), str) and given["image"]:
        given["image"] = str(opened("picture", given["image"]))
    what = What(**{"prompt": "", **_typed(What, given, "")})
    left, right = (_side(values.get(side), side, limits, opened) for side in SIDES)
    model = values.get("model") or None
    if model is not None and not isinstance(model, str):
        raise BadField("model", "The model is a folder or a Hugging Face id.")
    files = _files(values.get("checkpoint") or "")
    for side in SIDES if not files else ():
        if isinstance(values.get(side), Mapping) and values[side].get("method") == TRAINED:
            words = f"As trained, on the {side}, is a checkpoint's matter: name one under Model."
            raise BadField(f"{side}.method", words)
    return Ask(what, left, right, model, files, limits)


def _files(text: Any) -> tuple[str, ...]:
    """The files of a checkpoint: one, or two with a comma between."""
    if not isinstance(text, str) or len(text) > 1000:
        raise BadField("checkpoint", "The checkpoint is a file, a folder or an id.")
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _side(values: Any, side: str, limits: Limits, opened: Opened) -> How:
    if values is None:
        return STOCK if side == "left" else How(DEFAULT)
    if not isinstance(values, Mapping):
        raise BadField(side, f"The {side} side is an object of fields and values.")
    given = {name: value for name, value in values.items() if name not in ("method", "level")}
    method, level = values.get("method") or DEFAULT, values.get("level") or ""
    if not isinstance(method, str) or not isinstance(level, str):
        raise BadField(f"{side}.method", f"The method on the {side} is a name.")
    kind, _, token = method.partition(":")
    typed = _typed(How, given, f"{side}.")
    if typed.get("speed"):
        try:
            return How(None, **typed).at_speed()
        except ValueError as error:
            raise BadField(f"{side}.speed", f"On the {side}: {error}.") from None
    if kind == TRAINED:
        return How(None, **typed)
    if kind == "opened":
        return How(str(opened("preset", token)), **typed)
    if kind == "preset" and token in PRESETS and not limits.public:
        path = PRESETS[token]
        if "lora" not in typed and (path.parent / "lora").is_dir():
            typed["lora"] = str(path.parent / "lora")
        return How(str(path), **typed)
    if method not in infos():
        raise BadField(
            f"{side}.method", f"There is no method {method[:40]!r}: choose from the list."
        )
    if method == "dense":
        typed = {name: typed[name] for name in typed if name in BESIDE}
    return How(f"{method}:{level}" if level in find(method).presets else method, **typed)


def _typed(group: type, given: Mapping[str, Any], head: str) -> dict[str, Any]:
    """The values of a group's fields, empty ones left out."""
    hints, found = get_type_hints(group), {}
    known = described(group)
    for name, value in given.items():
        if name not in known:
            raise BadField(head + name[:40], f"There is no setting {name[:40]!r}.")
        if value in (None, "") or (isinstance(value, str) and not value.strip()):
            continue
        found[name] = _value(head, name, value, _plain(hints[name]))
    return found


def _value(head: str, name: str, value: Any, kind: Any) -> Any:
    label = _label(name)
    words = {int: "a whole number", float: "a number", bool: "on or off"}.get(kind, "a text")
    shown = str(value)[:40]
    try:
        if kind is bool:
            return {True: True, False: False}[value]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        text = str(value).strip()
        if len(text) > 200 and name not in ("prompt", "negative"):
            raise ValueError
        if kind is int:
            return int(text.removesuffix(".0"))
        return float(text.replace(",", ".")) if kind is float else kind(text)
    except (ValueError, KeyError, TypeError):
        raise BadField(head + name, f"{label} is {words}, not {shown!r}.") from None
