"""Text is written and read in UTF-8, whatever the locale: every call says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("dit_accel", "kernels", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
    if not {"assets", "__pycache__"} & set(path.parts)
)
PLACE = {"read_text": 0, "write_text": 1}  # of the encoding among the arguments


def silent(call: ast.Call) -> bool:
    """Whether a call reads or writes text and leaves the encoding to the locale."""
    if not isinstance(call.func, ast.Attribute):
        return False
    named = any(keyword.arg == "encoding" for keyword in call.keywords)
    if call.func.attr in PLACE:
        return not named and len(call.args) <= PLACE[call.func.attr]
    if call.func.attr == "open" and call.args and isinstance(call.args[0], ast.Constant):
        mode = str(call.args[0].value)
        return set(mode) <= set("rwxa+t") and not named
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_encodings_are_named(path):
    calls = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    ]
    assert [ast.unparse(call) for call in calls if silent(call)] == []
