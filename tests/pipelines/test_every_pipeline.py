"""Every pipeline of diffusers with a transformer of ours, called through its own `__call__`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from drive import build, pipelines, run
from graph_emulator import Emulated
from support import left_on

import dit_accel
from dit_accel import Schedule, TokenPruning, TopK
from dit_accel.generation.boost import Boost
from dit_accel.pipelines.denoisers import denoisers
from dit_accel.runtime import first_block
from dit_accel.runtime.graphs import graphed

QUICK = (
    "AuraFlowPipeline",
    "BriaFibo2Pipeline",
    "EasyAnimatePipeline",
    "FluxKontextPipeline",
    "Ideogram4Pipeline",
    "Krea2Pipeline",
    "LTX2DFRTemporalRefinePipeline",
    "LTXI2VLongMultiPromptPipeline",
    "NucleusMoEImagePipeline",
    "PRXPipeline",
    "QwenImageInpaintPipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2Pipeline",
    "VisualClozePipeline",
    "WanVACEPipeline",
)
NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}
# (generations of one call, steps of each) where they are not (1, 2)
RUNS = {
    "HeliosPyramidPipeline": (3, 1),  # stages of 32, 64 and 128 pixels
    "LTXI2VLongMultiPromptPipeline": (2, 1),  # windows; it leaves the last timestep out
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": (2, 2),  # parts of a long clip
    "VisualClozePipeline": (2, 2),  # a picture, and the same larger
}
BIAS = "the attention mask is an additive bias"
DENSE = {
    "ChromaImg2ImgPipeline": {BIAS},
    "ChromaInpaintPipeline": {BIAS},
    "StableDiffusion3PAGImg2ImgPipeline": {BIAS},
    "StableDiffusion3PAGPipeline": {BIAS},
    "ZImageOmniPipeline": {"reference images lie between text and image"},
}
NO_DENOISER = ("controlnet",)  # it runs at each step, and only adds to the transformer's blocks


def slow(name, quick=QUICK):
    return pytest.param(name, marks=[] if name in quick else [pytest.mark.slow])


def modules(pipe):
    """Name → module of all parts of a pipeline."""
    return {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def left(pipe):
    """Everything of ours that a pipeline or one of its parts still holds."""
    own = [name for name in vars(pipe) if "accel" in name]
    return own + [at for part in modules(pipe).values() for at in left_on(part)]


def counted(pipe, name):
    """The latents of one call, and how often each part ran."""
    counts, hooks = Counter(), []
    for part, module in modules(pipe).items():
        count = lambda *_, part=part: counts.update([part])  # noqa: E731
        hooks.append(module.register_forward_pre_hook(count))
    out = run(pipe, name)
    for hook in hooks:
        hook.remove()
    return out, counts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [slow(name) for name in sorted(pipelines())])
def test_a_call_gives_what_stock_gives_when_all_is_kept(name):
    pipe = build(name)
    stock, counts = counted(pipe, name)
    assert stock.isfinite().all()
    each_step = {part for part, n in counts.items() if n > 1} - set(NO_DENOISER)
    assert each_step == set(denoisers(pipe)), "what denoises is found, whatever its name"
    handle = dit_accel.accelerate(pipe, TopK(keep=0.999), **NOW)
    assert left(pipe)
    out = run(pipe, name)
    report = handle.report()
    handle.restore()
    assert left(pipe) == []
    assert torch.equal(run(pipe, name), stock)
    scale = float(stock.abs().max())
    torch.testing.assert_close(out, stock, rtol=1e-3, atol=1e-3 * scale)
    assert all(row["sparse"] + row["dense"] for row in report.layers)
    assert set(report.unplanned) == DENSE.get(name, set())
    generations, steps = RUNS.get(name, (1, 2))
    assert report.generations == generations
    assert {row["step"] for row in report.steps} == set(range(steps))


HALF = TokenPruning(keep=0.5, start=1, end=0, first=0, last=None)
# pruned: a mask among the keywords; a batch that grows behind the first step
PRUNED = ("AnyFlowPipeline", "BriaFiboEditPipeline")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in PRUNED else [pytest.mark.slow])
        for name in sorted(pipelines())
    ],
)
def test_orders_change_nothing_and_pruned_steps_are_finite_or_refused(name):
    pipe = build(name)
    stock = run(pipe, name)
    with dit_accel.accelerated(pipe, TopK(keep=0.999), order="hilbert", **NOW):
        ordered = run(pipe, name)
    scale = float(stock.abs().max())
    torch.testing.assert_close(ordered, stock, rtol=1e-3, atol=1e-3 * scale)
    try:
        with dit_accel.accelerated(pipe, TopK(keep=0.999), prune=HALF, **NOW):
            assert run(pipe, name).isfinite().all()
    except (ValueError, RuntimeError) as refused:
        assert "cannot run token pruning: " in str(refused)
    assert torch.equal(run(pipe, name), stock)


# what no CUDA graph holds: masks that are read on the way, a cache of keys, processors of each call
READ = (
    *("BriaFiboEdit", "BriaFibo", "Chroma", "ErnieImage", "HiDreamImage", "HunyuanImage"),
    *("HunyuanImageRefiner", "HunyuanSkyreelsImageToVideo", "HunyuanVideo15ImageToVideo"),
    *("HunyuanVideo15", "HunyuanVideoFramepack", "HunyuanVideoImageToVideo", "HunyuanVideo"),
    *("Ideogram4", "JoyImageEditPlus", "Krea2", "Lumina", "Mochi", "MotifVideoImage2Video"),
    *("MotifVideo", "PRX", "PRXPixel"),
)
CACHED = ("GlmImage", "QwenImage21")
EXCHANGED = (
    *("HunyuanDiTPAG", "PixArtSigmaPAG", "StableDiffusion3PAG", "StableDiffusion3PAGImg2Img"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [slow(name) for name in sorted(pipelines())])
def test_as_cuda_graphs_a_call_gives_what_it_gave_or_is_refused(name):
    """Emulated on the CPU, with a method that remembers."""
    pipe, kind = build(name), name.removesuffix("Pipeline")
    with dit_accel.accelerated(pipe, "shared", **NOW):
        expected = run(pipe, name)
    pipe, recorder = build(name), Emulated()
    models = list(denoisers(pipe).values())
    made, refused = [], ""
    with (
        dit_accel.accelerated(pipe, "shared", **NOW),
        graphed(models, recorder, getattr(pipe, "scheduler", None)),
    ):
        try:
            made = [run(pipe, name) for _ in range(3)]
        except RuntimeError as error:
            refused = str(error)
    assert ("capturing" in refused, "KVCache" in refused) == (kind in READ, kind in CACHED)
    for latents in made:
        torch.testing.assert_close(latents, expected)
    replays = kind not in READ + CACHED + EXCHANGED
    assert (recorder.replayed > 0) == replays and bool(made) == (not refused)


UNSKIPPED = {  # of two steps nothing can be skipped
    "HeliosPyramidPipeline",  # stages of one step each
    "LTXI2VLongMultiPromptPipeline",  # windows of one step each
    "QwenImage21Pipeline",  # the first forward has the keys that others find kept
}
CACHES = ("FluxPipeline", "LTX2Pipeline", "WanVACEPipeline", "ZImagePipeline")  # in the suite


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [slow(name, CACHES) for name in sorted(pipelines())])
def test_a_step_cache_runs_or_is_refused_and_skips_the_same_steps_as_cuda_graphs(name):
    """The second step of two is skipped. Refused: in a sentence, with nothing patched."""
    pipe, kind, boost = build(name), name.removesuffix("Pipeline"), Boost(step_cache=1e9)
    if kind == "Latte":
        with pytest.raises(ValueError, match="cannot have a step cache: blocks over space and"):
            boost.check(pipe)
        assert not any(map(left_on, denoisers(pipe).values()))
        return
    stock = run(pipe, name)
    with boost.cached(pipe):
        caches = [first_block.of(model) for model in denoisers(pipe).values()]
        assert run(pipe, name).isfinite().all()
        assert name in UNSKIPPED or not all(cache.computes for cache in caches)
    assert left(pipe) == [] and torch.equal(run(pipe, name), stock)
    with boost.cached(pipe), dit_accel.accelerated(pipe, "shared", **NOW):
        expected = run(pipe, name)
    if kind in READ + CACHED + EXCHANGED:
        return
    pipe, recorder = build(name), Emulated()
    models = list(denoisers(pipe).values())
    with (
        boost.cached(pipe),
        dit_accel.accelerated(pipe, "shared", **NOW),
        graphed(models, recorder, getattr(pipe, "scheduler", None)),
    ):
        made = [run(pipe, name) for _ in range(3)]
    for latents in made:
        torch.testing.assert_close(latents, expected)
    assert recorder.replayed > 0


def test_all_pipelines_of_the_page_are_driven():
    assert len(pipelines()) == 132 and set(QUICK) | set(RUNS) <= set(pipelines())
