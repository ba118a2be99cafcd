"""The options that `generate` and `compare` share, and what they become. Imports nothing heavy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from dit_accel.config import AccelConfig
    from dit_accel.generation.boost import Boost
    from dit_accel.generation.request import Request


class BadInput(Exception):
    """What the user gave cannot be used; the message is one sentence."""


@contextmanager
def checked() -> Iterator[None]:
    """Errors about arguments inside this block are the user's to mend: no traceback."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error


_WHAT, _HOW, _WHERE = "What to make", "How to accelerate", "Where to run"


def _option(text: str, panel: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True)
class Common:
    """One field, one option; None leaves the choice to the model or the method."""

    prompt: Annotated[str, typer.Argument(help="What to show.", show_default=False)]
    negative: Annotated[str | None, _option("What not to show.", _WHAT)] = None
    seed: Annotated[int, _option("Same seed, same noise, on any device. \\[0]", _WHAT)] = 0
    steps: Annotated[int | None, _option("Denoising steps.", _WHAT)] = None
    size: Annotated[str | None, _option("WIDTHxHEIGHT in pixels.", _WHAT)] = None
    frames: Annotated[int | None, _option("Frames of the clip.", _WHAT)] = None
    fps: Annotated[float | None, _option("Frames a second of the file.", _WHAT)] = None
    guidance: Annotated[float | None, _option("Classifier-free guidance scale.", _WHAT)] = None
    image: Annotated[Path | None, _option("First picture, for models that need one.", _WHAT)] = None
    method: Annotated[
        str | None, _option("Name, name:preset or preset file; see `methods`.", _HOW)
    ] = None
    keep: Annotated[float | None, _option("Share of key blocks kept, in (0, 1].", _HOW)] = None
    warmup: Annotated[
        str | None, _option("Dense steps at the start: a share (0.15) or a number (3).", _HOW)
    ] = None
    prune: Annotated[
        str | None,
        _option("Share of the tokens run in most steps (0.5), or safe, balanced, fast.", _HOW),
    ] = None
    compile: Annotated[bool, _option("Compile the blocks; worth a minute on a GPU.", _HOW)] = False
    step_cache: Annotated[
        float | None, _option("Skip steps that change less than this, such as 0.05.", _HOW)
    ] = None
    lora: Annotated[
        str | None, _option("LoRA of a fine-tuned SLA; the dense run goes without.", _HOW)
    ] = None
    order: Annotated[str | None, _option("Token order: raster, tile or hilbert.", _HOW)] = None
    min_tokens: Annotated[int | None, _option("Attend densely below this many tokens.", _HOW)] = (
        None
    )
    model: Annotated[
        str | None, _option("Folder or Hugging Face id. \\[the embedded emoji model]", _WHERE)
    ] = None
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, mps. \\[a GPU if any]", _WHERE)] = (
        None
    )
    dtype: Annotated[
        str | None, _option("bf16, fp16, fp32. \\[bf16 on CUDA, else fp32]", _WHERE)
    ] = None
    offload: Annotated[bool, _option("Keep only the running part on the GPU.", _WHERE)] = False
    ulysses: Annotated[
        int, _option("GPUs (or CPU processes) that share one generation. \\[1]", _WHERE)
    ] = 1

    def request(self) -> Request:
        """The generation asked for; ValueError for an impossible value."""
        from PIL import Image, UnidentifiedImageError

        from dit_accel.generation.request import Request

        width, height = parse_size(self.size) if self.size else (None, None)
        if self.fps is not None and not 1 <= self.fps <= 240:
            raise ValueError(f"fps lies from 1 to 240, not {self.fps:g}")
        try:
            picture = Image.open(self.image).convert("RGB") if self.image else None
            if picture is not None:
                picture.filename = str(self.image)  # lost by convert; the report names it
        except (OSError, UnidentifiedImageError):
            raise ValueError(f"{self.image} is not a picture that can be opened") from None
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative,
            seed=self.seed,
            steps=self.steps,
            height=height,
            width=width,
            frames=self.frames,
            guidance=self.guidance,
            image=picture,
        )

    def config(self) -> AccelConfig:
        """The acceleration asked for; ValueError for an unknown method or a bad option."""
        from dit_accel.config import DEFAULT, resolve
        from dit_accel.pruning.config import resolve as pruning

        # pruned tokens and a state of all tokens exclude each other
        default = DEFAULT if self.prune is None else "pooled"
        name = self.method if self.method is not None else default
        config = resolve(
            name, order=self.order, min_tokens=self.min_tokens, prune=pruning(self.prune)
        )
        if self.keep is not None:
            config = replace(config, method=replace(config.method, keep=self.keep))
        if self.warmup is not None:
            schedule = replace(config.schedule, warmup=parse_warmup(self.warmup))
            config = replace(config, schedule=schedule)
        return config

    def boost(self) -> Boost:
        """What runs beside the method; ValueError for a bad value."""
        from dit_accel.generation.boost import Boost

        return Boost(self.compile, self.step_cache, self.lora)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "832x480"; ValueError for anything else."""
    width, cross, height = text.lower().replace("×", "x").partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size is WIDTHxHEIGHT such as 832x480, not {text!r}")
    return int(width), int(height)


def parse_warmup(text: str) -> float | int:
    """A number of steps ("3") or a share of them ("0.15")."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(
            f"warmup is a share (0.15) or a number of steps (3), not {text!r}"
        ) from None


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(common, **own)` every option of Common beside its own."""
    shared = [f.name for f in fields(Common)]

    def run(**values: Any) -> None:
        common = Common(**{name: values.pop(name) for name in shared})
        command(common, **values)

    first, *own = inspect.signature(command).parameters.values()
    theirs = inspect.signature(Common).parameters.values()
    hints = get_type_hints(Common, include_extras=True)
    hints |= get_type_hints(command, include_extras=True)
    together = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in (*theirs, *own)]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(together)
    run.__annotations__ = {p.name: p.annotation for p in together}
    return run


def option(text: str, panel: str, *names: str) -> Any:
    """A typer option as the other commands have them."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


def numbers(text: str, kind: type, name: str) -> list[Any]:
    """ "0.1,0.2" as numbers; ValueError names the option."""
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{name} is a comma-separated list of numbers, not {text!r}")
    return found
