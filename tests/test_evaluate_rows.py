"""The rows of an evaluation: what names, presets and files of weights mean."""

from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.config import AccelConfig
from dit_accel.evaluate.rows import DEFAULT, UNTRAINED, rows
from dit_accel.methods import find
from dit_accel.pruning.criteria import CRITERIA

TEMPLATE = AccelConfig(dit_accel.TopK(), dit_accel.Schedule(warmup=1), min_tokens=0)


def test_the_default_rows_are_the_methods_and_their_controls():
    found = rows(DEFAULT, (0.1, 0.5), 25, TEMPLATE)
    names = [row.name for row in found]
    assert len(set(names)) == len(names)
    assert [row.steps for row in found if row.family == "fewer steps"] == [20, 16, 12, 10, 8]
    assert {f"pruning 50%, {c}" for c in CRITERIA} < set(names)
    by_name = {row.name: row.config.method for row in found}
    assert by_name["rectified 10%"] == dit_accel.Rectified(0.1, gapr=False)
    assert by_name["ditfastattn 50%"] == dit_accel.Rettention(0.5, rescale=False)
    assert all(row.config.schedule == TEMPLATE.schedule for row in found if not row.steps)
    alike = {row.digest for row in found if row.family in ("topk", UNTRAINED)}
    assert len({row.digest for row in found}) == len(found) - len(alike) == len(found) - 2


def test_the_first_keep_is_measured_first_and_the_table_is_in_order():
    found = rows(["prune", "topk", "pooled", "steps"], (0.3, 0.1), 25, TEMPLATE)
    names = [row.name for row in found if row.family == "topk"]
    assert names == ["topk 10%", "topk 30%"]
    first = [row.name for row in sorted(found, key=lambda row: row.rank)]
    assert first[5:9] == ["topk 30%", "pooled 30%", "topk 10%", "pooled 10%"]
    assert all(name.startswith("dense") for name in first[:5])


def test_presets_and_files_are_rows_too(tmp_path):
    path = tmp_path / "mine.json"
    AccelConfig(dit_accel.Pooled(0.3), order="tile").save(path)
    found = rows(["topk:fast", str(path)], (), 25, TEMPLATE)
    assert found[0].config.method == dit_accel.TopK(**dit_accel.TopK.presets["fast"])
    assert found[1].config.order == "tile"


def test_a_preset_file_may_lie_in_a_folder_with_a_plus(tmp_path):
    path = tmp_path / "a+b" / "mine.json"
    path.parent.mkdir()
    AccelConfig(dit_accel.Pooled(0.3)).save(path)
    alone, more = rows([str(path), f"{path}+cache"], (), 25, TEMPLATE)
    assert (alone.name, more.name) == (str(path), f"{path} + cache")
    assert alone.config == more.config and more.boost.step_cache == 0.1


def test_to_these_the_same_may_be_added(tmp_path):
    path = tmp_path / "mine.json"
    schedule = dit_accel.Schedule(head_keep=((0, (0.1, 0.3)),))
    AccelConfig(dit_accel.Pooled(0.2), schedule).save(path)
    found = rows([f"{path}+prune+cache@0.2", "topk:fast+cache"], (), 25, TEMPLATE)
    assert [row.name for row in found] == [f"{path} + prune + cache@0.2", "topk:fast + cache"]
    first, second = found
    assert first.config.schedule == schedule and first.config.method == dit_accel.Pooled(0.2)
    assert first.config.prune.keep == 0.5 and first.boost.step_cache == 0.2
    assert second.boost.step_cache == 0.1 and second.config.prune is None


def test_a_row_in_eight_bits():
    (row,) = rows(["topk-int8"], (0.2,), 25, TEMPLATE)
    assert row.name == "topk-int8 20%" and row.config.method == dit_accel.TopK(
        0.2, precision="int8"
    )
    assert "topk-int8" not in DEFAULT


def test_rows_add_pruning_and_a_step_cache():
    found = rows(["pooled+prune+cache@0.2", "dense+cache", "pooled"], (0.3, 0.1), 25, TEMPLATE)
    assert [row.name for row in found[:3]] == [
        "pooled 10% + prune + cache@0.2", "pooled 30% + prune + cache@0.2", "dense+cache"
    ]  # fmt: skip
    assert found[0].config.prune.keep == 0.5 and found[0].boost.step_cache == 0.2
    assert found[2].config.method == dit_accel.Dense() and found[2].boost.step_cache == 0.1
    assert len({row.digest for row in found}) == 5


def test_a_name_may_tell_the_keep_and_the_selector():
    found = rows(["topk@0.3+cache", "topk/sub@0.1", "pooled/sub+prune"], (0.2, 0.5), 25, TEMPLATE)
    assert [(row.name, row.family) for row in found] == [
        ("topk 30% + cache", "topk+cache"),
        ("topk/sub 10%", "topk/sub"),
        ("pooled/sub 20% + prune", "pooled/sub+prune"),
        ("pooled/sub 50% + prune", "pooled/sub+prune"),
    ]
    assert found[0].config == rows(["topk"], (0.3,), 25, TEMPLATE)[0].config
    assert found[1].config.method == dit_accel.TopK(0.1, select="sub")
    assert found[3].config.method == dit_accel.Pooled(0.5, select="sub")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["magic"], "unknown method 'magic'"),
        ([], "no rows"),
        (["topk+magic"], "adds 'magic'; what can be added is prune, cache@0.1"),
        (["topk+cache@x"], "has 'x' behind an @; write a number, as in cache@0.1"),
        (["topk+prune@0.5"], "gives prune a value; here it takes none"),
        (["topk/magic"], "unknown selector 'magic'"),
        (["topk@2"], "lies in .0, 1., not 2.0"),
        (["dense@0.5+prune"], "dense attention has none to choose"),
    ],
)
def test_rows_that_are_none(names, says):
    with pytest.raises(ValueError, match=says):
        rows(names, (0.5,), 25, TEMPLATE)


def test_learned_weights_are_part_of_a_row(tmp_path):
    path = str(tmp_path / "sla.safetensors")
    digests = set()
    for value in (1.0, 2.0):
        learned = {"layers.0.weight": torch.full((64, 64), value)}
        dit_accel.SLA().with_weights(learned).save(path)
        (row,) = rows([], (0.5,), 4, TEMPLATE, sla=[path])
        digests.add(row.digest)
    assert row.config.method == dit_accel.SLA(0.5, weights=path)
    assert len(digests) == 2


def test_pruning_and_a_step_cache_may_be_added_to_learned_weights(tmp_path):
    path = str(tmp_path / "sla.safetensors")
    dit_accel.SLA().with_weights({"layers.0.weight": torch.ones(64, 64)}).save(path)
    template = replace(TEMPLATE, method=find("shared")())  # which cannot be pruned
    (row,) = rows([], (0.5,), 4, template, sla=[f"{path}+prune+cache@0.2"])
    assert (row.name, row.family) == ("sla 50% + prune + cache@0.2", "sla+prune+cache@0.2")
    assert row.config.prune.keep == 0.5 and row.boost.step_cache == 0.2
    with pytest.raises(ValueError, match="adds 'frob'"):
        rows([], (0.5,), 4, TEMPLATE, sla=[f"{path}+frob"])
