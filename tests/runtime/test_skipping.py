"""CUDA graphs beside a step cache, which decides at the first block."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from graph_emulator import Emulated
from test_graphs import METHODS, latents, sparse, told
from tiny import tiny_flux, tiny_wan

from dit_accel import AccelConfig, Pooled, Schedule, step_cached
from dit_accel.generation.boost import Boost
from dit_accel.generation.comparison import compare
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.runtime import first_block, graphs

STEPS = 8


@contextmanager
def cached(pipe, threshold):
    """The cache, and a list to which each forward adds whether it was computed whole."""
    with step_cached(pipe, threshold):
        cache, kept = first_block.of(pipe.transformer), []
        hook = pipe.transformer.register_forward_hook(lambda *_: kept.append(cache.computes))
        yield cache, kept
        hook.remove()


@pytest.mark.parametrize("method", [*METHODS, "dense"])
def test_what_is_replayed_is_what_ran_and_skips_what_was_skipped(method):
    """Seeds and thresholds at which other steps are skipped, in turn."""
    pipe, recorder = tiny_wan(), Emulated()

    def clips(cache):
        for seed, threshold in ((0, 0.15), (1, 0.2), (2, 0.13), (3, 0.15), (0, 0.2), (1, 0.13)) * 2:
            cache.decision.threshold = threshold
            yield latents(pipe, seed, STEPS)

    with cached(pipe, 0.15) as (cache, wanted), sparse(pipe, method) as handle:
        expected, facts = list(clips(cache)), told(handle)
    with (
        cached(pipe, 0.15) as (cache, kept),
        sparse(pipe, method) as handle,
        graphs.graphed([pipe.transformer], recorder),
    ):
        found = list(clips(cache))
        assert told(handle) == facts
    torch.testing.assert_close(found, expected)
    each = 2 * STEPS
    ways = [tuple(wanted[i : i + each]) for i in range(0, len(wanted), each)]
    assert kept == wanted and len(set(ways)) > 2
    assert recorder.replayed > 5 * each


def test_a_generation_that_ended_midway_is_not_where_the_next_one_begins():
    pipe = tiny_wan()

    def fails(pipe, i, t, kwargs):
        if i == 3:
            raise KeyError
        return kwargs

    def run():
        with pytest.raises(KeyError):
            latents(pipe, 0, STEPS, callback_on_step_end=fails)
        return [latents(pipe, seed, STEPS) for seed in (1, 2, 3)]

    with cached(pipe, 0.15) as (_, wanted), sparse(pipe, "shared@0.3"):
        expected = [run() for _ in range(3)]
    with (
        cached(pipe, 0.15) as (_, kept),
        sparse(pipe, "shared@0.3"),
        graphs.graphed([pipe.transformer], Emulated()),
    ):
        torch.testing.assert_close([run() for _ in range(3)], expected)
    assert kept == wanted


def test_two_streams_are_skipped_together():
    pipe, recorder = tiny_flux(), Emulated()
    with cached(pipe, 0.7) as (_, wanted), sparse(pipe, "shared@0.3"):
        expected = [latents(pipe, seed, STEPS) for seed in range(4)]
    with (
        cached(pipe, 0.7) as (_, kept),
        sparse(pipe, "shared@0.3"),
        graphs.graphed([pipe.transformer], recorder),
    ):
        torch.testing.assert_close([latents(pipe, seed, STEPS) for seed in range(4)], expected)
    assert kept == wanted and {True, False} == set(kept)
    assert recorder.replayed > STEPS


def test_other_caches_and_caches_of_a_stock_pipeline_are_refused_in_a_sentence():
    pipe = tiny_wan()
    mag = MagCacheConfig(threshold=0.1, mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS)
    with graphs.graphed([pipe.transformer], Emulated()):
        with (
            step_cached(pipe, 0.1),
            pytest.raises(RuntimeError, match="a step cache is enabled on a pipeline that is not"),
        ):
            latents(pipe)
        for config, hook in ((FirstBlockCacheConfig(0.1), "fbc"), (mag, "mag")):
            pipe.transformer.enable_cache(config)
            with (
                sparse(pipe, "topk"),
                pytest.raises(RuntimeError, match=f"diffusers' hook '{hook}_.*' acts on the way"),
            ):
                latents(pipe)
            pipe.transformer.disable_cache()
        latents(pipe)


def test_a_comparison_with_a_profile_of_speed_is_recorded(tmp_path, monkeypatch):
    pipe = tiny_wan()
    defaults = Defaults(height=256, width=256, num_frames=9, num_inference_steps=STEPS)
    config = AccelConfig(Pooled(0.3), Schedule(warmup=1), min_tokens=0, dense="native")
    made = []
    monkeypatch.setattr(graphs, "Cuda", lambda: made.append(Emulated()) or made[-1])

    def report(folder, **more):
        boost = Boost(step_cache=0.2, **more)
        return compare(pipe, defaults, Request("a cat"), config, tmp_path / folder, boost=boost)

    wanted, found = report("a").data, report("b", graphs=True).data
    assert found["kept"] == pytest.approx(wanted["kept"])
    assert found["quality"]["psnr_mean"] == pytest.approx(wanted["quality"]["psnr_mean"], rel=1e-3)
    assert made[-1].replayed > 4 * STEPS


@pytest.mark.parametrize("method", ["dense", "shared@0.3"])
def test_a_cache_that_comes_or_goes_between_generations(method):
    pipe = tiny_wan()
    with sparse(pipe, method):
        plain = latents(pipe, 3, STEPS)
        with step_cached(pipe, 0.15):
            cached = latents(pipe, 3, STEPS)
    assert not torch.equal(plain, cached)
    with sparse(pipe, method), graphs.graphed([pipe.transformer], Emulated()):
        for wanted in (plain, cached) * 3:
            if wanted is plain:
                found = [latents(pipe, seed, STEPS) for seed in (0, 1, 3)]
            else:
                with step_cached(pipe, 0.15):
                    found = [latents(pipe, seed, STEPS) for seed in (0, 1, 3)]
            torch.testing.assert_close(found[-1], wanted)
