"""docs/composition.md says what goes with what; each of its cells is observed here."""

import pytest
from composition import COLUMNS, FEATURES, PIPES, documented, observe

EVERY = [(model, name, column) for model in PIPES for name in FEATURES for column in COLUMNS]
QUICK = {("Wan", "shared"), ("Wan", "pruning + topk"), ("Flux", "pruning + topk")}


def slow(model, name, column):
    marks = [] if (model, column) in QUICK else [pytest.mark.slow]
    return pytest.param(model, name, column, marks=marks, id=f"{model}-{name}-{column}")


@pytest.mark.parametrize(("model", "name", "column"), [slow(*cell) for cell in EVERY])
def test_the_page_says_what_is_observed(model, name, column):
    assert observe(model, name, column) == documented()[model, name, column]


def test_the_page_has_every_cell():
    assert sorted(documented()) == sorted(EVERY)
