"""Token pruning in every model that names a span: its rows and its text; the step cache."""

import inspect

import pytest
import torch
from zoo import Pipe, forward, image_ids, x, zoo

import dit_accel
from dit_accel import Dense, Schedule, TokenPruning
from dit_accel.pipelines import registry
from dit_accel.runtime import first_block

ZOO = {name: case for name, case in zoo().items() if registry.find(case.build()).span}
NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}
SPAN = {"start": 1, "end": 0, "refresh": 10, "first": 0, "last": None, "criterion": "stratified"}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=ZOO, scope="module")
def model(request):
    """(case, model, its output)."""
    case = ZOO[request.param]
    with torch.no_grad():
        built = case.build()
        return case, built, forward(built, case.arguments())


def steps(case, built, *seeds, method=None, **options):
    """The outputs of a run with these inputs, and the report."""
    pipe, seed = Pipe(built, steps=len(seeds)), iter(seeds)
    prune = TokenPruning(**{**SPAN, **options})
    with dit_accel.accelerated(pipe, method or Dense(), prune=prune, **NOW) as handle:
        out = pipe.steps(lambda: case.arguments(next(seed)))
        return out, handle.report()


def test_where_nothing_changed_a_pruned_step_is_a_full_one(model):
    """With the keys of the step before, which had the same input, the tokens that run must come out
    as ever: each with its own position, modulation and mask, among all others and the text."""
    case, built, stock = model
    out, report = steps(case, built, 0, 0, 0, keep=0.5, context="stale", block=16)
    assert [step["tokens"] < 1 for step in report.steps] == [False, True, True]
    for one in out:
        torch.testing.assert_close(one, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))


def test_the_rows_of_tokens_that_run_are_those_of_the_full_step(model):
    """Positions, modulation and masks: each argument that a block of the span is handed."""
    case, built, _ = model
    site, seen, hooks, known = registry.find(built).span, [], [], set()
    names = dict.fromkeys(name for name, _, _ in site.rows)
    for blocks in site.lists(built):
        for block in blocks:
            forward_of = inspect.signature(type(block).forward)
            known |= set(forward_of.parameters)

            def spy(module, args, kwargs, forward_of=forward_of):
                given = forward_of.bind(module, *args, **kwargs).arguments
                found = [leaf for name in names for leaf in tensors(given, name, site.rows)]
                tokens = given[site.hidden].transpose(0, 1 - site.tokens_first)
                seen.append((found, tokens.shape[0]))

            hooks.append(block.register_forward_pre_hook(spy, with_kwargs=True))
    prune = TokenPruning(**{**SPAN, "keep": 0.5, "block": 16})
    pipe = Pipe(built, steps=2)
    with dit_accel.accelerated(pipe, Dense(), prune=prune, **NOW) as handle:
        pipe.steps(case.arguments)
        span = handle.spans[0]
        index, text_first = span.selection.index, span.clock.geometry.text_first
        n = next(iter(span.memory.values())).residual.shape[1]
    for hook in hooks:
        hook.remove()
    assert 0 < len(index) < n and len(seen) % 2 == 0
    half = len(seen) // 2
    for (full, before), (part, after) in zip(seen[:half], seen[half:], strict=True):
        assert after == before - n + len(index)
        for (whole, dims), (rows, _) in zip(full, part, strict=True):
            for dim in dims:
                text = torch.arange(whole.shape[dim] - n)
                ran = [text, index + len(text)] if text_first else [index, n + text]
                whole = whole.index_select(dim, torch.cat(ran))
            assert torch.equal(rows, whole)
    assert not site.rows or seen[0][0]
    assert {name.partition(".")[0] for name, _, _ in site.rows} <= known


def tensors(given, name, rows):
    """(tensor, dims) of each tensor behind an argument with rows per token."""
    argument, _, part = name.partition(".")
    value = given.get(argument)
    if part and value is not None:
        value = value.get(part) if isinstance(value, dict) else value[int(part)]
    found = []
    for leaf in unrolled(value):
        if torch.is_tensor(leaf):
            dims = [dim for other, dim, rank in rows if other == name and leaf.ndim == rank]
            found.append((leaf, [dim for dim in dims if leaf.shape[dim] > 1]))
    return [(leaf, dims) for leaf, dims in found if dims]


def unrolled(value):
    """The values in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in unrolled(part)]
    return [value]


@pytest.mark.parametrize("context", ["drop", "pooled", "stale"])
def test_pruned_steps_with_new_input_are_near_and_not_equal(model, context):
    case, built, stock = model
    out, report = steps(case, built, 1, 0, keep=0.5, context=context, method=dit_accel.TopK(0.5))
    assert torch.isfinite(out[-1]).all() and not torch.equal(out[-1], stock)
    assert report.steps[-1]["tokens"] < 1 and not report.unplanned


@pytest.mark.parametrize("criterion", ["ttv*drift", "velocity", "similarity", "text"])
def test_criteria_find_what_they_measure(model, criterion):
    case, built, _ = model
    if criterion == "text" and not registry.find(built).span.joint:
        with pytest.raises(ValueError, match=f"{case.name} reads its text apart"):
            steps(case, built, 0, first=1, criterion=criterion)
        return
    out, report = steps(case, built, 2, 1, 0, keep=0.5, first=1, criterion=criterion)
    assert torch.isfinite(out[-1]).all()
    assert [step["tokens"] < 1 for step in report.steps] == [False, True, True]


def test_all_tokens_each_step_is_bit_equal_and_restore_exact(model):
    case, built, stock = model
    out, _ = steps(case, built, 1, 0, keep=0.5, refresh=1)
    dense, _ = steps(case, built, 1, 0, keep=1.0)
    assert torch.equal(out[-1], dense[-1])
    if not case.mask.endswith("N × N mask"):
        assert torch.equal(out[-1], stock)
    assert torch.equal(forward(built, case.arguments()), stock)
    lists = [m for m in built.modules() if isinstance(m, torch.nn.ModuleList)]
    assert all("_accel_taken" not in m.__dict__ and m.__class__.__iter__ for m in lists)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "CogVideoXTransformer3DModel"])
@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_first_frames_always_run_in_any_order(name, order):
    """Tokens come permuted through the one model and as they are through the other."""
    case = ZOO[name]
    options = {"keep": 0.4, "anchor_frames": 1, "block": 16, "criterion": "random"}
    prune, pipe = TokenPruning(**{**SPAN, **options}), Pipe(case.build(), steps=2)
    with dit_accel.accelerated(pipe, Dense(), prune=prune, order=order, **NOW) as handle:
        pipe.steps(case.arguments)
        index, tokens = handle.spans[0].selection.index, handle._engine.order
        cells = tokens.index[index] if tokens.carried and tokens.index is not None else index
    assert set(range(64)) <= set(cells.tolist()) and len(cells) < 192


# what these add between their blocks is that of the step at hand in a span, else of the last one
BETWEEN = (
    "WanVACETransformer3DModel",
    "WanAnimateTransformer3DModel",
    "ConsisIDTransformer3DModel",
)


def test_without_a_token_it_is_first_block_cache(model):
    """Of all streams that blocks hand on, in lists of one row or of two."""
    case, built, _ = model
    if case.name in BETWEEN:
        return
    pipe, seed = Pipe(built, steps=2), iter((1, 0))
    with first_block.cached(pipe, [built], 1e9):
        cached = pipe.steps(lambda: case.arguments(next(seed)))
        assert not first_block.of(built).computes
    out, _ = steps(case, built, 1, 0, keep=0.0, first=1)
    torch.testing.assert_close(out[-1], cached[-1], rtol=1e-4, atol=1e-4)


def test_where_nothing_changed_a_step_that_a_cache_skips_is_a_whole_one(model):
    case, built, stock = model
    pipe, ran = Pipe(built, steps=2), []
    blocks = [block for found in registry.find(built).span.lists(built) for block in found]
    for block in blocks:
        ran.append(block.register_forward_pre_hook(lambda *_: calls.append(1)))
    calls = []
    with first_block.cached(pipe, [built], 0.1):
        out = pipe.steps(case.arguments)
    for hook in ran:
        hook.remove()
    assert len(calls) == len(blocks) + 1
    for one in out:
        torch.testing.assert_close(one, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))


@pytest.mark.parametrize(
    ("name", "residuals"),
    [
        ("ChromaTransformer2DModel", ("controlnet_block_samples", [(1, 256, 128)])),
        ("ChromaTransformer2DModel", ("controlnet_single_block_samples", [(1, 256, 128)])),
        ("FluxTransformer2DModel", ("controlnet_block_samples", [(1, 256, 128)])),
        ("FluxTransformer2DModel", ("controlnet_single_block_samples", [(1, 256, 128)])),
        ("BriaTransformer2DModel", ("controlnet_block_samples", [(1, 256, 128)])),
        ("QwenImageTransformer2DModel", ("controlnet_block_samples", [(2, 256, 128)] * 2)),
        ("SD3Transformer2DModel", ("block_controlnet_hidden_states", [(2, 256, 128)])),
        ("ZImageTransformer2DModel", ("controlnet_block_samples", {0: (2, 320, 128)})),
    ],
)
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_controlnet_residuals_reach_each_token(name, residuals, keep):
    """They are added to all tokens between blocks, where those that run lie among the others."""
    case, (argument, shapes) = ZOO[name], residuals
    built = case.build()
    torch.manual_seed(3)
    if isinstance(shapes, dict):
        samples = {number: torch.randn(shape) for number, shape in shapes.items()}
    else:
        samples = [torch.randn(shape) for shape in shapes]
    prune = TokenPruning(**{**SPAN, "keep": keep, "context": "stale", "block": 16})
    pipe = Pipe(built, steps=2)

    def arguments():
        return {**case.arguments(), argument: samples}

    stock = forward(built, arguments())
    assert not torch.allclose(stock, forward(built, case.arguments()), atol=1e-3)
    with dit_accel.accelerated(pipe, Dense(), prune=prune, **NOW) as handle:
        for out in pipe.steps(arguments):
            torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))
        assert handle.report().steps[-1]["tokens"] < 1


@pytest.mark.parametrize(
    "name",
    [
        "LTX2VideoTransformer3DModel",
        "WanVACETransformer3DModel",
        "Flux2Transformer2DModel",
        "QwenImage21Transformer2DModel",
        "ErnieImageTransformer2DModel",
    ],
)
def test_pruned_steps_share_their_graphs(name):
    """Regional compile breaks no graph and makes none anew for the second pruned step, be there
    sound, hints, single rows, several calls or tokens first."""
    case, compiled, after = ZOO[name], [], []
    built = case.build()
    stock = forward(built, case.arguments())

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    built.compile_repeated_blocks(fullgraph=True, backend=count)
    options = {**SPAN, "keep": 0.5, "context": "stale", "block": 16}
    pipe, method = Pipe(built, steps=3), dit_accel.TopK(0.999)
    with dit_accel.accelerated(pipe, method, prune=TokenPruning(**options), **NOW) as handle:

        def arguments():
            after.append(len(compiled))
            return case.arguments()

        for out in pipe.steps(arguments):
            torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))
        assert not handle.report().fallbacks
    torch._dynamo.reset()
    assert after[0] == 0 < after[1] and len(compiled) == after[2]


REFERENCES = {
    "Flux3Transformer2DModel": lambda: {
        "image_cond_hidden_states": x(1, 64, 16),
        "image_cond_ids": image_ids(8, 8, 4),
    },
    "BriaFibo2Transformer2DModel": lambda: {"context_latents": [x(2, 4, 16, 16)]},
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("criterion", ["stratified", "velocity"])
def test_references_that_follow_the_image_are_pruned_with_it(name, criterion):
    """The model's output has no tokens for them: their velocity counts as zero."""
    case = ZOO[name]
    built, arguments = case.build(), {**case.arguments(), **REFERENCES[name]()}
    stock = forward(built, arguments)
    options = {**SPAN, "keep": 0.5, "context": "stale", "block": 16, "criterion": criterion}
    pipe = Pipe(built, steps=2)
    with dit_accel.accelerated(pipe, Dense(), prune=TokenPruning(**options), **NOW) as handle:
        for out in pipe.steps(lambda: arguments):
            torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))
        assert handle.report().steps[-1]["tokens"] == 0.5
        index = handle.spans[0].selection.index
    if criterion == "velocity":
        assert int(index.max()) < 256


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_oblong_images_are_pruned_among_their_padding(keep):
    case = ZOO["HiDreamImageTransformer2DModel"]
    built, arguments = case.build(), case.arguments()
    arguments["hidden_states"] = arguments["hidden_states"][:, :, :16]
    stock = forward(built, arguments)
    options = {**SPAN, "keep": keep, "context": "stale", "block": 16}
    pipe = Pipe(built, steps=2)
    with dit_accel.accelerated(pipe, Dense(), prune=TokenPruning(**options), **NOW):
        for out in pipe.steps(lambda: arguments):
            torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_filled_cache_of_the_text_goes_with_pruning(keep):
    """Qwen-Image 2.1 hands its blocks text and image at the first step, the image alone later."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    case = ZOO["QwenImage21Transformer2DModel"]
    built, cache = case.build(), QwenImage21KVCache(2)
    modes = iter(["extract", "cached", "cached"] * 2)

    def arguments():
        return {**case.arguments(), "kv_cache": cache, "kv_cache_mode": next(modes)}

    stock = [forward(built, arguments())[:, -256:] for _ in range(3)]
    options = {**SPAN, "keep": keep, "context": "stale", "block": 16}
    pipe, method = Pipe(built, steps=3), dit_accel.TopK(0.999)
    with dit_accel.accelerated(pipe, method, prune=TokenPruning(**options), **NOW) as handle:
        for out, expected in zip(pipe.steps(arguments), stock, strict=True):
            torch.testing.assert_close(out[:, -256:], expected, rtol=1e-4, atol=1e-4)
        report = handle.report()
    assert [step["tokens"] < 1 for step in report.steps] == [False, True, True]
    assert not report.fallbacks


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("SD3Transformer2DModel", {"skip_layers": [0]}),
        ("Flux2Transformer2DModel", {"kv_cache_mode": "extract"}),
    ],
)
def test_what_acts_between_blocks_is_refused_by_name(name, argument):
    case = ZOO[name]
    built = case.build()
    prune, words = TokenPruning(first=0, last=None), f"{name} .* pruning: {next(iter(argument))}"
    with (
        dit_accel.accelerated(Pipe(built), Dense(), prune=prune),
        pytest.raises(RuntimeError, match=words),
    ):
        forward(built, {**case.arguments(), **argument})
