"""Every supported transformer: stock when dense, equal when all is kept, faster when it is not."""

from __future__ import annotations

import warnings
from math import prod

import pytest
import torch
from tables import REFUSED, known_pipelines
from zoo import TEXT, Case, Pipe, at, forward, image_ids, x, zoo

import dit_accel
from dit_accel import Dense, Rettention, Schedule, TopK
from dit_accel.pipelines import registry

ZOO = zoo()
ALL = TopK(keep=0.999)  # rounds up to every block, and runs the sparse operator
NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=ZOO, scope="module")
def model(request):
    """(case, stock model, its output)."""
    case = ZOO[request.param]
    with torch.no_grad():
        built = case.build()
        return case, built, forward(built, case.arguments())


def run(case: Case, built, method, **options):
    with dit_accel.accelerated(Pipe(built), method, **{**NOW, **options}) as handle:
        out = forward(built, case.arguments())
        return out, handle.report()


def processors(built):
    return {n: m.processor for n, m in built.named_modules() if hasattr(m, "processor")}


def test_dense_is_stock_and_restore_exact(model):
    case, built, stock = model
    before, keys = processors(built), set(built.__dict__)
    out, report = run(case, built, Dense())
    if case.mask.endswith("N × N mask"):  # a masked row less, another kernel: not bit for bit
        torch.testing.assert_close(out, stock)
    else:
        assert torch.equal(out, stock)
    assert report.kept == 1 and len(report.layers) == case.layers
    assert torch.equal(forward(built, case.arguments()), stock)
    assert processors(built) == before and set(built.__dict__) == keys
    hooks = (m._forward_hooks or m._forward_pre_hooks for m in built.modules())
    assert not any(hooks)


def test_only_visual_and_joint_attention_is_touched(model):
    case, built, _ = model
    before = processors(built)
    with dit_accel.accelerated(Pipe(built), TopK()) as handle:
        named = {row["name"] for row in handle.report().layers}
        changed = {n for n, processor in processors(built).items() if processor is not before[n]}
    assert changed == named
    assert not any(word in name for name in named for word in ("refiner", "audio", "cross"))


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_every_block_kept_equals_dense(model, order):
    case, built, stock = model
    out, report = run(case, built, ALL, order=order)
    assert report.kept == 1 and not report.fallbacks and report.implementations
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4 * float(stock.abs().max()))


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_sparse_runs_differ_stay_finite_and_fall_back_nowhere(model, order):
    case, built, stock = model
    out, report = run(case, built, TopK(keep=0.2), order=order)
    assert torch.isfinite(out).all() and not torch.allclose(out, stock, rtol=1e-7, atol=1e-8)
    assert not report.fallbacks and all(row["sparse"] and not row["dense"] for row in report.layers)
    assert 0.2 <= report.kept < 0.7
    again, _ = run(case, built, TopK(keep=0.2), order=order)
    assert torch.equal(out, again)


class Spy(TopK):
    """TopK that shows what it was given in its first call."""

    def __call__(self, q, k, v, call):
        table = self.table(q, k, call)
        self.__dict__.setdefault("seen", (k, call, table))
        return super().__call__(q, k, v, call)


def spy(case, built, arguments):
    method = Spy(keep=0.3)
    with dit_accel.accelerated(Pipe(built), method, **NOW):
        forward(built, arguments)
    return method.seen


def test_visual_tokens_lie_where_the_adapter_says_and_text_is_always_read(model):
    """One latent pixel is changed: one key changes, the one its grid position says."""
    case, built, _ = model
    k, call, table = spy(case, built, case.arguments())
    assert call.grid == case.grid
    n, n_visual = k.shape[2], prod(case.grid)
    n_text = n - n_visual
    first = n_text if call.text_first else 0
    t, h, w = int(case.grid[0] > 1 or case.history > 0), 2, 5
    height, width = (8, 8) if case.history else case.grid[1:]
    token = (t * height + h) * width + w
    other, _, _ = spy(case, built, case.nudged(t, h, w, token))
    changed = (k != other).any(-1).any(1)[0].nonzero().flatten().tolist()
    visual = list(range(first, first + n_visual))
    assert changed == (visual if case.mixes else [first + case.history + token])
    if n_text:
        text = range(n_text) if call.text_first else range(n - n_text, n)
        blocks = sorted({i // table.block_k for i in text})
        valid = n if call.kv_len is None else int(torch.as_tensor(call.kv_len).min())
        blocks = [i for i in blocks if i * table.block_k < valid]
        assert table.to_mask()[..., blocks].all() and blocks


@pytest.mark.parametrize(
    "name", ["EasyAnimateTransformer3DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]
)
def test_passes_with_texts_of_different_length(name):
    case = ZOO[name]
    built = case.build()
    short = case.arguments()
    for key in ("encoder_hidden_states", "txt_ids"):
        if key in short:
            short[key] = short[key].narrow(-2, 0, TEXT // 2)
    stock = [forward(built, arguments) for arguments in (case.arguments(), short)]
    with dit_accel.accelerated(Pipe(built), ALL, **NOW) as handle:
        for arguments, expected in zip((case.arguments(), short), stock, strict=True):
            torch.testing.assert_close(forward(built, arguments), expected, rtol=1e-4, atol=1e-4)
        assert not handle.report().fallbacks


def qwen_with_reference():
    """A reference of 8 × 8 tokens, 16 slots of the text encoder, between two halves of the text."""
    half = torch.zeros(1, TEXT // 2).bool()
    return {
        "hidden_states": x(1, 64 + 256, 16),
        "encoder_hidden_states": x(1, TEXT + 16, 16),
        "encoder_hidden_states_mask": None,
        "timestep": at(0.5),
        "img_shapes": [[(1, 8, 8), (1, 16, 16)]],
        "img_mask": torch.cat([half, ~half.new_zeros(1, 16), half, ~half.new_zeros(1, 64)], dim=1),
    }


# inputs of another kind than the zoo's, and why a call stays dense, or ""
OTHERS = {
    "QwenImage21Transformer2DModel": (qwen_with_reference, ""),
    "BriaFibo2Transformer2DModel": (
        lambda: {"context_latents": [x(2, 4, 32, 32), x(2, 4, 16, 16)]},
        "",
    ),
    "Flux3Transformer2DModel": (
        lambda: {
            "image_cond_hidden_states": x(1, 64, 16),
            "image_cond_ids": image_ids(8, 8, 4),
        },
        "256 × 256 tokens where the model's geometry says 320",
    ),
    "JoyImageEditTransformer3DModel": (lambda: {"hidden_states": x(2, 3, 4, 1, 16, 16)}, ""),
    "JoyImageEditPlusTransformer3DModel": (
        lambda: {"shape_list": [[(1, 8, 8)] * 3, [(1, 8, 8), (1, 6, 8)]]},
        "the images of the batch differ in size",
    ),
    "Ideogram4Transformer2DModel": (
        lambda: {"segment_ids": torch.arange(TEXT + 256).expand(2, -1) // 140},
        "several samples share a row",
    ),
    "HiDreamImageTransformer2DModel": (lambda: {"hidden_states": x(2, 4, 16, 32)}, ""),
    "Kandinsky6Transformer3DModel": (lambda: {"audio_hidden_states": None}, ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_of_another_kind(name):
    """Reference images, ragged batches, oblong images, no sound: equal to dense, or said to be."""
    case, (more, why) = ZOO[name], OTHERS[name]
    built, arguments = case.build(), {**case.arguments(), **more()}
    stock = forward(built, arguments)
    with dit_accel.accelerated(Pipe(built), ALL, **NOW) as handle:
        torch.testing.assert_close(forward(built, arguments), stock, rtol=1e-4, atol=1e-4)
        assert list(handle.report().fallbacks) == ([why] if why else [])


def test_samples_that_are_attended_one_by_one_keep_their_own_state():
    case = ZOO["MochiTransformer3DModel"]
    built, method = case.build(), Rettention(keep=0.3)

    def alone():
        return {k: v[1:] if torch.is_tensor(v) else v for k, v in case.arguments().items()}

    outputs = []
    for arguments in (case.arguments, alone):
        pipe = Pipe(built, steps=3)
        with dit_accel.accelerated(pipe, method, **NOW):
            outputs.append(pipe.steps(arguments)[-1][-1])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_models_left_alone_say_why(name):
    stranger = type(name, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=f"{name} is left as it is: .{{20}}"):
        dit_accel.accelerate(Pipe(stranger))


def test_the_zoo_is_the_registry():
    assert sorted(ZOO) == registry.known() and len(ZOO) >= 54


def test_most_pipelines_of_diffusers_are_served():
    assert sum(map(len, known_pipelines().values())) >= 130
