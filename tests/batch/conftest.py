"""A tiny pipeline, stock again after each test."""

import pytest
from tiny import tiny_wan

import dit_accel


@pytest.fixture(scope="module")
def stock():
    return tiny_wan()


@pytest.fixture
def pipe(stock):
    yield stock
    dit_accel.restore(stock)
