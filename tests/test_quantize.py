"""Linear layers in eight bits: near what they were, beside everything else, and put back."""

from importlib.util import find_spec

import pytest
import torch
from runs import run
from tiny import tiny_flux, tiny_wan
from torch import nn

from dit_accel import Schedule, TopK, accelerated
from dit_accel.finetune.student import add_lora
from dit_accel.generation import quantize
from dit_accel.generation.boost import Boost, compiled_blocks

torchao = pytest.mark.skipif(
    not find_spec("torchao"), reason='torchao is not installed: pip install "dit-accel[quantize]"'
)


def weights(transformer):
    return {name: (id(p), p.detach().clone()) for name, p in transformer.named_parameters()}


def same(before, after):
    return before.keys() == after.keys() and all(
        before[n][0] == after[n][0] and torch.equal(before[n][1], after[n][1]) for n in before
    )


def fuse_a_lora(pipe):
    add_lora(pipe.transformer, 2)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()


@torchao
@pytest.mark.parametrize("make", [tiny_wan, tiny_flux])
def test_the_layers_of_the_blocks_are_changed_and_put_back_bit_for_bit(make):
    pipe = make()
    before = weights(pipe.transformer)
    with Boost(quantize="int8").quantized(pipe):
        now = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
        changed = {n for n, m in now.items() if type(m.weight) is not nn.Parameter}
        assert changed and all("blocks." in name and "norm" not in name for name in changed)
        assert {n for n in now if "blocks." in n and "norm" not in n} == changed
    assert same(before, weights(pipe.transformer))


@torchao
@pytest.mark.parametrize("beside", ["nothing", "compile", "cache", "LoRA", "offload"])
def test_it_goes_with_sparse_attention_and(beside):
    pipe = tiny_wan()
    if beside == "LoRA":
        fuse_a_lora(pipe)
    if beside == "offload":
        from accelerate import cpu_offload_with_hook

        cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    config = {"method": TopK(keep=0.3), "schedule": Schedule(warmup=1), "min_tokens": 0}
    cache = 0.2 if beside == "cache" else None
    with Boost(step_cache=cache).switch_on(pipe), accelerated(pipe, **config):
        plain = run(pipe, steps=4)
    before = weights(pipe.transformer)
    with Boost(step_cache=cache, quantize="int8").switch_on(pipe):
        compiled = beside == "compile"
        with accelerated(pipe, **config) as handle:
            if compiled:
                with compiled_blocks(pipe.transformer, "eager"):
                    out = run(pipe, steps=4)
            else:
                out = run(pipe, steps=4)
    assert handle.report().kept < 1 and not handle.report().unplanned
    error = ((out - plain).norm() / plain.norm()).item()
    assert 0 < error < 0.1
    assert same(before, weights(pipe.transformer))


@torchao
def test_what_cannot_be_quantised_is_told_before_anything_is_changed(monkeypatch):
    pipe = tiny_wan()
    int8 = Boost(quantize="int8")
    before = weights(pipe.transformer)
    with int8.quantized(pipe), pytest.raises(ValueError, match="quantised already: leave"):
        int8.check(pipe)
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of compute capability 8.9 .* take int8"):
        Boost(quantize="fp8").check(pipe)
    monkeypatch.setattr(quantize, "_MULTIPLE", 10**6)
    with pytest.raises(ValueError, match="no linear layers of whole"):
        int8.check(pipe)
    monkeypatch.undo()
    assert same(before, weights(pipe.transformer))
    add_lora(pipe.transformer, 2)
    with pytest.raises(ValueError, match="has a LoRA beside its weights: fuse it"):
        int8.check(pipe)


@torchao
def test_weights_that_are_offloaded_one_by_one_are_refused():
    from accelerate import cpu_offload

    pipe = tiny_wan()
    cpu_offload(pipe.transformer, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded one by one: take model offload"):
        Boost(quantize="int8").check(pipe)


def test_a_wrong_word_a_lora_and_a_missing_package_are_told(monkeypatch):
    with pytest.raises(ValueError, match="quantize is int8 or fp8, not 'int4'"):
        Boost(quantize="int4")
    with pytest.raises(ValueError, match=r"fuse it, pipe.fuse_lora\(\)"):
        Boost(lora="folder", quantize="int8")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs torchao: pip install "dit-accel\[quantize\]"'):
        Boost(quantize="int8").check(tiny_wan())
