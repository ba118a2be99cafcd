"""What is put around a transformer is looked through; every denoiser of a pipeline is found."""

import socket

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from support import ALL, NOW, left_on, wan
from tiny import tiny_wan
from torch import nn
from zoo import Pipe, forward, zoo

import dit_accel
from dit_accel import TopK
from dit_accel.pipelines.denoisers import denoisers


def compiled(module):
    return torch.compile(module, backend="eager")


def adapted(module):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=True)
    return peft.get_peft_model(module, config)


@pytest.fixture(scope="module")
def group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def distributed(module):
    return nn.parallel.DistributedDataParallel(module)


def sharded(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


WRAPPERS = {"compile": compiled, "peft": adapted, "ddp": distributed, "fsdp2": sharded}


@pytest.mark.parametrize("first", ["wrap", "accelerate"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_transformer(name, first, group):
    torch._dynamo.reset()
    pipe = tiny_wan()
    stock, inner = wan(pipe), pipe.transformer
    if first == "wrap":
        pipe.transformer = WRAPPERS[name](pipe.transformer)
        forward_as_pipelines_do(pipe)
        wan(pipe)
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    if first == "accelerate":
        pipe.transformer = WRAPPERS[name](pipe.transformer)
        forward_as_pipelines_do(pipe)
    sparse = wan(pipe)
    report = handle.report()
    assert report.layers[0]["sparse"] == 4 and not report.notes
    assert not torch.allclose(sparse, stock, rtol=1e-3, atol=1e-3)
    assert [row["step"] for row in report.steps] == [0, 0, 1, 1]
    dit_accel.restore(pipe)
    assert left_on(inner) == [] and not handle.active
    torch.testing.assert_close(wan(pipe), stock, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def forward_as_pipelines_do(pipe):
    """DDP hides the model's own attributes; pipelines read these."""
    outer, inner = pipe.transformer, next(iter(denoisers(pipe).values()))
    for name in ("config", "dtype", "cache_context"):
        if not hasattr(outer, name):
            setattr(type(outer), name, property(lambda self, n=name: getattr(self.module, n)))
    assert type(inner).__name__.endswith("WanTransformer3DModel")


def test_an_unknown_wrapper_is_one_short_sentence():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(ValueError, match="^Strange has no adapter: .*register_adapter") as found:
        dit_accel.accelerate(Pipe(compiled(Strange())))
    assert len(str(found.value)) < 200


def ideogram():
    return Ideogram4Transformer2DModel(**zoo()["Ideogram4Transformer2DModel"].config).eval()


def test_a_denoiser_under_another_name_is_accelerated_too():
    case = zoo()["Ideogram4Transformer2DModel"]
    pipe = Pipe(case.build())
    pipe.unconditional_transformer = case.build()
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    with torch.no_grad():
        for module in (pipe.transformer, pipe.unconditional_transformer):
            forward(module, case.arguments())
    rows = handle.report().layers
    assert {row["name"].split(".")[0] for row in rows} == {
        "transformer",
        "unconditional_transformer",
    }
    assert all(row["sparse"] == 1 for row in rows)
    handle.restore()
    assert left_on(pipe.transformer) == left_on(pipe.unconditional_transformer) == []


@pytest.mark.parametrize("name", ["decoder", "prior", "refiner", "model"])
def test_any_name_will_do(name):
    class Holder:
        scheduler = None

    pipe = Holder()
    setattr(pipe, name, zoo()["WanTransformer3DModel"].build())
    assert list(denoisers(pipe)) == [name]
    handle = dit_accel.accelerate(pipe, TopK(), **NOW)
    handle.restore()
    assert left_on(getattr(pipe, name)) == []


def test_denoisers_in_a_list():
    class Holder:
        experts = [zoo()["WanTransformer3DModel"].build() for _ in range(2)]

    assert list(denoisers(Holder())) == ["experts.0", "experts.1"]
    assert len(dit_accel.accelerate(Holder(), TopK(), **NOW).report().layers) == 4


def test_a_denoiser_that_stays_stock_is_said():
    class SanaTransformer2DModel(nn.Module):
        pass

    pipe = Pipe(zoo()["WanTransformer3DModel"].build())
    pipe.refiner = SanaTransformer2DModel()
    notes = dit_accel.accelerate(pipe, TopK(), **NOW).report().notes
    assert notes[0].startswith(
        "refiner runs as it is: SanaTransformer2DModel is left as it is: its"
    )


def test_the_report_tells_a_replaced_transformer():
    pipe, other = tiny_wan(), tiny_wan(seed=1)
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    old, pipe.transformer = pipe.transformer, other.transformer
    wan(pipe)
    report = handle.report()
    replaced = "transformer was replaced since: the new one runs as it is"
    assert report.notes == [replaced, "no attention call came yet"]
    assert "nothing ran" in str(report) and replaced in str(report) and "100" not in str(report)
    pipe.transformer = old
    wan(pipe)
    assert not handle.report().notes
    handle.restore()
    assert handle.report().notes == ["restored: nothing of this runs any more"]


def test_the_report_tells_two_experts_apart():
    pipe = tiny_wan(transformer_2=True, boundary_ratio=0.9)
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), **NOW)
    wan(pipe, steps=4)
    rows = {row["name"]: row["sparse"] for row in handle.report().layers}
    assert rows == {
        "transformer.blocks.0.attn1": 2,
        "transformer.blocks.1.attn1": 2,
        "transformer_2.blocks.0.attn1": 6,
        "transformer_2.blocks.1.attn1": 6,
    }


def test_experts_of_unlike_depth_have_their_own_plans():
    pipe = tiny_wan(transformer_2=True, boundary_ratio=0.9)
    pipe.transformer_2 = tiny_wan(layers=3).transformer
    schedule = dit_accel.Schedule(warmup=0, dense_layers=(-1,))
    handle = dit_accel.accelerate(pipe, TopK(keep=0.3), schedule=schedule, min_tokens=0)
    wan(pipe, steps=4)
    dense = [row["name"] for row in handle.report().layers if not row["sparse"]]
    assert dense == ["transformer.blocks.1.attn1", "transformer_2.blocks.2.attn1"]
