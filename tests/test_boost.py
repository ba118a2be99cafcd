"""Compiled blocks, step cache, LoRA: switched on for a while, gone afterwards."""

import copy
import gc
import json
from contextlib import contextmanager, suppress
from dataclasses import asdict

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from safetensors.torch import save_file
from tiny import saved_lora, saved_tiny_wan, tiny_flux, tiny_wan

from dit_accel import Pooled, Schedule, TokenPruning, at_speed, batch
from dit_accel.api import step_cache_of
from dit_accel.cli import main as cli
from dit_accel.config import AccelConfig
from dit_accel.generation import boost
from dit_accel.generation.boost import Boost, compiled_blocks
from dit_accel.generation.comparison import compare
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.pipelines.denoisers import transformers_of


def latents(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    return pipe("a cat", **call, generator=generator, output_type="latent").frames


@pytest.mark.parametrize("make", [tiny_wan, tiny_flux])
def test_blocks_are_compiled_and_then_not(make):
    transformer = make().transformer
    before = {name: module.__dict__.keys() for name, module in transformer.named_modules()}
    with compiled_blocks(transformer, "eager"):
        marked = [
            module
            for module in transformer.modules()
            if module._compiled_call_impl is not None or "forward" in module.__dict__
        ]
        assert len(marked) >= 2
    assert {n: m.__dict__.keys() for n, m in transformer.named_modules()} == before
    assert all(module._compiled_call_impl is None for module in transformer.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_of_a_block_with_hooks_what_they_call_is_compiled(fails):
    pipe, compiling = tiny_wan(), []
    expected = latents(pipe)

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            compiling.append(torch.compiler.is_compiling())
            return args, kwargs

    block = pipe.transformer.blocks[0]
    hooks = HookRegistry.check_if_exists_or_initialize(block)
    hooks.register_hook(Watch(), "watch")
    before = hooks._fn_refs[0].forward
    with suppress(KeyError), compiled_blocks(pipe.transformer, "eager"):
        assert block._compiled_call_impl is None and hooks._fn_refs[0].forward is not before
        torch.testing.assert_close(latents(pipe), expected)
        if fails:
            raise KeyError
    assert hooks._fn_refs[0].forward is before and compiling and not any(compiling)


def test_compiled_blocks_give_the_same():
    pipe = tiny_wan()
    expected = latents(pipe)
    with compiled_blocks(pipe.transformer, "eager"):
        torch.testing.assert_close(latents(pipe), expected)


def test_the_step_cache_skips_and_is_gone():
    pipe = tiny_wan()
    expected, calls = latents(pipe), []
    blocks = transformers_of(pipe)[0].blocks
    hook = blocks[-1].attn1.register_forward_hook(lambda *_: calls.append(1))
    latents(pipe)
    whole = len(calls)
    stack = Boost(step_cache=10.0).switch_on(pipe)
    skipped = latents(pipe)
    assert len(calls) - whole < whole
    assert not torch.equal(skipped, expected)
    stack.close()
    hook.remove()
    assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize("name", ["step_cache", "compile", "quantize", "lora", "profile"])
def test_what_is_switched_on_stays_on_though_nobody_holds_it(name, tmp_path):
    """As `dit-accel generate` and the Python text of a recipe have it."""
    pipe = tiny_wan(**({"head_dim": 128, "heads": 4} if name == "quantize" else {}))
    block = pipe.transformer.blocks[0]
    if name == "quantize":
        pytest.importorskip("torchao")
    if name == "lora":
        Boost(lora=str(saved_lora(tmp_path / "lora"))).switch_on(pipe)
    elif name == "profile":
        at_speed(pipe, "balanced")
    else:
        value = {"step_cache": 10.0, "compile": True, "quantize": "int8"}[name]
        Boost(**{name: value}).switch_on(pipe)
    gc.collect()
    on = {
        "step_cache": lambda: step_cache_of(pipe.transformer) is not None,
        "profile": lambda: step_cache_of(pipe.transformer) is not None,
        "compile": lambda: block._compiled_call_impl is not None,
        "quantize": lambda: type(block.ffn.net[2].weight) is not torch.nn.Parameter,
        "lora": lambda: bool(getattr(pipe.transformer, "peft_config", None)),
    }[name]
    assert on()
    for stack in list(vars(pipe)["_dit_accel_boosts"]):
        stack.close()
    assert not on() and "_dit_accel_boosts" not in vars(pipe)


def test_the_lora_is_the_accelerated_runs_alone(tmp_path):
    pipe = tiny_wan()
    expected = latents(pipe)
    pipe.load_lora_weights(saved_lora(tmp_path / "lora"))
    assert not torch.equal(latents(pipe), expected)
    with pytest.raises(ValueError, match="has a LoRA already"):
        Boost(lora=str(tmp_path / "lora")).check(pipe)
    adapted = latents(pipe)
    pipe.unload_lora_weights()
    stack = Boost(lora=str(tmp_path / "lora")).switch_on(pipe)
    torch.testing.assert_close(latents(pipe), adapted)
    stack.close()
    assert torch.equal(latents(pipe), expected)


def _pairs(prefix: str, channels: int = 128, wrong: int = 0) -> dict[str, torch.Tensor]:
    names = [f"{prefix}blocks.{i}.attn1.to_q" for i in (0, 1)]
    down = {f"{name}.lora_A.weight": torch.randn(4, channels + wrong) for name in names}
    return down | {f"{name}.lora_B.weight": torch.randn(channels, 4) for name in names}


@pytest.mark.parametrize("prefix", ["", "unet.", "text_encoder.", "wrong shape"])
def test_a_lora_that_adapts_nothing_or_does_not_fit_is_refused_and_leaves_nothing(prefix, tmp_path):
    pipe, file = tiny_wan(), tmp_path / "lora.safetensors"
    wrong = prefix == "wrong shape"
    save_file(_pairs("transformer." if wrong else prefix, wrong=wrong), file)
    names, expected = list(pipe.transformer.state_dict()), latents(pipe)
    said = "size mismatch" if wrong else "adapts nothing|does not suit"
    for use in (Boost(lora=str(file)).check, Boost(lora=str(file)).switch_on):
        with pytest.raises(ValueError, match=said):
            use(pipe)
        assert list(pipe.transformer.state_dict()) == names
        assert not getattr(pipe.transformer, "peft_config", None)
    assert torch.equal(latents(pipe), expected)


def test_a_lora_that_ctrl_c_interrupts_is_not_left_on(tmp_path, monkeypatch):
    pipe, folder = tiny_wan(), saved_lora(tmp_path / "lora")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    names = list(pipe.transformer.state_dict())
    with monkeypatch.context() as patched:
        patched.setattr("peft.set_peft_model_state_dict", stop)
        with pytest.raises(KeyboardInterrupt):
            Boost(lora=str(folder)).switch_on(pipe)
    assert list(pipe.transformer.state_dict()) == names
    Boost(lora=str(folder)).switch_on(pipe).close()


def test_adapters_that_the_user_loads_since_stay(tmp_path):
    pipe, mine = tiny_wan(), tmp_path / "mine.safetensors"
    save_file(_pairs("transformer."), mine)
    pipe.load_lora_weights(str(mine))
    alone = latents(pipe)
    pipe.unload_lora_weights()
    stack = Boost(lora=str(saved_lora(tmp_path / "lora"))).switch_on(pipe)
    pipe.load_lora_weights(str(mine), adapter_name="mine")
    stack.close()
    assert list(pipe.transformer.peft_config) == ["mine"]
    torch.testing.assert_close(latents(pipe), alone)


def test_a_lora_for_one_of_two_transformers_is_refused(tmp_path):
    pipe = tiny_wan(transformer_2=True, boundary_ratio=0.5)
    with pytest.raises(ValueError, match="two transformers"):
        Boost(lora=str(saved_lora(tmp_path / "lora"))).check(pipe)


def test_bad_values(tmp_path):
    with pytest.raises(ValueError, match="a LoRA changes the compiled blocks"):
        Boost(compile=True, lora="x")
    with pytest.raises(ValueError, match="there is no LoRA at"):
        Boost(lora=str(tmp_path / "none")).check(tiny_wan())
    with pytest.raises(ValueError, match="step_cache is a relative change > 0"):
        Boost(step_cache=-1.0)
    pipe = tiny_wan(layers=1)
    with pytest.raises(ValueError, match="it has one block only; every speed has a step cache"):
        Boost(step_cache=0.1).switch_on(pipe)
    assert not vars(pipe.transformer).get("_dit_accel_cache")


def test_compare_with_everything(tmp_path):
    pipe = tiny_wan(layers=4)
    config = AccelConfig(
        Pooled(0.5), Schedule(warmup=1), min_tokens=0, prune=TokenPruning(0.5, block=16, end=0)
    )
    request = Request("a cat", height=64, width=64, frames=9, steps=4)
    cache = Boost(step_cache=10.0)
    done = compare(pipe, Defaults.from_pipeline(pipe), request, config, tmp_path, boost=cache)
    assert done.data["boost"] == asdict(cache)
    assert f"{cache}.switch_on(pipe)" in done.data["python"]
    compile(done.data["python"], "recipe", "exec")
    page = (tmp_path / "report.html").read_text()
    assert "50% of the tokens in pruned steps; step cache at 10" in page
    assert "_dit_accel_cache" not in vars(pipe.transformer)


def test_options_become_a_configuration():
    from dit_accel.generation.options import How

    config = How(prune="fast").config()
    assert config.method.name == "pooled"
    assert config.prune == TokenPruning(**TokenPruning.presets["fast"])
    assert How(prune="0.4", method="topk").config().prune == TokenPruning(0.4)
    assert How().config().method.name == "shared"
    assert How(compile=True, step_cache=0.1).boost() == Boost(True, 0.1)


def test_from_the_command_line(tmp_path, monkeypatch):
    folder = saved_tiny_wan(tmp_path / "model", layers=4)
    monkeypatch.chdir(tmp_path)
    words = ["compare", "a cat", "--model", str(folder), "--size", "64x64", "--frames", "9"]
    words += ["--steps", "4", "--warmup", "1", "--min-tokens", "0", "-o", "out"]
    assert cli.run([*words, "--prune", "0.5", "--step-cache", "5"]) == 0
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["method"] == "pooled"
    assert data["boost"]["step_cache"] == 5.0


def test_a_copy_holds_nothing_of_what_was_switched_on():
    pipe = tiny_wan()
    Boost(step_cache=10.0).switch_on(pipe)
    other = copy.deepcopy(pipe)
    assert torch.equal(latents(other), latents(pipe))
    (stack,) = vars(pipe)["_dit_accel_boosts"]
    stack.close()
    assert step_cache_of(pipe.transformer) is None
    assert step_cache_of(other.transformer) is not None and not vars(other)["_dit_accel_boosts"]


def test_a_clip_and_its_recipe_have_the_step_cache(tmp_path, monkeypatch, capsys):
    folder = saved_tiny_wan(tmp_path / "model", layers=4)
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a cat", "--model", str(folder), "--size", "64x64", "--frames", "9"]
    words += ["--steps", "4", "--warmup", "1", "--min-tokens", "0", "-o", "cat.mp4"]
    assert cli.run([*words, "--method", "topk", "--step-cache", "5"]) == 0
    told = "step cache: 6 of the last 8 forwards skipped"
    assert told in capsys.readouterr().out
    assert cli.run(["show", "cat.mp4"]) == 0
    shown = capsys.readouterr().out
    exec(shown[shown.index("import torch") :], {})
    assert told in capsys.readouterr().out


def test_a_batch_with_compiled_blocks(tmp_path, monkeypatch):
    seen = []

    @contextmanager
    def eager(transformer):
        seen.append(transformer)
        with compiled_blocks(transformer, "eager"):
            yield

    monkeypatch.setattr(boost, "compiled_blocks", eager)
    pipe = tiny_wan()
    jobs = [{"prompt": "a cat", "height": 64, "width": 64, "frames": 9, "steps": 2}]
    summary = batch.run(jobs, tmp_path, settings=batch.Settings(compile=True), pipe=pipe)
    assert summary.done == 1
    assert seen == [pipe.transformer]
    assert all(module._compiled_call_impl is None for module in pipe.transformer.modules())


def test_blocks_that_the_user_compiled_are_compiled_again_afterwards():
    pipe = tiny_wan()
    blocks = list(pipe.transformer.blocks)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    before = [block._compiled_call_impl for block in blocks]
    with Boost(compile=True).compiled(pipe):
        assert all(b._compiled_call_impl is not own for b, own in zip(blocks, before, strict=True))
    assert [block._compiled_call_impl for block in blocks] == before
    assert None not in before
