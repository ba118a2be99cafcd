"""IP-Adapters on every pipeline of ours that takes one: attention to a picture of the user's."""

import inspect

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from drive import arguments, build, kind_of, pipelines
from support import ALL, NOW, flux_adapter, left_on

import dit_accel
from dit_accel import TokenPruning, TopK

TAKES = [n for n in sorted(pipelines()) if hasattr(kind_of(n), "load_ip_adapter")]
QUICK = ("ChromaPipeline", "FluxPipeline", "StableDiffusion3Pipeline")
HALF = TokenPruning(keep=0.5, start=1, end=0, first=1, last=None)
SIZE = {"height": 256, "width": 256}


def sd3_adapter(transformer):
    """Weights of an SD3 IP-Adapter with eight tokens, for pictures embedded in [n, 16]."""
    torch.manual_seed(5)
    config = transformer.config
    inner = config.num_attention_heads * config.attention_head_dim
    projection = IPAdapterTimeImageProjection(16, inner, 64, 4, 64, 1, 8, timestep_in_dim=16)
    layers = {}
    for i in range(len(transformer.attn_processors)):
        one = SD3IPAdapterJointAttnProcessor2_0(inner, inner, config.attention_head_dim, 64)
        layers |= {f"{i}.{name}": weight for name, weight in one.state_dict().items()}
    return {"image_proj": projection.state_dict(), "ip_adapter": layers}


def embedded(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(pipe, name):
    if "StableDiffusion3" in name:
        pipe.load_ip_adapter(sd3_adapter(pipe.transformer), image_encoder_folder=None)
        return
    # load_ip_adapter of Flux wants weights by name and an image encoder; this is what it ends in
    pipe.transformer._load_ip_adapter_weights([flux_adapter(pipe.transformer)])


def run(pipe, name, adapted):
    if name == "StableDiffusion3ControlNetInpaintingPipeline":
        pipe.check_inputs = lambda *rest, **more: None  # it wants a list, and takes a tensor then
    torch.manual_seed(0)
    given = arguments(name)
    given |= SIZE if "height" in given else {}
    if adapted and "StableDiffusion3" in name:
        given["ip_adapter_image_embeds"] = embedded(2, 5, 16)
    elif adapted:
        given["ip_adapter_image_embeds"] = [embedded(1, 1, 32)]
        given["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 32)]
    with torch.no_grad():
        return pipe(**given)[0]


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["load", "accelerate"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in TAKES]
)
def test_an_adapter_is_loaded_run_and_unloaded(name, first):
    pipe = build(name)
    plain = run(pipe, name, False)
    load(pipe, name)
    stock = run(pipe, name, True)
    assert not torch.equal(stock, plain)
    if first == "accelerate":
        pipe.unload_ip_adapter()
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    if first == "accelerate":
        load(pipe, name)
    near(run(pipe, name, True), stock)
    assert all(row["sparse"] + row["dense"] for row in handle.report().layers)
    handle.restore()
    assert left_on(pipe.transformer) == [] and torch.equal(run(pipe, name, True), stock)
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    pipe.unload_ip_adapter()
    near(run(pipe, name, False), plain)
    handle.restore()
    assert left_on(pipe.transformer) == [] and torch.equal(run(pipe, name, False), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ChromaPipeline", "FluxPipeline", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("options", [{"order": "hilbert"}, {"prune": HALF}], ids=["order", "prune"])
def test_sparse_with_an_adapter(name, options):
    pipe = build(name)
    load(pipe, name)
    stock = run(pipe, name, True)
    out = []
    for method in (TopK(**ALL), TopK(keep=0.3)):
        with dit_accel.accelerated(pipe, method, **NOW, **options) as handle:
            out.append(run(pipe, name, True))
            report = handle.report()
        assert not report.unplanned and all(row["sparse"] for row in report.layers)
    errors = [float((found - stock).norm() / stock.norm()) for found in out]
    assert errors[0] < (0.05 if "prune" in options else 1e-4) and errors[0] < errors[1] < 0.5


def test_the_picture_s_own_attention_is_left_dense_on_flux_and_counted_on_sd3():
    for name, calls in (("FluxPipeline", 1), ("StableDiffusion3Pipeline", 2)):
        pipe = build(name)
        load(pipe, name)
        with dit_accel.accelerated(pipe, TopK(keep=0.3), **NOW) as handle:
            run(pipe, name, True)
            assert {row["sparse"] for row in handle.report().layers} == {2 * calls}


def test_each_pipeline_that_takes_an_adapter_takes_its_embeddings():
    assert len(TAKES) > 10 and set(QUICK) <= set(TAKES)
    for name in TAKES:
        taken = inspect.signature(getattr(diffusers, name).__call__).parameters
        assert "ip_adapter_image_embeds" in taken, name
