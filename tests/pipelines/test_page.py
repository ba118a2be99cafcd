"""docs/reference/models.md says what the models do, and its example runs."""

import re

import pytest
from tables import PAGE, render

from dit_accel.pipelines import registry


def test_the_table_is_what_was_observed():
    assert render() in PAGE.read_text(), "run python tests/pipelines/tables.py and look at the diff"


def test_the_example_of_a_model_outside_diffusers_runs(monkeypatch, capsys):
    monkeypatch.setattr(registry, "_EXTRA", {})
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})
    said = capsys.readouterr().out
    assert re.search(r"topk on MyTransformer: (4|6)\d\.\d% .*\n  calls: 2 sparse, 0 dense", said)


def test_what_is_no_adapter_is_refused():
    with pytest.raises(TypeError, match="not dict"):
        registry.register_adapter({})
