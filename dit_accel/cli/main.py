"""The command `dit-accel`. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

from dit_accel import __version__
from dit_accel.cli.app import page
from dit_accel.cli.batch import batch
from dit_accel.cli.bench import bench
from dit_accel.cli.command import Plain, Several, grouped
from dit_accel.cli.compare import compare
from dit_accel.cli.convert import convert
from dit_accel.cli.doctor import doctor
from dit_accel.cli.evaluate import evaluate
from dit_accel.cli.finetune import finetune
from dit_accel.cli.generate import generate
from dit_accel.cli.methods import branches, methods, selectors
from dit_accel.cli.profile import profile
from dit_accel.cli.screen import print_anything, screen
from dit_accel.cli.show import show
from dit_accel.cli.tune import tune
from dit_accel.parallel import launcher

OK, UNEXPECTED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# What a system says of names and rights: the user's to mend.
_MENDED = {getattr(errno, name) for name in ("ENOENT", "EACCES", "EPERM", "EROFS", "ENOTDIR")}
_MENDED |= {errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
# Typer carries its own copy of click in some versions: its usage error is reached through it.
UsageError: Any = typer.BadParameter.__base__

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


_MAKE = (generate, compare, batch, evaluate, tune, profile, doctor, convert)
for command in (*_MAKE, methods, selectors, branches, show):
    app.command(cls=Plain)(grouped(command))
app.command(cls=Several)(grouped(bench))
app.command("app", cls=Plain)(grouped(page))
app.command(cls=Plain)(grouped(finetune))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; the exit code: 0 well, 2 bad input, 130 Ctrl-C, 1 anything else."""
    _quiet()
    try:
        return app(list(arguments), prog_name="dit-accel", standalone_mode=False) or OK
    except UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "dit-accel"
        return _say(f"{error.format_message().rstrip('.')} (see {where} --help)", BAD_INPUT)
    except launcher.Wanted as wanted:
        code = launcher.launch(wanted.count, arguments)
        while code == launcher.AGAIN:  # a batch counts the tries of each job
            code = launcher.launch(wanted.count, arguments)
        return code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Say what went wrong; an exception of ours brings its `exit_code`."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        again = "; the same command goes on" if code == launcher.AGAIN else ""
        return _say(f"{error}{again}", code)
    if _is_out_of_memory(error):
        return _say(
            "the memory is full: try --offload, --offload blocks or a smaller --size", UNEXPECTED
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror}", BAD_INPUT if error.errno in _MENDED else UNEXPECTED)
    traceback.print_exc()
    return _say(f"unexpected {type(error).__name__}, see the lines above", UNEXPECTED)


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from dit_accel.machine import is_out_of_memory

    return is_out_of_memory(error)


def _say(message: str, code: int) -> int:
    screen(stderr=True).print(Text.assemble(("error:", "red"), f" {message}"))
    return code


def _quiet() -> None:
    """Other libraries' notices stay out of the way: our progress and our errors are on stderr."""
    print_anything()
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
        screen(stderr=True).print("interrupted: nothing half-written is left")
    sys.exit(code)
