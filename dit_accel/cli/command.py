"""What typer lacks: options in groups, options that may stand alone, and ones of several words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand

from dit_accel.generation.options import Option, described


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: where a parameter's type is a dataclass, each of its fields is
    an option, and the dataclass is made of them for the call.

    ValueError when two groups have a field of the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        options += _fields(groups[name]) if name in groups else [_plain(parameter, hints[name])]

    def run(**values: object) -> None:
        made = {
            name: kind(**{field.name: values.pop(field.name) for field in _fields(kind)})
            for name, kind in groups.items()
        }
        command(**made, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.alone = _alone(command, groups)  # type: ignore[attr-defined]
    return run


def _alone(command: Callable[..., None], groups: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Option that may stand alone → the words that are its values."""
    said = [described(kind) for kind in (command, *groups.values())]
    notes = {name: note for some in said for name, note in some.items()}
    return {f"--{_dashed(name)}": note.alone for name, note in notes.items() if note.alone}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _fields(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_plain(p, hints[p.name]) for p in inspect.signature(group).parameters.values()]


def _plain(parameter: inspect.Parameter, hint: object) -> inspect.Parameter:
    return parameter.replace(
        kind=inspect.Parameter.KEYWORD_ONLY, annotation=_told(hint, parameter.name)
    )


def _told(hint: object, name: str) -> object:
    """The annotation with typer's word for an Option of generation.options, called `name`."""
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    for note in notes:
        if isinstance(note, Option):
            said: dict[str, Any] = {"help": escape(note.text), "show_default": False}
            if note.given_first:
                return Annotated[kind, typer.Argument(**said)]
            if note.alone:
                said |= {"parser": _switch, "metavar": f"[{'|'.join(note.alone)}]"}
                names = (f"--{_dashed(name)}", f"--no-{_dashed(name)}")
                return Annotated[Any, typer.Option(*names, rich_help_panel=note.group, **said)]
            return Annotated[kind, typer.Option(rich_help_panel=note.group, **said)]
    return hint


def _switch(value: bool | str) -> bool | str:
    """What a word says of an option that may stand alone."""
    return {_ON: True, _OFF: False}.get(value, value) if isinstance(value, str) else value


_ON, _OFF = "\0on", "\0off"


class Plain(TyperCommand):
    """A command whose options that may stand alone do: --offload "a cat" has a prompt, --offload
    blocks a value, --no-offload none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        alone: dict[str, tuple[str, ...]] = getattr(self.callback, "alone", {})
        words = iter([*args, None])
        found: list[str] = []
        word = next(words)
        while word is not None:
            after = next(words)
            if word == "--":
                found += [word, *(w for w in (after, *words) if w is not None)]
                break
            yes = word.replace("--no-", "--", 1)
            if word in alone and after is not None and after.partition(":")[0] in alone[word]:
                word, after = f"{word}={after}", next(words)
            elif yes in alone:
                word = f"{yes}={_ON if word == yes else _OFF}"
            found.append(word)
            word = after
        args[:] = found
        return super().parse_args(ctx, args)


class Several(Plain):
    """A command whose repeatable options take several words at once: --rows stock none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        words: list[str] = []
        option, taken = "", False
        for word in args:
            if word.startswith("-"):
                option, taken = word if word in many else "", False
            elif option and taken:
                words.append(option)
            else:
                taken = True
            words.append(word)
        return super().parse_args(ctx, words)
