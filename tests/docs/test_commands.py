"""Every command that a page shows is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from dit_accel.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
COMMANDS = typer.main.get_command(app).commands


def shown(page: Path) -> list[list[str]]:
    """The words of each `dit-accel` command in a page's blocks of code and marks of code."""
    text = page.read_text().replace("\\\n", "")
    module = r"(?:python|accelerate launch .*?) -m dit_accel\.(bench|batch|finetune)\b"
    text = re.sub(module, r"dit-accel \1", text)
    lines = re.findall(r"(?m)^\s*(?:\$ )?(dit-accel .*)$", text)
    lines += [" ".join(code.split()) for code in re.findall(r"`(dit-accel [^`]*)`", text)]
    found = [shlex.split(line, comments=True)[1:] for line in lines]
    return [words for words in found if "…" not in words]


def refusal(words: list[str]) -> str:
    """Why they are not taken, or ""; a prompt or a folder that prose leaves out is not missed."""
    name, *rest = words
    if name not in COMMANDS:
        return f"no command {name}"
    try:
        COMMANDS[name].make_context(name, rest, resilient_parsing=False)
    except typer.BadParameter.__base__ as error:  # of click, which typer may carry a copy of
        missing = type(error).__name__ == "MissingParameter" and len(rest) < 3
        return "" if missing else error.format_message()
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_taken(page):
    assert {" ".join(w): why for w in shown(page) if (why := refusal(w))} == {}


def test_most_commands_are_shown_and_a_wrong_one_is_noticed():
    everywhere = {words[0] for page in PAGES for words in shown(page)}
    assert everywhere >= {"generate", "compare", "batch", "evaluate", "tune", "doctor", "bench"}
    assert refusal(["compare", "a cat", "--kep", "0.5"]).startswith("No such option")
