"""The house: which room imports which."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
