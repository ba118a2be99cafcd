"""A tiny pipeline, its studio, and a pair that it has made."""

import pytest
from asks import ASK, pair_of, small_studio
from starlette.testclient import TestClient
from tiny import tiny_wan

from dit_accel.app import server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk
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


@pytest.fixture(scope="module")
def client(pipe, tmp_path_factory):
    desk = Desk(small_studio(pipe), tmp_path_factory.mktemp("jobs"), Limits(models=("a/b",)))
    with TestClient(server.build(desk), base_url="http://127.0.0.1:7860") as found:
        found.desk = desk
        yield found
