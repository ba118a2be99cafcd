"""docs/reference/composition.md says what goes with what; each of its cells is observed here."""

import pytest
import torch
from composition import COLUMNS, FEATURES, PIPES, documented, go, near, observe, options, quiet

import dit_accel

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


def test_everything_at_once():
    together = ("LoRA", "fuse_qkv_projections", "set_attention_backend", "FirstBlockCache")

    def build():
        pipe = PIPES["Wan"]()
        for name in (*together, "model offload"):
            FEATURES[name].switch_on(pipe)
        return pipe

    with quiet():
        reference, pipe = go(build()), build()
        with dit_accel.accelerated(pipe, **options("pruning + topk", all_kept=True)):
            assert near(go(pipe), reference)
        with dit_accel.accelerated(pipe, **options("pruning + topk", all_kept=False)) as handle:
            out = go(pipe)
            assert out.isfinite().all() and torch.equal(go(pipe), out)
            report = handle.report()
        assert not report.unplanned and report.kept < 1
        ran = [layer["sparse"] for layer in report.layers]
        assert ran[0] > ran[1] > 0  # steps that the cache skipped run the first block only
        assert {0 < step["tokens"] < 1 for step in report.steps} == {True, False}
        assert near(go(pipe), reference)
