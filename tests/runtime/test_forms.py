"""Every documented form of an argument is read; what is remembered of a tensor follows it."""

import ast
from pathlib import Path

import pytest
import torch
from support import ALL, NOW
from zoo import Pipe, forward, zoo

import dit_accel
from dit_accel import TopK
from dit_accel.pipelines.grids import grid_of_ids, once, sizes_of

ROOT = Path(dit_accel.__file__).parents[1]
SIZE = (1, 16, 16)
FORMS = {
    "QwenImageTransformer2DModel": (SIZE, [SIZE], [[SIZE]]),
    "NucleusMoEImageTransformer2DModel": (SIZE, [SIZE], [[SIZE]]),
}


KINDS = ("Tensor", "Near", "BlockTable", "Canvas")


@pytest.mark.parametrize(("name", "form"), [(n, form) for n in FORMS for form in FORMS[n]], ids=str)
def test_shapes_in_every_form(name, form):
    case = zoo()[name]
    model = case.build()
    arguments = {**case.arguments(), "img_shapes": form}
    with torch.no_grad():
        stock = forward(model, arguments)
        with dit_accel.accelerated(Pipe(model), TopK(**ALL), **NOW) as handle:
            out = forward(model, arguments)
        assert handle.clock.geometry.grid == case.grid and not handle.report().fallbacks
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4 * float(stock.abs().max()))


def test_references_behind_the_image():
    assert sizes_of([[(1, 4, 4), (1, 2, 2)]] * 2) == [(1, 4, 4), (1, 2, 2)]


@pytest.mark.parametrize("batched", [False, True])
def test_ids_of_a_batch_are_ids_of_a_sample(batched):
    name = "FluxTransformer2DModel"
    case = zoo()[name]
    model, arguments = case.build(), case.arguments()
    for ids in ("img_ids", "txt_ids"):
        arguments[ids] = arguments[ids][None] if batched else arguments[ids]
    with torch.no_grad(), dit_accel.accelerated(Pipe(model), TopK(**ALL), **NOW) as handle:
        forward(model, arguments)
    assert handle.clock.geometry.grid == case.grid


def test_what_is_remembered_of_a_tensor_is_dropped_when_it_is_written_to():
    ids = torch.zeros(12, 3)
    ids[:, 1], ids[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    assert grid_of_ids(ids) == (1, 3, 4)
    ids[:, 1], ids[:, 2] = torch.arange(12) // 6, torch.arange(12) % 6
    assert grid_of_ids(ids) == (1, 2, 6)
    assert "accel" not in str(vars(ids))


def test_what_is_remembered_of_two_tensors_is_of_these_two():
    def total(a, b):
        seen.append(1)
        return int(a.sum() + b.sum())

    seen, a, b = [], torch.ones(2), torch.ones(3)
    assert [once(total, a, b), once(total, a, b), once(total, a, torch.zeros(3))] == [5, 5, 2]
    assert len(seen) == 2
    with torch.inference_mode():
        assert once(total, torch.ones(2), b) == 5


def test_no_function_caches_tensors_as_they_are_made():
    """A tensor that inference mode made cannot be trained with: cached_tensors sees to it."""
    found = []
    for folder in ("dit_accel", "kernels", "pipelines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "assets" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.FunctionDef) or node.returns is None:
                    continue
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                cached = any("cache" in mark and "property" not in mark for mark in marks)
                safe = any("cached_tensors" in mark for mark in marks)
                returns = ast.unparse(node.returns)
                of_tensors = any(w in returns for w in KINDS)
                if cached and of_tensors and not safe and "Callable" not in returns:
                    found.append(f"{path.name}:{node.name}")
    assert found == []
