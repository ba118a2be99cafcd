"""docs/reference/models.md says what the models do, and its example runs."""

import re
import warnings

import pytest
import shared
import torch
from tables import HEAD, PAGE, graphs, kinds, render, repeats, row, written
from zoo import zoo

from dit_accel.pipelines import registry

ZOO, SEE = zoo(), "run python tests/pipelines/tables.py and look at the diff"
ULYSSES = HEAD.index("Ulysses")


@pytest.mark.parametrize("name", ZOO)
def test_a_row_is_what_was_observed(name):
    on_page = written()[name]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert row(ZOO[name], on_page[ULYSSES]) == on_page, SEE
        # its graphs are those of row()
        if repeats(name) and graphs(name, True) > kinds(name):
            assert graphs(name, True) <= graphs(name, False)


def test_what_two_processes_gave_is_what_was_observed():
    ulysses = {name: cells[ULYSSES] for name, cells in written().items()}
    assert ulysses == {name: shared.observed().get(name, "no") for name in ZOO}, SEE


def test_the_rest_of_the_page_follows():
    assert render(written().values()) in PAGE.read_text(), SEE


def test_the_example_of_a_model_outside_diffusers_runs(monkeypatch, capsys):
    monkeypatch.setattr(registry, "_EXTRA", {})
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})
    said = capsys.readouterr().out
    assert re.search(r"topk on MyTransformer: (4|6)\d\.\d% .*\n  calls: 2 sparse, 0 dense", said)


def test_what_is_no_adapter_is_refused():
    with pytest.raises(TypeError, match="not dict"):
        registry.register_adapter({})
