"""CUDA graphs beside First-Block-Cache, which decides at the first block."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from graph_emulator import Emulated
from test_graphs import METHODS, latents, sparse, told
from tiny import tiny_flux, tiny_wan

from dit_accel import AccelConfig, Pooled, Schedule
from dit_accel.generation.boost import Boost
from dit_accel.generation.comparison import compare
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.runtime import graphs
from dit_accel.runtime.skipping import StepCache

STEPS = 8


def cached(pipe, threshold):
    """Enabled; a list to which each forward adds whether it was computed whole."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    blocks = getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
    cache, kept = StepCache.of([blocks[0]]), []
    pipe.transformer.register_forward_hook(lambda m, args, out: kept.append(cache.computes))
    return kept


@pytest.mark.parametrize("method", [*METHODS, "dense"])
def test_what_is_replayed_is_what_ran_and_skips_what_was_skipped(method):
    """Seeds and thresholds at which other steps are skipped, in turn."""
    pipe, recorder = tiny_wan(), Emulated()
    kept, cache = cached(pipe, 0.15), StepCache.of([pipe.transformer.blocks[0]])

    def clips():
        for seed, threshold in ((0, 0.15), (1, 0.2), (2, 0.15), (3, 0.15), (0, 0.2), (1, 0.15)) * 2:
            cache.leader.threshold = threshold
            yield latents(pipe, seed, STEPS)

    with sparse(pipe, method) as handle:
        expected, facts, wanted = list(clips()), told(handle), kept.copy()
    kept.clear()
    with sparse(pipe, method) as handle, graphs.graphed([pipe.transformer], recorder):
        found = list(clips())
        assert told(handle) == facts
    torch.testing.assert_close(found, expected)
    each = 2 * STEPS
    ways = [tuple(wanted[i : i + each]) for i in range(0, len(wanted), each)]
    assert kept == wanted and len(set(ways)) > 2
    assert recorder.replayed > 5 * each


def test_a_generation_that_ended_midway_is_not_where_the_next_one_begins():
    """diffusers leaves the cache as it was then."""
    pipe = tiny_wan()
    kept = cached(pipe, 0.15)

    def fails(pipe, i, t, kwargs):
        if i == 3:
            raise KeyError
        return kwargs

    def run():
        with pytest.raises(KeyError):
            latents(pipe, 0, STEPS, callback_on_step_end=fails)
        return [latents(pipe, seed, STEPS) for seed in (1, 2, 3)]

    with sparse(pipe, "shared@0.3"):
        expected = [run() for _ in range(3)]
    wanted = kept.copy()
    kept.clear()
    with sparse(pipe, "shared@0.3"), graphs.graphed([pipe.transformer], Emulated()):
        torch.testing.assert_close([run() for _ in range(3)], expected)
    assert kept == wanted


def test_two_streams_are_skipped_together():
    pipe, recorder = tiny_flux(), Emulated()
    kept = cached(pipe, 0.7)
    with sparse(pipe, "shared@0.3"):
        expected, wanted = [latents(pipe, seed, STEPS) for seed in range(4)], kept.copy()
    kept.clear()
    with sparse(pipe, "shared@0.3"), graphs.graphed([pipe.transformer], recorder):
        torch.testing.assert_close([latents(pipe, seed, STEPS) for seed in range(4)], expected)
    assert kept == wanted and {True, False} == set(kept)
    assert recorder.replayed > STEPS


def test_other_caches_and_caches_of_a_stock_pipeline_are_refused_in_a_sentence():
    pipe = tiny_wan()
    with graphs.graphed([pipe.transformer], Emulated()):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(RuntimeError, match="a step cache is enabled on a pipeline that is not"):
            latents(pipe)
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(
            MagCacheConfig(threshold=0.1, mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS)
        )
        with (
            sparse(pipe, "topk"),
            pytest.raises(RuntimeError, match="diffusers' hook 'mag_.*' acts on the way"),
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
