"""The wheel holds the package with its rooms and the embedded model, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    tree = out / "tree"
    for name in filter(None, files):  # a copy of what is committed: links stay links
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.hardlink_to(source) if _same_disk(source, out) else target.write_bytes(
                source.read_bytes()
            )
    command = [sys.executable, "-m", "build", "-q", "--no-isolation", "--outdir", out, tree]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def _same_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


def test_only_our_package_is_installed(names):
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dit_accel"}


@pytest.mark.parametrize("room", ["kernels", "pipelines"])
def test_linked_rooms_are_whole(names, room):
    here = {f"dit_accel/{p.relative_to(ROOT)}" for p in (ROOT / room).rglob("*.py")}
    assert here and here <= names
    assert not (ROOT / room / "__init__.py").exists(), "it would shadow another package"


def test_the_embedded_model_ships_and_its_training_does_not(names):
    assert "dit_accel/assets/emoji/model_index.json" in names
    assert "dit_accel/assets/emoji-sla/lora/pytorch_lora_weights.safetensors" in names
    assert not any("assets/training" in name for name in names)
    assert "dit_accel/cli/main.py" in names


def test_pages_ship(names):
    kinds = ("*.html", "*.css", "*.js", "pages/*.svg")
    here = {p for kind in kinds for p in (ROOT / "dit_accel").rglob(kind)}
    assert {str(p.relative_to(ROOT)) for p in here} <= names and here


def test_links_are_committed_as_links():
    for link in ("kernels", "pipelines", "assets"):
        assert (ROOT / "dit_accel" / link).is_symlink()
