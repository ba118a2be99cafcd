"""The seam on stock pipelines: bit-exact pass-through, restore, rollback, clock, order, compile."""

import copy

import pytest
import torch
from diffusers import UNet2DModel, WanImageToVideoPipeline, WanVideoToVideoPipeline
from tiny import tiny_flux, tiny_wan

import dit_accel
from dit_accel import Dense, Schedule, TopK
from dit_accel.pipelines import registry

NOW = Schedule(warmup=0)


def run(pipe, steps=2, seed=0, height=64, width=64, frames=9, guidance=3.0, **more):
    generator = torch.Generator().manual_seed(seed)
    kwargs = dict(
        prompt="a rocket",
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
        max_sequence_length=16,
        **more,
    )
    if frames:
        kwargs["num_frames"] = frames
    return pipe(**kwargs)[0]


def run_flux(pipe, **more):
    return run(pipe, frames=None, **more)


PIPES = {"wan": (tiny_wan, run), "flux": (tiny_flux, run_flux)}


@pytest.fixture(params=PIPES, scope="module")
def case(request):
    build, go = PIPES[request.param]
    pipe = build()
    return pipe, go, go(pipe)


def processors(pipe):
    modules = pipe.transformer.named_modules()
    return {name: m.processor for name, m in modules if hasattr(m, "processor")}


def on(pipe, method, **options):
    return dit_accel.accelerated(pipe, method, **{"min_tokens": 0, "schedule": NOW, **options})


def test_dense_is_bit_equal_and_restore_bit_exact(case):
    pipe, go, stock = case
    before = {
        n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")
    }
    keys = set(pipe.transformer.__dict__)
    with on(pipe, Dense()) as handle:
        assert torch.equal(go(pipe), stock)
        assert handle.report().kept == 1
    with on(pipe, TopK(keep=0.2)) as handle:
        go(pipe)
        assert handle.report().layers[0]["sparse"]
    assert torch.equal(go(pipe), stock)
    assert before == processors(pipe) and keys == set(pipe.transformer.__dict__)
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks


def test_sparse_with_every_block_equals_dense(case):
    pipe, go, stock = case
    # 0.999 of 1 to 6 blocks rounds up to all of them, and runs the sparse operator
    with on(pipe, TopK(keep=0.999)) as handle:
        torch.testing.assert_close(go(pipe), stock, rtol=1e-3, atol=1e-3)
        report = handle.report()
    assert report.kept == 1 and not report.fallbacks and report.implementations


@pytest.mark.parametrize("order", ["tile", "hilbert"])
def test_token_order_changes_nothing_when_all_is_kept(case, order):
    pipe, go, stock = case
    with on(pipe, TopK(keep=0.999), order=order):
        torch.testing.assert_close(go(pipe), stock, rtol=1e-3, atol=1e-3)


def test_sparse_run_stays_close_and_reports_what_it_kept(case):
    pipe, go, stock = case
    grow = {"height": 128, "width": 128}
    stock = go(pipe, **grow)
    with on(pipe, TopK(keep=0.3)) as handle:
        out = go(pipe, **grow)
        report = handle.report()
    assert torch.isfinite(out).all() and not torch.equal(out, stock)
    assert 0.3 <= report.kept < 0.7
    assert all(row["sparse"] and not row["dense"] for row in report.layers)


def test_warmup_steps_and_dense_layers_run_dense():
    pipe = tiny_wan(layers=3)
    schedule = Schedule(warmup=1, dense_layers=(-1,))
    with on(pipe, TopK(keep=0.5), schedule=schedule) as handle:
        run(pipe, steps=3)
        report = handle.report()
    # 3 steps × 2 passes × 3 layers: the first step's 6 calls, then 1 of 3 layers in 4 forwards
    assert report.fallbacks == {"warm-up step": 6, "dense layer": 4} and not report.unplanned
    assert [(s["step"], s["passname"]) for s in report.steps] == [
        (step, name) for step in range(3) for name in ("cond", "uncond")
    ]
    assert all(s["seconds"] > 0 for s in report.steps)


def test_below_the_crossover_is_dense_with_the_reason():
    pipe = tiny_wan()
    with on(pipe, TopK(keep=0.5), min_tokens=None) as handle:
        run(pipe)
        report = handle.report()
    assert report.unplanned == {"48 tokens are fewer than the crossover of 512": 8}
    with (
        on(pipe, TopK(keep=0.5), min_tokens=100, strict=True),
        pytest.raises(RuntimeError, match="48 tokens are fewer than the crossover of 100"),
    ):
        run(pipe)


def test_second_generation_with_other_size_steps_and_guidance():
    pipe = tiny_wan()
    with on(pipe, TopK(keep=0.5)) as handle:
        first = run(pipe)
        run(pipe, steps=3, height=96, frames=5, guidance=1.0)
        report = handle.report()
        assert [s["step"] for s in report.steps] == [0, 1, 2] and report.generations == 2
        assert torch.equal(run(pipe), first)
        assert handle.report().generations == 3


def test_an_exception_in_the_middle_of_a_run_does_not_confuse_the_next():
    pipe = tiny_wan()

    def stop(pipe, step, t, kwargs):
        raise KeyboardInterrupt

    with on(pipe, TopK(keep=0.5)) as handle:
        first = run(pipe)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=stop)
        assert torch.equal(run(pipe), first) and handle.report().generations == 3


def test_two_pipes_do_not_affect_each_other():
    left, right = tiny_wan(), tiny_wan(seed=1)
    stock = run(right)
    with on(left, TopK(keep=0.2)):
        assert torch.equal(run(right), stock)
        with on(right, TopK(keep=0.5)) as handle:
            run(right)
            assert handle.report().config["method"]["keep"] == 0.5
        assert torch.equal(run(right), stock)


def test_accelerating_again_reconfigures():
    pipe = tiny_wan()
    stock = run(pipe)
    first = dit_accel.accelerate(pipe, TopK(keep=0.2), schedule=NOW, min_tokens=0)
    second = dit_accel.accelerate(pipe, Dense())
    assert second.active and not first.active
    assert torch.equal(run(pipe), stock)
    first.restore()
    assert second.active
    dit_accel.restore(pipe)
    dit_accel.restore(pipe)
    assert not second.active and torch.equal(run(pipe), stock)


def test_a_failure_half_way_leaves_the_pipe_as_it_was(monkeypatch):
    pipe = tiny_wan()
    stock = run(pipe)
    processors = [b.attn1.processor for b in pipe.transformer.blocks]

    def fail(processor):
        raise OSError("no")

    monkeypatch.setattr(pipe.transformer.blocks[1].attn1, "set_processor", fail)
    with pytest.raises(OSError):
        dit_accel.accelerate(pipe, TopK())
    monkeypatch.undo()
    assert [b.attn1.processor for b in pipe.transformer.blocks] == processors
    assert "_dit_accel" not in pipe.transformer.__dict__ and torch.equal(run(pipe), stock)


def test_a_failed_reconfiguration_keeps_the_old_one(monkeypatch):
    pipe = tiny_wan()
    old = dit_accel.accelerate(pipe, TopK(keep=0.5), schedule=NOW, min_tokens=0)
    sparse = run(pipe)
    with pytest.raises(ValueError):
        dit_accel.accelerate(pipe, "warp")
    hook = dit_accel.runtime.patch.Patch._hook_order

    def fail_for_dense(self):
        return 1 / 0 if self.engine.config.method == Dense() else hook(self)

    monkeypatch.setattr(dit_accel.runtime.patch.Patch, "_hook_order", fail_for_dense)
    with pytest.raises(ZeroDivisionError):
        dit_accel.accelerate(pipe, Dense())
    monkeypatch.undo()
    assert old.active
    with pytest.raises(ValueError, match="layers 0 to 1"):
        dit_accel.accelerate(pipe, TopK(), schedule=Schedule(dense_layers=(7,)))
    assert torch.equal(run(pipe), sparse)


def test_cross_attention_and_other_modules_are_untouched():
    pipe = tiny_wan()
    handle = dit_accel.accelerate(pipe, TopK())
    assert [row["name"] for row in handle.report().layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    assert type(pipe.transformer.blocks[0].attn2.processor) is WanAttnProcessor
    assert isinstance(pipe.transformer.blocks[0].attn1.processor, WanAttnProcessor)


def test_the_users_backend_serves_dense_calls_and_settings_survive_restore():
    pipe = tiny_wan()
    dit_accel.accelerate(pipe, TopK(), schedule=Schedule(warmup=1), min_tokens=0)
    for block in pipe.transformer.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    run(pipe)
    dit_accel.restore(pipe)
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == "_native_math"


def test_wan_22_has_one_clock_over_two_experts():
    pipe = tiny_wan(transformer_2=True, boundary_ratio=0.9)
    stock = run(pipe, steps=4)
    with on(pipe, TopK(keep=0.999), schedule=Schedule(warmup=1)) as handle:
        torch.testing.assert_close(run(pipe, steps=4), stock, rtol=1e-3, atol=1e-3)
        report = handle.report()
    assert report.fallbacks == {"warm-up step": 4} and len(report.layers) == 4
    assert [s["step"] for s in report.steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(run(pipe, steps=4), stock)


def test_video_to_video_counts_its_own_steps():
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    components = tiny_wan().components
    pipe = WanVideoToVideoPipeline(**{name: components[name] for name in names})
    video = [torch.rand(3, 64, 64) for _ in range(9)]
    go = {
        "video": video,
        "prompt": "a rocket",
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "strength": 0.5,
        "output_type": "latent",
        "max_sequence_length": 16,
    }
    with on(pipe, TopK(keep=0.5), schedule=Schedule(warmup=1)) as handle:
        pipe(**go, generator=torch.Generator().manual_seed(0))
        report = handle.report()
    assert [s["step"] for s in report.steps] == [0, 0, 1, 1]
    assert report.fallbacks == {"warm-up step": 4}


def test_image_to_video_leaves_image_attention_alone():
    pipe = tiny_wan(kind=WanImageToVideoPipeline, in_channels=36)
    image = torch.rand(1, 3, 64, 64)
    with on(pipe, TopK(keep=0.5)) as handle:
        pipe(
            image=image,
            prompt="a rocket",
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            output_type="latent",
            max_sequence_length=16,
        )
        assert handle.report().layers[0]["sparse"] == 4


def test_regional_compile_gives_one_graph_for_all_layers():
    pipe = tiny_wan(layers=4)
    stock = run(pipe)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with on(pipe, TopK(keep=0.999)):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=count)
        torch.testing.assert_close(run(pipe), stock, rtol=1e-3, atol=1e-3)
        assert len(graphs) == 1
        run(pipe, steps=3)
        assert len(graphs) == 1
    torch.testing.assert_close(run(pipe), stock, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_in_either_order(offload_first):
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    pipe = tiny_wan()
    stock = run(pipe)

    def offload():
        add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"))

    if offload_first:
        offload()
    handle = dit_accel.accelerate(pipe, TopK(keep=0.999), schedule=NOW, min_tokens=0)
    if not offload_first:
        offload()
    for _ in range(2):
        torch.testing.assert_close(run(pipe), stock, rtol=1e-3, atol=1e-3)
        remove_hook_from_module(pipe.transformer)  # what maybe_free_model_hooks does at each end
        offload()
    assert handle.report().generations == 2 and handle.report().layers[0]["sparse"] == 8
    handle.restore()
    assert torch.equal(run(pipe), stock)


def test_composes_with_a_step_cache_and_fused_projections():
    from diffusers import FirstBlockCacheConfig

    pipe = tiny_wan(layers=3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    stock = run(pipe, steps=3)
    with on(pipe, TopK(keep=0.999)) as handle:
        torch.testing.assert_close(run(pipe, steps=3), stock, rtol=1e-3, atol=1e-3)
        # cached steps run the first block only
        assert [row["sparse"] for row in handle.report().layers] == [6, 2, 2]
    assert torch.equal(run(pipe, steps=3), stock)


def test_deepcopy_of_a_restored_pipe_is_stock():
    pipe = tiny_wan()
    with on(pipe, TopK(keep=0.5)):
        run(pipe)
    assert torch.equal(run(copy.deepcopy(pipe)), run(pipe))


def test_objects_that_are_no_pipeline_are_refused():
    class Pipe:
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(4,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=2,
        )

    with pytest.raises(TypeError, match="Pipe has a UNet"):
        dit_accel.accelerate(Pipe())
    with pytest.raises(TypeError, match="int has no transformer"):
        dit_accel.accelerate(3)


def test_an_unknown_transformer_is_refused_by_name():
    class Strange(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="Strange has no adapter"):
        registry.find(Strange())


def test_methods_and_attention():
    assert {"dense", "topk"} <= set(dit_accel.methods())
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(
        dit_accel.attention(q, k, v, TopK(keep=0.999)), dense, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(dit_accel.attention(q, k, v, "dense"), dense)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(warmup=1.0), Schedule(0, cooldown=1)])
def test_a_schedule_that_leaves_nothing_is_told(case, schedule):
    pipe, go, stock = case
    with on(pipe, TopK(0.1), schedule=schedule) as handle:
        go(pipe, steps=1)
        (note,) = handle.report().notes
        assert note == "the schedule makes all 1 steps dense: lower warmup or cooldown"
        assert note in str(handle.report())
    with on(pipe, TopK(0.1)) as handle:
        go(pipe, steps=1)
        assert handle.report().notes == []
