"""A tiny model in a folder, and a place to write that is empty."""

import pytest
from tiny import saved_tiny_wan

GENERATION = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "fps": 8}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(saved_tiny_wan(tmp_path_factory.mktemp("wan") / "wan", GENERATION))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, and in it the work is done."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
