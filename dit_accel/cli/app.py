"""`dit-accel app`, and `python app.py`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from dit_accel.cli.options import BadInput, Metadata, checked, option
from dit_accel.generation import options as say
from dit_accel.generation.options import WHERE

if TYPE_CHECKING:
    from dit_accel.app.ask import Limits

_PAGE, _EXAMPLES = "The page", "The stored examples"


@dataclass(frozen=True)
class PageOptions:
    """Where the page is found, and what it allows."""

    host: Annotated[str, option("Address to listen on. \\[127.0.0.1]", _PAGE)] = "127.0.0.1"
    port: Annotated[int, option("Port to listen on. \\[7860]", _PAGE)] = 7860
    model: Annotated[
        list[str] | None,
        option("Offer this folder or Hugging Face id beside the embedded one. Repeatable.", WHERE),
    ] = None
    public: Annotated[
        bool,
        option(
            "For a page strangers can reach: tighter limits, and no model but those offered.",
            _PAGE,
            "--public",
        ),
    ] = False
    queue: Annotated[int | None, option("Visitors who may wait at a time. \\[8]", _PAGE)] = None
    name: Annotated[
        list[str] | None,
        option("Host name that the page is called by, behind a proxy. Repeatable.", _PAGE),
    ] = None
    open: Annotated[bool, option("Open the page in a browser.", _PAGE, "--open")] = False

    def limits(self) -> Limits:
        """What the page allows; ValueError for a queue of none."""
        from dit_accel.app.ask import Limits

        models = tuple(self.model or ())
        base = Limits.for_public(models) if self.public else Limits(models=models)
        if self.queue is None:
            return base
        if self.queue < 1:
            raise ValueError(f"queue is a number of visitors ≥ 1, not {self.queue}")
        return replace(base, queue=self.queue)


Make = Annotated[
    bool, option("Generate these, or all, anew, and stop.", _EXAMPLES, "--make-examples")
]
Names = Annotated[list[str] | None, typer.Argument(help="With --make-examples.")]


def page(
    page: PageOptions,
    names: Names = None,
    device: say.Device = None,
    dtype: say.Dtype = None,
    offload: say.Offload = False,
    make_examples: Make = False,
    metadata: Metadata = True,
) -> None:
    """Open the page that compares two configurations in a browser (the extra `app`)."""
    from dit_accel.app import launch

    try:
        with checked():
            if names and not make_examples:
                raise ValueError(f"{names[0]!r} names an example: add --make-examples")
            limits, studio = page.limits(), launch.studio(device, dtype, offload, metadata)
            if make_examples:
                from dit_accel.app import examples

                examples.make(studio, names or [])
            else:
                called = tuple(page.name or ())
                launch.serve(studio, limits, page.host, page.port, page.open, called)
    except OSError as error:
        raise BadInput(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "starlette", "uvicorn"):
            raise
        raise BadInput('the page needs Gradio: pip install "dit-accel[app]"') from None
