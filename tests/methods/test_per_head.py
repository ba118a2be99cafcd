"""A selector for each head, from a profile."""

from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.app.ask import Ask, BadField, Limits
from dit_accel.evaluate.profile import check_tried
from dit_accel.evaluate.rows import rows
from dit_accel.generation.options import How, What
from dit_accel.methods import Call, find, selectors
from dit_accel.methods.budget import Profile
from dit_accel.methods.topk import TopK

GRID = (5, 8, 8)
# head → the selector that errs least at keep 0.2; head 1 changes its mind at 0.6
BEST = ["sub", "nearest", "valued", "sub"]


def saved(path, best=BEST, layers=2):
    names = sorted(set(best)) + ["means"]
    heads = {
        name: {
            str(layer): [
                {"0.2": 0.1 if name == own else 0.5, "0.6": 0.3 if name == own else 0.4}
                for own in best
            ]
            for layer in range(layers)
        }
        for name in names
    }
    if "nearest" in best:
        heads["means"]["0"][best.index("nearest")]["0.6"] = 0.01
    Profile("topk", heads, {}, {}).save(path)
    return str(path)


def qkv():
    return [2 * torch.randn(1, 4, 320, 16) for _ in range(3)]


def masks(text, q, k, v, call, **options):
    method = TopK(0.4, block_q=64, select=text)
    return method.chosen(q, k, call, v, **options)[0].to_mask()


def test_each_head_has_its_selectors_rows(tmp_path):
    text = f"per-head({saved(tmp_path / 'p.json')})"
    q, k, v = qkv()
    forced = torch.zeros(5, dtype=torch.bool)
    forced[2] = True
    call = Call(0.2, grid=GRID, forced=forced, n_forced=1)
    found = masks(text, q, k, v, call)
    for head, name in enumerate(BEST):
        assert torch.equal(found[:, head], masks(name, q, k, v, call)[:, head])
    assert not torch.equal(found, masks("sub", q, k, v, call))
    shares = (0.2, 0.6, 0.2, 0.4)
    some = masks(text, q, k, v, replace(call, keep=shares))
    own = ["sub", "means", "valued", "sub"]
    for head, name in enumerate(own):
        alone = masks(name, q, k, v, replace(call, keep=shares))
        assert torch.equal(some[:, head], alone[:, head])
    tables = (TopK(0.4, block_q=64, select=text).chosen(q, k, x, v)[0]
              for x in (call, replace(call, keep=shares)))  # fmt: skip
    assert [table.uneven for table in tables] == [False, True]
    part = replace(call, heads=(2, 3))  # a process's own heads
    assert torch.equal(masks(text, q[:, 2:], k[:, 2:], v[:, 2:], part), found[:, 2:])


@pytest.mark.parametrize("name", ["topk", "pooled", "rectified", "shared", "sla"])
def test_one_for_all_is_that_selector(name, tmp_path):
    q, k, v = qkv()
    text = f"per-head({saved(tmp_path / 'p.json', ['sub'] * 4)})"
    call = Call(0.4, grid=GRID)
    outs = [find(name)(0.4, select=x)(q, k, v, replace(call, state={})) for x in (text, "sub")]
    assert torch.equal(*outs)
    mixed = f"per-head({saved(tmp_path / 'q.json')})"
    assert find(name)(0.4, select=mixed)(q, k, v, call).isfinite().all()


def test_a_profile_of_another_model_is_refused(tmp_path):
    text, (q, k, v) = f"per-head({saved(tmp_path / 'p.json')})", qkv()
    with pytest.raises(ValueError, match="nothing of head 0 in layer 7: profile this model"):
        masks(text, q, k, v, Call(0.2, grid=GRID, layer=7))
    with pytest.raises(ValueError, match="selector per-head needs profile.json"):
        TopK(select="per-head")
    with pytest.raises(ValueError, match="nowhere.json"):
        TopK(select="per-head(nowhere.json)")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="Profile needs"):
        TopK(select=f"per-head({tmp_path / 'other.json'})")


def test_its_text_goes_everywhere(tmp_path):
    path = saved(tmp_path / "p.json")
    text = f"per-head({path})"
    method = dit_accel.config.named(f"pooled/{text}@0.1")
    assert str(method.select) == text and method.keep == 0.1 and method.select.placed
    config = dit_accel.AccelConfig(method)
    assert dit_accel.AccelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="cannot run on pruned ones"):
        dit_accel.AccelConfig(method, prune=dit_accel.TokenPruning())
    (row,) = rows([f"topk/{text}@0.1"], [0.2], 4, config)
    before = row.digest
    saved(tmp_path / "p.json", ["sub"] * 4)
    assert row.digest != before  # the file is part of what runs


def test_a_preset_finds_the_profile_beside_it(tmp_path):
    (old := tmp_path / "old").mkdir()
    method = TopK(0.2, select=f"per-head({saved(old / 'p.json')})")
    dit_accel.AccelConfig(method).save(old / "preset.json")
    old.rename(new := tmp_path / "new")
    found = dit_accel.config.resolve(new / "preset.json").method
    assert str(found.select) == f"per-head({new / 'p.json'})"
    (new / "p.json").unlink()
    with pytest.raises(ValueError, match="preset.json: .*p.json"):
        dit_accel.config.resolve(new / "preset.json")


def test_strangers_name_no_file(tmp_path):
    how = How("topk", select=f"per-head({tmp_path / 'secret'})")
    with pytest.raises(BadField, match="This page is public: name no file"):
        Ask(What("a cat"), right=how, limits=Limits.for_public())
    with pytest.raises(BadField, match="secret"):
        Ask(What("a cat"), right=how)
    assert selectors.opens_a_file("sub & per-head(x)") and not selectors.opens_a_file("sub(8)")


def test_the_best_of_each_head_errs_least(tmp_path):
    profile = Profile.load(saved(tmp_path / "p.json"))
    best = profile.curves(f"per-head({tmp_path / 'p.json'})")
    assert best[0, 0] == {0.2: 0.1, 0.6: 0.3} and best[0, 1] == {0.2: 0.1, 0.6: 0.01}
    for name in profile.heads:
        assert profile.gain(0.4, "per-head")[0] <= profile.gain(0.4, name)[0]


def test_a_profile_tries_what_can_be_compared():
    assert check_tried(["sub", "slash(8)", "sub(4)"]) == ["sub", "slash"]
    for name in ("window(t=1)", "sub & nearest"):
        with pytest.raises(ValueError, match="reads more than keep says"):
            check_tried([name])
