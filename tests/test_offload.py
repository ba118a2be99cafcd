"""Weights on the host, a window of blocks on the device: the same bits, told waits, words."""

import time

import pytest
import torch
from checkpoint_layouts import base, projections, trained, turbowan
from composition import METHODS, PIPES, go, options
from diffusers.hooks.group_offloading import ModuleGroup
from tiny import saved_lora, saved_tiny_wan, tiny_wan

import dit_accel
from dit_accel.app import launch
from dit_accel.batch import Settings
from dit_accel.batch.memory import Savings
from dit_accel.cli import main as cli
from dit_accel.generation import offload, quantize
from dit_accel.generation.arrival import waits_of
from dit_accel.generation.boost import Boost, compiled_blocks
from dit_accel.generation.loading import Defaults, load_pipeline
from dit_accel.generation.offload import Memory, Offload
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate

CPU = torch.device("cpu")
COLUMNS = (*METHODS, "pruning + topk")
REQUEST = Request("a cat", steps=3, height=64, width=64, frames=9)


def offloaded(make, blocks):
    pipe = make()
    Offload(blocks).switch_on(pipe, CPU)
    return pipe


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("model", PIPES)
def test_every_method_gives_the_same_bits(model, column):
    chosen = options(column, all_kept=False)
    pipe = PIPES[model]()
    dit_accel.accelerate(pipe, **chosen)
    expected = go(pipe)
    for blocks in (1, 2):
        pipe = offloaded(PIPES[model], blocks)
        handle = dit_accel.accelerate(pipe, **chosen)
        assert torch.equal(go(pipe), expected) and not handle.report().unplanned
        assert torch.equal(go(pipe), expected)


def test_every_block_comes_and_goes(monkeypatch):
    pipe, moved = tiny_wan(layers=3), []
    for name in ("onload_", "offload_"):
        real = getattr(ModuleGroup, name)
        monkeypatch.setattr(
            ModuleGroup, name, lambda self, n=name, r=real: moved.append((n, self)) or r(self)
        )
    Offload(2).switch_on(pipe, CPU)
    moved.clear()
    generate(pipe, Defaults(), REQUEST)
    blocks = set(pipe.transformer.blocks)
    groups = [(name, len(g.modules)) for name, g in moved if blocks & set(g.modules)]
    assert groups[:4] == [("onload_", 2), ("offload_", 2), ("onload_", 1), ("offload_", 1)]
    others = {type(m).__name__ for _, g in moved for m in g.modules}
    assert {"Embedding", "WanCausalConv3d"} & others  # text encoder and autoencoder by layers


def test_the_wait_for_weights_is_told(monkeypatch):
    pipe = offloaded(tiny_wan, 1)
    assert 0 < generate(pipe, Defaults(), REQUEST).memory.waiting < 1
    real = ModuleGroup.onload_
    monkeypatch.setattr(ModuleGroup, "onload_", lambda self: time.sleep(0.005) or real(self))
    result = generate(pipe, Defaults(), REQUEST)
    waited = result.memory.waiting * result.times.denoise
    forwards = 3 * (1 + (pipe.do_classifier_free_guidance is True))
    assert 0.005 * 3 * forwards <= waited < result.times.denoise  # the rest and two blocks
    assert generate(tiny_wan(), Defaults(), REQUEST).memory == Memory()
    assert str(Memory(7.31, 0.124)) == (
        "peak 7.3 GiB on the GPU, 12% of the denoising waited for weights"
    )
    assert str(Memory()) == ""


def latents(pipe):
    generator = torch.Generator().manual_seed(0)
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    return pipe("a cat", **call, generator=generator, output_type="latent").frames


def test_it_goes_with_compiled_blocks_a_step_cache_and_a_lora(tmp_path):
    folder = saved_lora(tmp_path)
    for boost in (Boost(step_cache=0.3), Boost(lora=str(folder))):
        plain, pipe = tiny_wan(), offloaded(tiny_wan, 1)
        with boost.beside(plain):
            expected = latents(plain)
        with boost.beside(pipe):
            assert torch.equal(latents(pipe), expected)
        assert torch.equal(latents(pipe), latents(tiny_wan()))
    pipe = offloaded(tiny_wan, 1)
    with compiled_blocks(pipe.transformer, "eager"):
        assert torch.equal(latents(pipe), latents(tiny_wan()))


def test_a_checkpoint_goes_where_the_weights_are_kept(tmp_path):
    other = trained()
    path = turbowan(tmp_path / "TurboWan2.1-T2V-1.3B.pth", other, projections(other))
    plain, pipe = base(), offloaded(base, 1)
    before = latents(plain)
    for one in (plain, pipe):
        dit_accel.load_checkpoint(one, path, attention=False)
    assert torch.equal(latents(pipe), latents(plain))
    assert not torch.equal(latents(plain), before)


def test_what_does_not_go_is_refused(monkeypatch):
    monkeypatch.setattr(quantize, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="take --offload without blocks, or leave quantize out"):
        Boost(quantize="int8").check(offloaded(tiny_wan, 1))
    pipe = tiny_wan()
    monkeypatch.setattr(type(pipe.transformer), "_supports_group_offloading", False)
    with pytest.raises(ValueError, match="does not move the blocks of WanTransformer3DModel"):
        Offload(1).switch_on(pipe, CPU)
    assert waits_of(pipe.transformer) is None


@pytest.mark.parametrize("blocks, streams", [(1, True), (4, False)])
def test_one_block_is_followed_by_the_next_while_it_runs(monkeypatch, blocks, streams):
    """diffusers prefetches single blocks only."""
    pipe, asked = tiny_wan(), {}
    monkeypatch.setattr(pipe.transformer, "enable_group_offload", lambda **how: asked.update(how))
    monkeypatch.setattr(offload, "_by_layers", lambda part, device: None)
    Offload(blocks).switch_on(pipe, torch.device("cuda"))
    assert asked["use_stream"] is streams and asked["num_blocks_per_group"] == blocks
    assert asked["offload_type"] == "block_level" and asked["onload_device"].type == "cuda"


def test_the_words_of_the_option():
    named = {word: Offload.named(word) for word in (False, True, "model", "blocks", "blocks:4")}
    assert named == {False: None, True: Offload(), "model": Offload()} | {
        "blocks": Offload(1),
        "blocks:4": Offload(4),
    }
    for word in ("", "block", "blocks:", "blocks:0", "blocks:x", "blocks:1001", "blocks:-1"):
        with pytest.raises(ValueError, match="offload is model, blocks, or so many blocks"):
            Offload.named(word)
    with pytest.raises(ValueError, match="offload is model"):
        Settings(offload="all")


@pytest.mark.parametrize(
    "words, asked",
    [
        (("--offload", "a cat"), True),
        (("a cat", "--offload"), True),
        (("--offload", "blocks", "a cat"), "blocks"),
        (("--offload", "blocks:4", "a cat"), "blocks:4"),
        (("a cat", "--offload=blocks"), "blocks"),
        (("a cat", "--offload", "--seed", "1"), True),
        (("--no-offload", "a cat"), False),
        (("--offload", "--no-offload", "a cat"), False),
        (("--", "a cat"), False),
    ],
)
def test_the_command_line(monkeypatch, words, asked):
    """--offload stands alone as ever; what follows is a value only where it is one of its words."""
    seen = []
    monkeypatch.setattr("dit_accel.cli.session.Offload.named", seen.append)
    monkeypatch.setattr("dit_accel.cli.session.find_model", lambda model: 1 / 0)
    words = ("--device", "cpu", *words)
    assert cli.run(["generate", *words]) == 1  # ZeroDivisionError: as far as this goes
    assert seen == [asked]


def test_without_a_gpu_nothing_is_moved(tmp_path, capsys):
    folder = saved_tiny_wan(tmp_path)
    with pytest.raises(ValueError, match="it needs --device cuda"):
        load_pipeline(folder, device="cpu", offload="blocks")
    for command in (["generate", "a cat"], ["compare", "a cat", "-o", str(tmp_path / "pair")]):
        words = ["--offload", "blocks", "--model", str(folder), "--device", "cpu"]
        assert cli.run([*command, *words]) == 2
    assert capsys.readouterr().err.count("it needs --device cuda") == 2
    with pytest.raises(ValueError, match="it needs --device cuda"):
        launch.studio("cpu", None, "blocks")


def test_a_batch_that_offloads_blocks_has_only_its_decoder_left_to_save():
    left = {word: len(Savings(None, CPU, 1, word)._left) for word in (False, True, "blocks")}
    assert left == {False: 3, True: 2, "blocks": 1}
