"""torch.compile of a whole transformer: what the graphs compute, and how many there are."""

import threading

import pytest
import torch
from support import ALL, NOW, left_on, wan
from tiny import tiny_wan
from torch._dynamo.utils import counters
from zoo import Pipe, forward, zoo

import dit_accel
from dit_accel import SharedResidual, TokenPruning, TopK

HALF = TokenPruning(keep=0.5, start=1, end=0, first=0, last=None)
SPARSE = {"keep": 0.3}
# (method, options, graphs of one size); hooks that carry an order, and pruning, break the graph
CASES = {
    "all blocks": (TopK(**ALL), {}, 1),
    "few blocks": (TopK(**SPARSE), {}, 1),
    "a state": (SharedResidual(**SPARSE), {}, 1),
    "an order": (TopK(**SPARSE), {"order": "hilbert"}, 5),
    "pruned": (TopK(**SPARSE), {"prune": HALF}, None),
}


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_inductor_computes_what_eager_code_does(case, dynamo):
    method, options, graphs = CASES[case]
    pipe = tiny_wan()
    inner, stock = pipe.transformer, wan(pipe)
    with dit_accel.accelerated(pipe, method, **NOW, **options):
        eager = wan(pipe)
        smaller = wan(pipe, size=64)
    pipe.transformer = torch.compile(inner, backend="inductor")
    dense = wan(pipe)
    assert error(dense, stock) < 1e-5
    dynamo.clear()
    handle = dit_accel.accelerate(pipe, method, **NOW, **options)
    assert error(wan(pipe), eager) < 1e-5
    assert graphs is None or dynamo["stats"]["unique_graphs"] == graphs
    assert error(wan(pipe, size=64), smaller) < 1e-5
    report = handle.report()
    assert all(row["sparse"] for row in report.layers) and not report.unplanned
    handle.restore()
    assert left_on(inner) == [] and error(wan(pipe), dense) < 1e-5


def gradients(model, inner, arguments):
    inner.zero_grad()
    forward(model, arguments).square().sum().backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["sla", "vsa"])
def test_a_compiled_transformer_is_trained(method, backend, dynamo):
    case = zoo()["WanTransformer3DModel"]
    model = case.build().requires_grad_(True)
    handle = dit_accel.accelerate(Pipe(model), method, **NOW)
    wanted = gradients(model, model, case.arguments())
    found = gradients(torch.compile(model, backend=backend), model, case.arguments())
    assert wanted.keys() == found.keys() and len(wanted) > 60
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        off = float((found[name] - gradient).norm())
        assert off < 1e-4 * float(gradient.norm()) + 1e-6 * largest, name
    assert all(row["sparse"] == 2 for row in handle.report().layers)


def test_training_in_one_graph_is_refused_with_its_reason(dynamo):
    case = zoo()["WanTransformer3DModel"]
    model = case.build().requires_grad_(True)
    dit_accel.accelerate(Pipe(model), "sla", **NOW)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True to train"):
        forward(model, case.arguments())


class Breaking(torch.nn.Module):
    """Ends the graph between a processor's begin and its attention."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.norm(x)


@pytest.mark.parametrize("where", ["this thread", "another"])
def test_each_layer_is_told_though_its_graph_ends_before_the_attention(where, dynamo):
    pipe = tiny_wan()
    for block in pipe.transformer.blocks:
        block.attn1.norm_q = Breaking(block.attn1.norm_q)
    handle = dit_accel.accelerate(pipe, SharedResidual(**SPARSE), **NOW)
    eager = wan(pipe, steps=3)
    handle = dit_accel.accelerate(pipe, SharedResidual(**SPARSE), **NOW)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    found = [wan(pipe, steps=3)]
    if where == "another":
        thread = threading.Thread(target=lambda: found.append(wan(pipe, steps=3)))
        thread.start()
        thread.join()
    assert all(error(out, eager) < 1e-5 for out in found)
    assert {row["sparse"] for row in handle.report().layers} == {6 * len(found)}
