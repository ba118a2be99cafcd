"""The pages that describe the house: every room is on its floor, and what they name exists."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["CONTRIBUTING.md", "docs/understand/architecture.md"]


def floors() -> list[set[str]]:
    """The rooms of each floor, as import-linter is told."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = [rule["layers"] for rule in rules["contracts"] if rule["type"] == "layers"]
    return [set(layer.split(" | ")) for layer in layers]


def rows(page: str) -> list[list[str]]:
    """Cells of the rows of the table of floors."""
    lines = (ROOT / page).read_text().split("\n")
    return [line[1:-1].split("|") for line in lines if re.match(r"\| \d+ \|", line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_room_is_on_its_floor(page):
    found = [set() for _ in floors()]
    for floor, rooms, *_ in rows(page):
        names = re.findall(r"`(\w+)(?:/|\.py)`", rooms)
        found[int(floor) - 1] |= set(names)
    assert found == floors()


def test_the_modules_that_are_named_exist():
    for _, rooms, _, modules in rows("docs/understand/architecture.md"):
        room = re.search(r"`(\w+)/`", rooms)
        for name in re.findall(r"`(\w+)`", modules) if room else ():
            folder = ROOT / "dit_accel" / room[1]
            assert list(folder.glob(f"{name}.py")) or list(folder.glob(f"*/{name}.py")), (
                room,
                name,
            )
