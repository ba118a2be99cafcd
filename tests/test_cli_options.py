"""The options of all commands: the promised ones stay, groups, many words, one description each."""

import json
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.markup import escape
from typer.main import get_command

from dit_accel.cli import main as cli
from dit_accel.cli.command import Several, grouped
from dit_accel.cli.options import option
from dit_accel.generation.options import Clips, How, What, Where, described

# Command → option → default. What is here may be in use; what is new need not be added.
PROMISED = json.loads(Path(__file__).with_name("options.json").read_text())
COMMANDS = get_command(cli.app).commands


def names(command) -> dict[str, object]:
    """Name → parameter of typer."""
    return {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("name", PROMISED)
def test_options_and_defaults_stay(name):
    found = names(COMMANDS[name])
    assert {n: str(found[n].default) for n in PROMISED[name] if n in found} == PROMISED[name]


def test_an_option_is_described_in_the_same_words_everywhere():
    said = defaultdict(set)
    for name in ("generate", "compare", "evaluate", "tune", "doctor", "batch"):
        for option_name, parameter in names(COMMANDS[name]).items():
            said[option_name].add(parameter.help)
    own = {"--output", "-o", "--seed", "--compile", "--json", "--keeps"}
    assert {n: texts for n, texts in said.items() if len(texts) > 1 and n not in own} == {}


def test_help_names_what_can_be_chosen():
    from dit_accel.bench import OPS, SHAPES
    from dit_accel.bench.models import MODELS
    from dit_accel.bench.patterns import PATTERNS
    from dit_accel.finetune.config import OBJECTIVES, PRECISIONS, TRAIN
    from dit_accel.forward.order import ORDERS

    choices = {
        ("bench", "--op"): OPS,
        ("bench", "--shape"): SHAPES,
        ("bench", "--model"): MODELS,
        ("bench", "--pattern"): PATTERNS,
        ("finetune", "--train"): TRAIN,
        ("finetune", "--objective"): OBJECTIVES,
        ("finetune", "--precision"): PRECISIONS,
        ("generate", "--order"): ORDERS,
    }
    for (command, name), known in choices.items():
        said = names(COMMANDS[command])[name].help
        assert [choice for choice in known if choice not in said] == []


@pytest.mark.parametrize("group", [What, How, Where, Clips])
def test_every_option_of_a_run_is_described_and_shown_as_it_is(group):
    said = described(group)
    assert list(said) == [field.name for field in fields(group)]
    shown = {p.name: p.help for name in ("generate", "tune") for p in COMMANDS[name].params}
    assert {name: escape(option.text) for name, option in said.items()}.items() <= shown.items()


@dataclass(frozen=True)
class Colours:
    red: Annotated[int, option("Red.", "Colours")] = 1
    blue: Annotated[list[str] | None, option("Blue.", "Colours")] = None


def test_a_group_is_taken_apart_and_made_again():
    seen = []

    def paint(wall: Annotated[str, typer.Argument()], *, colours: Colours, dry: bool = False):
        """Paint."""
        seen.append((wall, colours, dry))

    app = typer.Typer()
    app.command(cls=Several)(grouped(paint))
    for words in (["a"], ["--red", "3", "b", "--dry"], ["c", "--blue", "x", "y", "--blue", "z"]):
        get_command(app).main(words, standalone_mode=False)
    assert [wall for wall, *_ in seen] == ["a", "b", "c"]
    assert [colours.red for _, colours, _ in seen] == [1, 3, 1]
    assert [bool(dry) for *_, dry in seen] == [False, True, False]
    assert list(seen[2][1].blue) == ["x", "y", "z"] and not seen[0][1].blue
    with pytest.raises(ValueError, match="duplicate parameter name: 'red'"):
        grouped(_twice)


def _twice(colours: Colours, red: int = 0) -> None:
    """Two options of one name."""
