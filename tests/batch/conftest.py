"""A tiny pipeline, stock again after each test."""

import forked
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


@pytest.fixture
def forks(monkeypatch):
    """Worker processes are forked from one that knows diffusers: they come at once."""
    forked.starters(monkeypatch.setattr)
