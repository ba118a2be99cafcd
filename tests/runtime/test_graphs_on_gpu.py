"""CUDA graphs themselves: what is replayed has the bits of what ran, on the last GPU there is."""

import pytest
import torch
from test_graphs import METHODS, latents, sparse, told
from tiny import tiny_wan

from dit_accel import SLA, TopK, graphed, step_cached
from dit_accel.generation.boost import Boost
from dit_accel.runtime import first_block

pytestmark = pytest.mark.gpu
LARGE = {"height": 256, "width": 256}  # 768 tokens


def pipeline(**more):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    return tiny_wan(**more).to(device, torch.bfloat16)


def both(pipe, method, cache=None, **more):
    """Clips as they run and as they are replayed, with what the handle tells of each."""
    found = []
    for boost in (Boost(step_cache=cache), Boost(step_cache=cache, graphs=True)):
        with boost.switch_on(pipe), sparse(pipe, method, **more) as handle:
            clips = [latents(pipe, seed, 6, **LARGE) for seed in (0, 0, 1, 0, 1)]
            found.append((torch.stack(clips), told(handle)))
    return found


@pytest.mark.parametrize("dense", [None, "auto"])
@pytest.mark.parametrize("method", [*METHODS, "dense"])
def test_a_replay_has_the_bits_of_a_run(method, dense):
    ran, replayed = both(pipeline(), method, dense=dense)
    assert torch.equal(ran[0], replayed[0])
    assert ran[1] == replayed[1]


@pytest.mark.parametrize("method", [TopK(0.3, block_q=64), SLA(0.3, block_q=64)])
def test_blocks_of_64_with_heads_of_128(method):
    """Their rows are taken from a counter, which each launch leaves at nought."""
    pipe = pipeline(head_dim=128)
    ran, replayed = both(pipe, method)
    assert torch.equal(ran[0], replayed[0])


@pytest.mark.parametrize("method", ["topk/sub@0.3", "shared@0.3"])
def test_a_step_cache_decides_between_two_graphs(method):
    pipe, kept = pipeline(), []
    ran, replayed = both(pipe, method, cache=0.15)
    assert torch.equal(ran[0], replayed[0])
    assert ran[1]["implementations"] == replayed[1]["implementations"]
    with step_cached(pipe, 0.15), sparse(pipe, method):
        cache = first_block.of(pipe.transformer)
        pipe.transformer.register_forward_hook(lambda *_: kept.append(cache.computes))
        latents(pipe, 0, 6, **LARGE)
    assert True in kept and False in kept


def test_linear_layers_in_eight_bits_wait_and_are_refused():
    """torchao looks at the values of each tensor on the way, where nothing is compiled."""
    pytest.importorskip("torchao")
    pipe = pipeline(head_dim=128, heads=4)
    boost = Boost(quantize="int8", graphs=True)
    refused = pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph.*leave graphs")
    with boost.switch_on(pipe), sparse(pipe, "topk/sub@0.3"), refused:
        for _ in range(2):
            latents(pipe, 0, 4, **LARGE)


def test_a_forward_that_waits_is_refused_and_leaves_no_capture_behind():
    pipe = pipeline()

    def waits(module, args, out):
        out[0].sum().item()

    hook = pipe.transformer.blocks[0].norm1.register_forward_hook(waits)
    refused = pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph.*leave graphs")
    with graphed(pipe), refused:
        latents(pipe, steps=2)
    hook.remove()
    assert latents(pipe, steps=2).isfinite().all()
