"""A tiny pipeline, its studio, and a pair that it has made."""

import pytest
from asks import ASK, pair_of, small_studio
from tiny import tiny_wan

from dit_accel.app.studio import Pair


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan()


@pytest.fixture
def studio(pipe):
    return small_studio(pipe)


@pytest.fixture(scope="module")
def alone(pipe) -> Pair:
    return pair_of(small_studio(pipe), ASK)
