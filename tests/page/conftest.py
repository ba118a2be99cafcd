"""The real page in headless Chromium: `make test-browser`. Needs chromium, its driver, selenium.

A tiny random model stands behind it, so that a generation takes a second. Most of it is tested at
the width of a desktop and of a phone.
"""

import pytest
import torch
from asks import DEFAULTS
from browser import DESKTOP, PHONE, Tab, served
from tiny import tiny_wan
from visits import LONG, fresh, quiet

from dit_accel.app import server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk
from dit_accel.app.studio import Studio


@pytest.fixture(scope="session")
def pipe():
    torch.set_num_threads(1)
    return tiny_wan()


@pytest.fixture(scope="session")
def desk(pipe, tmp_path_factory):
    limits = Limits(steps=LONG, places=2, queue=3)
    studio = Studio(lambda name: (pipe, DEFAULTS))
    studio.warm()
    return Desk(studio, tmp_path_factory.mktemp("jobs"), limits, grace=2)


@pytest.fixture(scope="session")
def url(desk):
    with served(server.build(desk)) as address:
        yield address


@pytest.fixture(scope="session")
def browsers(url, tmp_path_factory):
    """One browser for each width: starting one takes longer than most tests."""
    found = {s: Tab(url, tmp_path_factory.mktemp("profile"), s) for s in (DESKTOP, PHONE)}
    yield found
    for tab in found.values():
        tab.close()


@pytest.fixture
def page(browsers):
    yield fresh(browsers[DESKTOP])
    quiet(browsers[DESKTOP])


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def any_page(browsers, request):
    yield fresh(browsers[request.param])
    quiet(browsers[request.param])
