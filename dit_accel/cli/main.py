"""The command `dit-accel`. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from dit_accel import __version__
from dit_accel.cli.batch import batch
from dit_accel.cli.doctor import doctor
from dit_accel.cli.evaluate import evaluate
from dit_accel.cli.options import BadInput, Common, checked, with_common
from dit_accel.cli.tune import tune
from dit_accel.parallel import launcher as ranks

OK, UNEXPECTED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Typer carries its own copy of click in some versions: its usage error is reached through it.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    name="dit-accel",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Sparse attention for diffusers' video and image transformers.

    Without --model every command uses the small text-to-video model that comes with the package.
    """
    if version:
        print(f"dit-accel {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@with_common
def generate(
    common: Common,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write. \\[named after the prompt]", show_default=False
        ),
    ] = None,
) -> None:
    """Make one clip or picture with an accelerated pipeline (--method dense for the stock one).

    dit-accel generate "rocket on a blue background"

    dit-accel generate "cat on a red background" --method topk --keep 0.2 --seed 3 -o cat.mp4

    dit-accel generate "a cat" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480
    """
    from dit_accel.cli.generate import run_generate

    run_generate(common, output)


@app.command()
@with_common
def compare(
    common: Common,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to write. \\[named after the prompt]", show_default=False
        ),
    ] = None,
) -> None:
    """Make the same clip dense and accelerated, and report how much faster and how close.

    dit-accel compare "rocket on a blue background"

    dit-accel compare "cat on a red background" --keep 0.5 -o out/cat

    Writes both clips, a side-by-side clip, a contact sheet, report.json and report.html.
    """
    from dit_accel.cli.compare import run_compare

    run_compare(common, output)


app.command()(batch)
app.command()(evaluate)
app.command()(tune)
app.command()(doctor)


@app.command()
def methods() -> None:
    """List the methods, their presets and papers."""
    from dit_accel.cli.session import run_methods

    run_methods()


Rest = Annotated[list[str] | None, typer.Argument(hidden=True)]
_OWN_OPTIONS = {"add_help_option": False, "context_settings": {"ignore_unknown_options": True}}


@app.command("bench", **_OWN_OPTIONS)
def operators(rest: Rest = None) -> None:
    """Time the operators against dense attention, with an error check; whole models with --e2e."""
    from dit_accel.bench.command import main as bench

    with checked():
        raise typer.Exit(bench(rest or []))


@app.command("app", **_OWN_OPTIONS)
def page(rest: Rest = None) -> None:
    """Open the page that compares two configurations in a browser (the extra `app`)."""
    from dit_accel.app.launch import main as serve

    raise typer.Exit(serve(rest or []))


@app.command("finetune", **_OWN_OPTIONS)
def train(rest: Rest = None) -> None:
    """Train SLA so that sparse attention gives what dense attention gives."""
    from dit_accel.cli.finetune import main as finetune

    with checked():
        raise typer.Exit(finetune(rest or []))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; the exit code: 0 well, 2 bad input, 130 Ctrl-C, 1 anything else."""
    _quiet()
    try:
        return app(list(arguments), prog_name="dit-accel", standalone_mode=False) or OK
    except UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "dit-accel"
        return _say(f"{error.format_message().rstrip('.')} (see {where} --help)", BAD_INPUT)
    except ranks.Wanted as wanted:
        code = ranks.launch(wanted.count, arguments)
        while code == ranks.AGAIN:  # a batch counts the tries of each job
            code = ranks.launch(wanted.count, arguments)
        return code
    except BadInput as error:
        return _say(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _say("the GPU's memory is full: try --offload or a smaller --size", UNEXPECTED)
        if type(error).__name__ in ("DeviceLost", "Apart"):
            return _say(f"{error}; the same command goes on", ranks.AGAIN)
        if type(error).__name__ == "StateTooLarge":
            return _say(str(error), BAD_INPUT)
        traceback.print_exc()
        return _say(f"unexpected {type(error).__name__}, see the lines above", UNEXPECTED)


def _say(message: str, code: int) -> int:
    Console(stderr=True, soft_wrap=True).print(
        f"[red]error:[/red] {escape(message)}", highlight=False
    )
    return code


def _quiet() -> None:
    """Other libraries' notices stay out of the way: our progress and our errors are on stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the command; a terminated run cleans up as an interrupted one does."""
    signal.signal(signal.SIGTERM, _terminate)
    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        Console(stderr=True).print("interrupted: nothing half-written is left")
    sys.exit(code)
