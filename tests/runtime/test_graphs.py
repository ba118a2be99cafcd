"""Forwards that are replayed give what they give when they run, and leave everything as it was."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from graph_emulator import Emulated
from tiny import saved_lora, tiny_flux, tiny_wan
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel import AccelConfig, Pooled, Schedule, TokenPruning, accelerated, graphed
from dit_accel.generation.boost import Boost
from dit_accel.generation.comparison import compare
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.runtime import graphs
from dit_accel.runtime.recorded import MOST

METHODS = ("topk/sub@0.3", "shared@0.3", "pooled@0.3", "rettention@0.3", "rectified@0.3", "sla@0.3")
WAN = {"height": 64, "width": 64, "num_frames": 9}


def latents(pipe, seed=0, steps=5, **more):
    generator = torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"} | more
    if "Wan" in type(pipe).__name__:
        return pipe("a cat", **WAN | call).frames
    return pipe("a cat", **{"height": 64, "width": 64} | call).images


def sparse(pipe, method, **more):
    schedule = Schedule(warmup=1, cooldown=0)
    return accelerated(pipe, method, min_tokens=0, schedule=schedule, **more)


def told(handle):
    report = handle.report().to_dict()
    for step in report["steps"]:
        del step["seconds"]
    return report


@pytest.mark.parametrize("dense", [None, "native"])
@pytest.mark.parametrize("method", METHODS)
def test_a_generation_that_is_replayed_is_that_which_ran(method, dense):
    """With another seed, so that what is replayed cannot be what was recorded."""
    pipe = tiny_wan()
    with sparse(pipe, method, dense=dense) as handle:
        expected = [latents(pipe, seed) for seed in range(4)]
        wanted = told(handle)
    recorder = Emulated()
    together = graphs.graphed([pipe.transformer], recorder)
    with sparse(pipe, method, dense=dense) as handle, together:
        found = [latents(pipe, seed) for seed in range(4)]
        assert told(handle) == wanted
    torch.testing.assert_close(found, expected)
    forwards = len(wanted["steps"])
    assert (recorder.recorded, recorder.replayed) == (forwards, 3 * forwards)


@pytest.mark.parametrize("make", [tiny_wan, tiny_flux])
def test_a_stock_pipeline_has_one_graph_for_all_steps(make):
    pipe, recorder = make(), Emulated()
    expected = [latents(pipe, seed) for seed in range(2)]
    with graphs.graphed([pipe.transformer], recorder):
        found = [latents(pipe, seed) for seed in range(2)]
    torch.testing.assert_close(found, expected)
    assert recorder.recorded == 1
    assert "forward" not in vars(pipe.transformer)


def test_outputs_of_a_replay_are_their_owners():
    pipe, kept = tiny_wan(), []
    pipe.transformer.register_forward_hook(lambda m, a, out: kept.append(out[0]))
    with graphs.graphed([pipe.transformer], Emulated()):
        latents(pipe)
    assert len({x.data_ptr() for x in kept}) == len(kept)
    assert not torch.equal(kept[-1], kept[-2])


def test_other_shapes_steps_and_weights_have_graphs_of_their_own():
    pipe, recorder = tiny_wan(), Emulated()
    calls = [{}, {"steps": 4}, {"height": 96}]
    with sparse(pipe, "shared@0.3"):
        expected = [latents(pipe, **call) for call in calls]
    with sparse(pipe, "shared@0.3"), graphs.graphed([pipe.transformer], recorder):
        for _ in range(3):
            found = [latents(pipe, **call) for call in calls]
        torch.testing.assert_close(found, expected)
        replayed = recorder.replayed
        pipe.transformer.load_state_dict(
            {k: x.clone() * 1.1 for k, x in pipe.transformer.state_dict().items()}, assign=True
        )
        changed = latents(pipe)
        assert recorder.replayed == replayed
    with sparse(pipe, "shared@0.3"):
        torch.testing.assert_close(changed, latents(pipe))


def test_a_generation_that_leaves_the_recorded_path_runs_on_with_its_state():
    """Guidance that ends midway: the forwards after it were never seen."""
    pipe = tiny_wan()

    def ends_at(step):
        def callback(pipe, i, t, kwargs):
            if i == step:
                pipe._guidance_scale = 1.0
            return kwargs

        return callback

    with sparse(pipe, "shared@0.3"):
        expected = latents(pipe, callback_on_step_end=ends_at(2))
    recorder = Emulated()
    with sparse(pipe, "shared@0.3"), graphs.graphed([pipe.transformer], recorder):
        for _ in range(3):
            latents(pipe)
        seen = recorder.replayed
        found = latents(pipe, callback_on_step_end=ends_at(2))
        torch.testing.assert_close(found, expected)
        assert seen < recorder.replayed < seen + 10
        torch.testing.assert_close(latents(pipe, callback_on_step_end=ends_at(2)), expected)


def test_an_error_midway_does_not_reach_the_next_generation():
    pipe = tiny_wan()
    with sparse(pipe, "shared@0.3"):
        expected = latents(pipe)

    def fails(pipe, i, t, kwargs):
        if i == 2:
            raise KeyError
        return kwargs

    with sparse(pipe, "shared@0.3"), graphs.graphed([pipe.transformer], Emulated()):
        for _ in range(2):
            latents(pipe)
        with pytest.raises(KeyError):
            latents(pipe, callback_on_step_end=fails)
        torch.testing.assert_close(latents(pipe), expected)


def test_no_more_than_so_many_ways_to_begin_are_kept():
    pipe = tiny_wan()
    with graphs.graphed([pipe.transformer], Emulated()), sparse(pipe, "topk@0.3") as handle:
        own = pipe.transformer.forward.__func__.__closure__[0].cell_contents
        for steps in range(2, MOST + 5):
            latents(pipe, steps=steps)
        assert len(own.trees[handle._engine].root.next) == MOST


def test_watched_tables_are_heard_in_every_generation():
    pipe, heard = tiny_wan(), []
    with sparse(pipe, "topk@0.3") as handle, graphs.graphed([pipe.transformer], Emulated()):
        handle.watch(lambda layer, table: heard.append(layer))
        counts = []
        for _ in range(4):
            latents(pipe)
            counts.append(len(heard))
    assert counts == [counts[0] * n for n in range(1, 5)]


def test_gradients_run_as_ever():
    pipe, recorder = tiny_wan(), Emulated()
    x = torch.randn(1, 16, 3, 8, 8)
    text, t = torch.randn(1, 16, 32), torch.tensor([500.0])
    with graphs.graphed([pipe.transformer], recorder):
        for _ in range(3):
            pipe.transformer(x, t, text)[0].sum().backward()
    assert recorder.recorded == 0 and pipe.transformer.blocks[0].attn1.to_q.weight.grad is not None


def test_what_waits_for_the_gpu_is_refused_in_a_sentence():
    pipe = tiny_wan()
    block = pipe.transformer.blocks[0]
    block.register_forward_hook(lambda m, a, out: float(out.sum()) and None)
    with (
        graphs.graphed([pipe.transformer], Emulated()),
        pytest.raises(RuntimeError, match="capturing"),
    ):
        latents(pipe)
    assert torch.isfinite(latents(pipe)).all()


def test_what_has_no_graphs_is_refused_before_anything_runs():
    pipe = tiny_wan()
    with (
        pytest.raises(ValueError, match="are for transformers on one CUDA GPU.*on cpu"),
        graphed(pipe),
    ):
        pass
    with pytest.raises(ValueError, match="on one CUDA GPU"):
        Boost(graphs=True).check(pipe)
    pipe.transformer.forward = pipe.transformer.forward
    with (
        pytest.raises(ValueError, match="has been replaced"),
        graphs.graphed([pipe.transformer], Emulated()),
    ):
        pass
    del pipe.transformer.forward
    with (
        dit_accel.accelerated(pipe, "pooled", prune=TokenPruning(first=0, last=1), min_tokens=0),
        graphs.graphed([pipe.transformer], Emulated()),
        pytest.raises(RuntimeError, match="token pruning decides"),
    ):
        latents(pipe)
    assert "forward" not in vars(pipe.transformer)


@pytest.mark.parametrize("how", ["accelerate", "group"])
def test_offload_is_refused_before_and_in_a_block(how):
    """What is recorded reads weights where they lay."""
    pipe = tiny_wan()

    def offload():
        if how == "accelerate":
            add_hook_to_module(pipe.transformer.blocks[0], ModelHook())
        else:
            pipe.transformer.enable_group_offload(
                torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
            )

    with graphs.graphed([pipe.transformer], Emulated()):
        for _ in range(3):
            latents(pipe)
        offload()
        with pytest.raises(RuntimeError, match="cannot follow: leave out one"):
            latents(pipe)
    with (
        pytest.raises(ValueError, match="offload|group_offload.*leave graphs out"),
        graphs.graphed([pipe.transformer], Emulated()),
    ):
        pass


def test_a_comparison_with_graphs_times_what_is_replayed(tmp_path, monkeypatch):
    pipe = tiny_wan()
    defaults = Defaults(height=256, width=256, num_frames=9, num_inference_steps=4)
    request, config = (
        Request("a cat"),
        AccelConfig(Pooled(0.3), Schedule(warmup=1), min_tokens=0, dense="native"),
    )
    wanted = compare(pipe, defaults, request, config, tmp_path / "a").data
    made = []
    monkeypatch.setattr(graphs, "Cuda", lambda: made.append(Emulated()) or made[-1])
    found = compare(pipe, defaults, request, config, tmp_path / "b", boost=Boost(graphs=True)).data
    forwards = len(found["attention"]["steps"])
    # of the dense side all but the first forward, of the sparse one all but its first run
    assert made[-1].replayed == (3 * forwards - 1) + 2 * forwards
    assert found["kept"] == pytest.approx(wanted["kept"]) and found["kept"] < 1
    assert found["quality"]["psnr_mean"] == pytest.approx(wanted["quality"]["psnr_mean"], rel=1e-3)
    assert found["quality"]["psnr_mean"] < 100
    told = ("layers", "fallbacks", "implementations", "backends")
    assert [found["attention"][x] for x in told] == [wanted["attention"][x] for x in told]
    assert "CUDA graphs, dense run too" in (tmp_path / "b" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("scheduler", [True, False])
def test_a_lora_that_comes_or_changes_has_graphs_of_its_own(tmp_path, scheduler):
    pipe, recorder = tiny_wan(), Emulated()

    def scaled(scale):
        pipe.set_adapters(["it"], adapter_weights=[scale])
        return latents(pipe)

    folder, stock = saved_lora(tmp_path), latents(pipe)
    pipe.load_lora_weights(folder, adapter_name="it")
    expected = [scaled(1.0), scaled(0.3)]
    pipe.unload_lora_weights()
    with graphs.graphed([pipe.transformer], recorder, pipe.scheduler if scheduler else None):
        for _ in range(2):
            torch.testing.assert_close(latents(pipe), stock)
        pipe.load_lora_weights(folder, adapter_name="it")
        for _ in range(2):
            torch.testing.assert_close([scaled(1.0), scaled(0.3)], expected)
        pipe.disable_lora()
        torch.testing.assert_close(latents(pipe), stock)
        pipe.enable_lora()
        pipe.fuse_lora()
        torch.testing.assert_close(latents(pipe), expected[1])
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(latents(pipe), stock)
    assert recorder.recorded >= 4 and not torch.equal(stock, expected[0])


def test_a_pass_with_hooks_of_its_own_is_no_replay_of_another():
    """Perturbed guidance: some passes skip a block, by a hook that hangs there meanwhile."""
    pipe, recorder = tiny_wan(), Emulated()
    x, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 32)
    block, given = pipe.transformer.blocks[0], (x, torch.tensor([500.0]), text)

    def both():
        whole = pipe.transformer(*given)[0]
        hook = block.register_forward_hook(lambda m, args, out: args[0])
        skipped = pipe.transformer(*given)[0]
        hook.remove()
        return whole, skipped

    with torch.no_grad():
        expected = both()
        with graphs.graphed([pipe.transformer], recorder):
            for _ in range(3):
                torch.testing.assert_close(both(), expected)
    assert not torch.equal(*expected) and recorder.recorded == 2


def test_an_output_by_name_is_replayed_by_name():
    pipe, recorder = tiny_wan(), Emulated()
    x, text, t = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 32), torch.tensor([500.0])
    with torch.no_grad(), graphs.graphed([pipe.transformer], recorder):
        found = [pipe.transformer(x * n, t, text, return_dict=True).sample for n in (1, 2, 3)]
        again = pipe.transformer(x, t, text, return_dict=True).sample
    torch.testing.assert_close(again, found[0])
    assert recorder.replayed == 3 and not torch.equal(found[1], found[2])


def test_attention_that_a_mode_intercepts_is_no_replay_of_attention():
    pipe, recorder = tiny_wan(), Emulated()
    x, text, t = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 32), torch.tensor([500.0])

    class Values(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                return torch.zeros_like(kwargs["query"])
            return func(*args, **(kwargs or {}))

    def both():
        plain = pipe.transformer(x, t, text)[0]
        with Values():
            return plain, pipe.transformer(x, t, text)[0]

    with torch.no_grad():
        expected = both()
        with graphs.graphed([pipe.transformer], recorder):
            for _ in range(3):
                torch.testing.assert_close(both(), expected)
    assert not torch.equal(*expected)
