"""Seed, device and marker for every test; kernel tests run in memory poisoned with NaN."""

from pathlib import Path

import pytest
import torch
from interpreter import interpreted

# Triton's own library must be decorated for the interpreter before diffusers imports it.
with interpreted():
    import triton.experimental.gluon.language  # noqa: F401


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def turbowan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny stock model's folder, and a checkpoint that was trained from it."""
    from checkpoint_layouts import saved

    return saved(tmp_path_factory.mktemp("turbowan"))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and a launcher's processes are forked from one that knows diffusers: at once."""
    import forked

    forked.starters(monkeypatch.setattr)


@pytest.fixture
def right_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """e4m3 as a GPU rounds it, in Triton's interpreter."""
    from triton.runtime import interpreter

    from dit_accel.testing import repair_interpreter

    monkeypatch.setattr(interpreter, "_convert_float", interpreter._convert_float)
    repair_interpreter()


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests/kernels, fresh floating-point memory holds NaN: what a kernel forgets shows."""
    if request.node.path.parent.name != "kernels":
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(fn):
    def fresh(*args, **options):
        out = fn(*args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return fresh
