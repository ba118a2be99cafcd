"""A tiny pipeline, its studio, and a pair that it has made."""

import pytest
from asks import ASK, DEFAULTS, pair_of
from tiny import tiny_wan

from dit_accel.app.studio import Pair, Studio


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan()


@pytest.fixture
def studio(pipe):
    return Studio(lambda name: (pipe, DEFAULTS))


@pytest.fixture(scope="module")
def alone(pipe) -> Pair:
    return pair_of(Studio(lambda name: (pipe, DEFAULTS)), ASK)
