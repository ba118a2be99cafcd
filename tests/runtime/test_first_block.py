"""The step cache: along the last two whole steps, or First-Block-Cache, bit for bit that of
diffusers; what lies between blocks is added once."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from support import left_on
from test_graphs import latents, sparse
from tiny import tiny_flux, tiny_wan

import dit_accel
from dit_accel import TokenPruning
from dit_accel.generation.loading import load_pipeline
from dit_accel.runtime import decision, first_block
from dit_accel.runtime.decision import Decision

STEPS = 8


@contextmanager
def watched(pipe):
    """A list to which each forward adds whether it was computed whole."""
    cache, kept = first_block.of(pipe.transformer), []
    hook = pipe.transformer.register_forward_hook(lambda *_: kept.append(cache.computes))
    yield kept
    hook.remove()


@pytest.mark.parametrize(
    ("make", "threshold"), [(tiny_wan, 0.15), (tiny_wan, 0.3), (tiny_flux, 0.7)]
)
def test_it_is_that_of_diffusers_bit_for_bit(make, threshold, monkeypatch):
    wanted, decides = [], FBCHeadBlockHook._should_compute_remaining_blocks

    def noted(hook, residual):
        wanted.append(decides(hook, residual))
        return wanted[-1]

    monkeypatch.setattr(FBCHeadBlockHook, "_should_compute_remaining_blocks", noted)
    pipe = make()
    stock = latents(pipe, 0, STEPS)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    expected = [latents(pipe, seed, STEPS) for seed in (0, 1)]
    pipe.transformer.disable_cache()
    with dit_accel.step_cached(pipe, threshold, extrapolate=False), watched(pipe) as kept:
        found = [latents(pipe, seed, STEPS) for seed in (0, 1)]
    assert kept == wanted and {True, False} == set(kept)
    assert all(map(torch.equal, found, expected))
    assert left_on(pipe.transformer) == []
    assert torch.equal(latents(pipe, 0, STEPS), stock)


def drifting(pipe, speeds):
    """A transformer of whose blocks the first adds t · speed times one and the same to every token
    of the sample, and each other twice that; t is the timestep."""
    now = {}
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    ways = speeds.view(-1, 1, 1) * torch.randn(width)

    def adds(times):
        def forward(hidden_states, *args, **kwargs):
            return hidden_states + times * now["t"] * ways

        return forward

    for i, block in enumerate(pipe.transformer.blocks):
        block.forward = adds(2 if i else 1)
    hook = lambda module, args, kwargs: now.update(t=kwargs["timestep"][0])  # noqa: E731
    return pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("extrapolate", [False, True])
def test_what_moves_along_a_line_is_known_exactly(extrapolate):
    """Each sample by its own pace; where nothing goes on, what was added last is added again."""
    pipe = tiny_wan(layers=3)
    speeds = torch.tensor([0.2, 0.5])
    hook = drifting(pipe, speeds)
    given = torch.randn(2, 16, 2, 8, 8), torch.randn(2, 4, pipe.transformer.config.text_dim)

    def forward(t):
        times = torch.full((2,), float(t))
        with torch.no_grad(), pipe.transformer.cache_context("cond"):
            named = {"timestep": times, "encoder_hidden_states": given[1]}
            return pipe.transformer(given[0], **named).sample

    times = (1.0, 1.1, 1.2, 1.25, 1.3, 1.3)
    expected = [forward(t) for t in times]
    pipe.scheduler.set_timesteps(len(times))
    with dit_accel.step_cached(pipe, 0.045, extrapolate), watched(pipe) as kept:
        found = [forward(t) for t in times]
    hook.remove()
    if extrapolate:
        assert kept == [True, True, False, False, False, False]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    else:
        assert kept == [True, True, True, False, True, False]
        torch.testing.assert_close(found[5], expected[5], atol=1e-4, rtol=0)
        assert (found[3] - expected[3]).abs().max() > 0.005


def test_the_pace_is_that_of_each_sample_along_the_way_and_none_where_nothing_moved(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    before, way, aside = torch.randn(3, 4, 50, 6, generator=generator).unbind()
    last = before + way
    aside -= (aside * way).sum((1, 2), keepdim=True) / way.square().sum((1, 2), keepdim=True) * way
    paces = torch.tensor([0.5, -1.0, 0.0, 3.0])
    now = last + paces.view(4, 1, 1) * way + 5 * aside
    monkeypatch.setattr(decision, "_AT_ONCE", 500)
    found = Decision(0.1).pace(now, last, before, None)
    torch.testing.assert_close(found, paces, atol=1e-5, rtol=0)
    assert Decision(0.1).pace(now, last, last, None).tolist() == [0, 0, 0, 0]
    half = [x.half() * 200 for x in (now, last, before)]
    torch.testing.assert_close(Decision(0.1).pace(*half, None), paces, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "prompt",
    [
        "a rocket left of a ghost on a blue background, moving up",
        "a koala below a tropical fish on a yellow background",
    ],
)
def test_it_comes_closer_with_fewer_whole_steps(prompt):
    pipe, _ = load_pipeline(device="cpu")

    def clip():
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 20}
        given = {**size, "generator": generator, "output_type": "latent", "guidance_scale": 1.0}
        return pipe(prompt, **given).frames

    whole, seen = clip(), []
    for extrapolate in (False, True):
        with dit_accel.step_cached(pipe, 0.1, extrapolate), watched(pipe) as kept:
            seen.append(((clip() - whole).norm(), sum(kept)))
    (plain, many), (close, few) = seen
    assert few <= many - 3 and close < 0.9 * plain


def test_accelerated_it_hears_the_same_passes_and_may_come_first_or_last():
    pipe = tiny_wan()
    with dit_accel.step_cached(pipe, 0.15), sparse(pipe, "shared@0.3"):
        expected = latents(pipe, 0, STEPS)
    with sparse(pipe, "shared@0.3"):
        with dit_accel.step_cached(pipe, 0.15):
            assert torch.equal(latents(pipe, 0, STEPS), expected)
        whole = latents(pipe, 0, STEPS)
    assert not torch.equal(whole, expected) and left_on(pipe.transformer) == []
    cached = dit_accel.step_cached(pipe, 0.15)
    with cached:
        handle = sparse(pipe, "shared@0.3").__enter__()
        assert torch.equal(latents(pipe, 0, STEPS), expected)
        handle.restore()
        alone = latents(pipe, 0, STEPS)
        handle = dit_accel.accelerate(pipe, "dense")
        assert torch.equal(latents(pipe, 0, STEPS), alone)
    assert left_on(pipe.transformer)
    handle.restore()
    assert left_on(pipe.transformer) == []


def test_passes_without_names_have_caches_of_their_own(monkeypatch):
    """Told by their place in a step they are those that the pipeline names; each generation begins
    anew, also after one that ended midway."""
    pipe = tiny_wan()

    def fails(pipe, i, t, kwargs):
        raise KeyError

    def clips():
        with dit_accel.step_cached(pipe, 0.15), watched(pipe) as kept:
            return [latents(pipe, seed, STEPS) for seed in (0, 1)], kept

    expected, wanted = clips()
    monkeypatch.setattr(first_block, "follow", lambda transformer, clock: None)
    found, kept = clips()
    assert all(map(torch.equal, found, expected))
    assert kept == wanted and {True, False} == set(wanted)
    with dit_accel.step_cached(pipe, 0.15):
        with pytest.raises(KeyError):
            latents(pipe, 0, STEPS, callback_on_step_end=fails)
        assert torch.equal(latents(pipe, 1, STEPS), expected[1])


def test_what_a_controlnet_adds_between_blocks_is_added_once():
    """A skipped step of the same inputs and residuals is the step that ran."""
    pipe = tiny_flux()
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    config = pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    given = {
        "hidden_states": noise(1, 16, config.in_channels),
        "encoder_hidden_states": noise(1, 8, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.ones(1) if config.guidance_embeds else None,
        "controlnet_block_samples": [noise(1, 16, width)],
        "controlnet_single_block_samples": [noise(1, 16, width)],
    }
    pipe.scheduler.set_timesteps(2, mu=1.0)
    with (
        torch.no_grad(),
        dit_accel.step_cached(pipe, 1.0),
        watched(pipe) as kept,
        pipe.transformer.cache_context("cond"),
    ):
        first, second = (pipe.transformer(**given).sample for _ in range(2))
    assert kept == [True, False]
    torch.testing.assert_close(second, first)


def test_pruning_goes_inside_and_not_around():
    pipe = tiny_wan(layers=4)
    inside = TokenPruning(0.5, block=16, start=1, end=0)
    with dit_accel.step_cached(pipe, 0.15), watched(pipe) as kept:
        with dit_accel.accelerated(pipe, "pooled@0.3", prune=inside, min_tokens=0) as handle:
            assert latents(pipe, 0, STEPS).isfinite().all()
            tokens = {step["tokens"] for step in handle.report().steps}
        assert set(kept) == {True, False} and min(tokens) < 1
        around = TokenPruning(0.5, block=16, first=0)
        reads = "the step cache reads all tokens at the first and at the last block"
        with (
            dit_accel.accelerated(pipe, "pooled", prune=around),
            pytest.raises(RuntimeError, match=reads),
        ):
            latents(pipe, 0, STEPS)


def test_what_cannot_have_one_is_refused_in_a_sentence_and_nothing_is_left():
    def refused(pipe, match):
        with pytest.raises(ValueError, match=match), dit_accel.step_cached(pipe, 0.1):
            raise AssertionError

    pipe = tiny_wan()
    for threshold in (0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="step_cache is a relative change > 0"):
            dit_accel.step_cached(pipe, threshold).__enter__()
    with dit_accel.step_cached(pipe, 0.1):
        refused(pipe, "has a step cache already")
    for config in (FirstBlockCacheConfig(), TaylorSeerCacheConfig()):
        pipe.transformer.enable_cache(config)
        refused(pipe, "has a step cache already: disable that one first")
        pipe.transformer.disable_cache()
    pipe.transformer._is_cached = True
    refused(pipe, "cache-dit is enabled")
    del pipe.transformer._is_cached
    refused(tiny_wan(layers=1), "it has one block only")
    assert left_on(pipe.transformer) == []


def test_blocks_that_something_else_runs_are_no_silent_loss():
    pipe = tiny_wan()
    with dit_accel.step_cached(pipe, 0.1):
        blocks = pipe.transformer.blocks
        pipe.transformer.blocks = torch.nn.ModuleList(list(blocks))
        with pytest.raises(RuntimeError, match="did not meet the blocks.*leave the step cache out"):
            latents(pipe)
        pipe.transformer.blocks = blocks
    assert left_on(pipe.transformer) == []


@pytest.mark.parametrize("accelerate", [False, True])
def test_a_copy_starts_anew_and_is_its_own(accelerate):
    pipe = tiny_wan()
    with dit_accel.step_cached(pipe, 0.15):
        handle = sparse(pipe, "shared@0.3").__enter__() if accelerate else None
        expected = latents(pipe, 0, STEPS)
        copied = copy.copy(pipe), pickle.loads(pickle.dumps(pipe.transformer))
        copied[0].register_modules(transformer=copy.deepcopy(pipe.transformer))
        for transformer in (copied[0].transformer, copied[1]):
            copied[0].register_modules(transformer=transformer)
            assert first_block.of(transformer) is not first_block.of(pipe.transformer)
            assert torch.equal(latents(copied[0], 0, STEPS), expected)
            first_block.of(transformer).remove()
            dit_accel.restore(copied[0])
            assert left_on(transformer) == []
        assert torch.equal(latents(pipe, 0, STEPS), expected)
        if handle is not None:
            handle.restore()
    assert left_on(pipe.transformer) == []


def test_a_transformer_that_is_compiled_whole():
    pipe = tiny_wan()
    with dit_accel.step_cached(pipe, 0.15):
        expected = latents(pipe, 0, STEPS)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with dit_accel.step_cached(pipe, 0.15):
        torch.testing.assert_close(latents(pipe, 0, STEPS), expected)


def test_blocks_that_were_replaced_by_compiled_ones():
    pipe = tiny_wan(layers=3)
    with dit_accel.step_cached(pipe, 0.3):
        wanted = latents(pipe, 0, 6)
    for i, block in enumerate(pipe.transformer.blocks):
        pipe.transformer.blocks[i] = torch.compile(block, backend="eager")
    with dit_accel.step_cached(pipe, 0.3):
        assert torch.equal(latents(pipe, 0, 6), wanted)
