"""Copies of an accelerated pipeline: independent, and accelerated as it is."""

import copy
import io
import pickle

import pytest
import torch
from support import NOW, calls, left_on, wan
from tiny import tiny_wan

import dit_accel
from dit_accel import TokenPruning, TopK

METHODS = ("topk", "pooled", "rectified", "rettention", "shared", "sla")
PRUNE = TokenPruning(keep=0.5, start=1, end=0, criterion="ttv*drift", context="stale")


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{}, {"prune": PRUNE}, {"order": "hilbert"}], ids=str)
def test_a_copy_runs_by_itself_and_is_restored_by_itself(how, options):
    pipe = tiny_wan(layers=3)
    stock = wan(pipe, steps=3)
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW, **options)
    twin = COPIES[how](pipe)
    sparse = wan(twin, steps=3)
    assert calls(handle.report()) == 0
    assert torch.equal(wan(pipe, steps=3), sparse) and not torch.equal(sparse, stock)
    handle.restore()
    assert left_on(pipe.transformer) == []
    assert torch.equal(wan(twin, steps=3), sparse)
    dit_accel.restore(twin)
    assert left_on(twin.transformer) == []
    assert torch.equal(wan(twin, steps=3), stock)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_in_the_middle_of_a_generation_starts_anew(method):
    pipe = tiny_wan()
    handle = dit_accel.accelerate(pipe, method, **NOW)
    first = wan(pipe)
    assert torch.equal(wan(copy.deepcopy(pipe)), first)
    assert handle.report().generations == 1


def test_restoring_a_copy_leaves_the_original_alone():
    pipe = tiny_wan()
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    sparse, twin = wan(pipe), copy.deepcopy(pipe)
    dit_accel.restore(twin)
    assert handle.active and torch.equal(wan(pipe), sparse)
    with dit_accel.accelerated(twin, "pooled", **NOW) as other:
        wan(twin)
        assert other.report().method == "pooled" and handle.report().method == "topk"
    assert left_on(twin.transformer) == []


def test_a_copied_transformer_can_be_restored_without_a_pipeline():
    pipe = tiny_wan()
    dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    twin = copy.deepcopy(pipe.transformer)
    dit_accel.restore(twin)
    assert left_on(twin) == [] and left_on(pipe.transformer)


def test_one_of_two_experts_is_copied_without_the_other():
    pipe = tiny_wan(transformer_2=True, boundary_ratio=0.9)
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    seen = {}
    twin = copy.deepcopy(pipe.transformer, seen)
    assert id(pipe.transformer_2) not in seen
    dit_accel.restore(twin)
    wan(pipe, steps=3)
    assert handle.report().layers[-1]["sparse"]


def test_a_copied_block_outside_of_a_forward_is_dense():
    pipe = tiny_wan()
    stock = copy.deepcopy(pipe.transformer.blocks[0].attn1)
    x = torch.randn(1, 192, 128)
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    wan(pipe)
    before = calls(handle.report())
    block = copy.deepcopy(pipe.transformer.blocks[0].attn1)
    assert torch.equal(block(x), stock(x)) and calls(handle.report()) == before


def test_a_shallow_copy_is_refused_while_the_original_is_accelerated():
    pipe = tiny_wan()
    stock = wan(pipe)
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    shallow = copy.copy(pipe)
    shallow.transformer = copy.copy(pipe.transformer)
    for verb in (dit_accel.accelerate, dit_accel.restore):
        with pytest.raises(ValueError, match="shallow copy of an accelerated one .*deepcopy"):
            verb(shallow)
    handle.restore()
    dit_accel.restore(shallow)
    assert left_on(shallow.transformer) == [] and torch.equal(wan(shallow), stock)
