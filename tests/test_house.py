"""The house: which room imports which, how large a class or a function may grow."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("dit_accel", "kernels", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
    if not {"assets", "__pycache__"} & set(path.parts)
)


def test_rooms_import_only_from_below(tmp_path):
    """import-linter reads a copy in which `kernels` and `pipelines` are packages."""
    pytest.importorskip("importlinter")
    copy = tmp_path / "dit_accel"
    shutil.copytree(
        ROOT / "dit_accel", copy, ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    for linked in ("kernels", "pipelines"):
        (copy / linked / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tool = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*tool, "--no-cache"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_hall_is_small():
    assert len(list((ROOT / "dit_accel").glob("*.py"))) <= 9


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_classes_and_functions_are_short(path):
    """No class over 200 lines, no host function over 60; kernels are written out."""
    long = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        kernel = any("jit" in ast.unparse(mark) for mark in node.decorator_list)
        most = 200 if isinstance(node, ast.ClassDef) else 60
        lines = node.end_lineno - node.lineno + 1
        if lines > most and not kernel:
            long.append(f"{node.name}: {lines} lines")
    assert not long
