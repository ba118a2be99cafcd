"""Training over two processes: gradients, summed over them, are those of one."""

import json

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from tiny import tiny_flux, tiny_wan

import dit_accel
from dit_accel import SLA, VSA, Pooled, Schedule, TopK
from dit_accel.parallel import share

NOW = Schedule(warmup=0)
HEADS = Schedule(warmup=0, head_keep=((0, (0.6, 0.5, 0.2, 0.1)), (1, (0.1, 0.7, 0.2, 0.6))))
WAYS = {"gather": "gather", "ring": "ring", "ulysses": None}
CASES = {
    "topk": ("wan", TopK(0.3, select="sub"), {}),
    "pooled, tile": ("wan", Pooled(0.3), {"order": "tile"}),
    "sla": ("wan", SLA(0.3), {}),
    "budgets": ("wan", TopK(0.3), {"schedule": HEADS}),
    "warm": ("wan", TopK(0.3), {"schedule": Schedule(warmup=1)}),
    "vsa": ("wan", VSA(0.3), {}),
    "flux": ("flux", Pooled(0.3), {}),
}

PAIRS = [f"{name}, {way}" for name in CASES for way in WAYS if name != "vsa" or way == "ulysses"]


def made(kind, method):
    """A tiny pipeline, the method with what it has learned, and the arguments of a forward."""
    pipe = tiny_wan(heads=4) if kind == "wan" else tiny_flux()
    torch.manual_seed(0)
    width, layers = 4 * 64, range(2)
    if isinstance(method, SLA):
        learned = {"weight": (64, 64), "bias": (64,)}
        names = {f"layers.{i}.{name}": shape for i in layers for name, shape in learned.items()}
        method = method.with_weights({name: torch.randn(x) / 8 for name, x in names.items()})
    if isinstance(method, VSA):
        gates = {f"layers.{i}.weight": torch.randn(width, width) / 16 for i in layers}
        method = method.with_weights(gates)
    text = torch.randn(1, 16, 32)
    if kind == "wan":
        given = {"hidden_states": torch.randn(1, 16, 3, 16, 16), "timestep": torch.tensor([300.0])}
        return pipe, method, {**given, "encoder_hidden_states": text}
    config = pipe.transformer.config
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    return pipe, method, {
        "hidden_states": torch.randn(1, 256, config.in_channels),
        "encoder_hidden_states": torch.randn(1, 16, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.3]),
        "guidance": torch.tensor([3.5]) if config.guidance_embeds else None,
        "img_ids": places,
        "txt_ids": torch.zeros(16, 3),
    }  # fmt: skip


def gradients(pipe, method, given, options):
    """The gradients of a loss of the whole output, of what this process has of them."""
    model = pipe.transformer.requires_grad_(True)
    goal = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(1))
    with dit_accel.accelerated(pipe, method, **{"schedule": NOW, "min_tokens": 0, **options}) as on:
        out = model(**given, return_dict=False)[0]
        ((out - goal) ** 2).mean().backward()
        assert on.report().unplanned == {}
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    found = {}
    for name, (kind, method, options) in CASES.items():
        alone = gradients(*made(kind, method), options)
        for way, kv in WAYS.items():
            if f"{name}, {way}" not in PAIRS:
                continue
            pipe, own, given = made(kind, method)
            share(pipe, kv=kv)
            mine = gradients(pipe, own, given, options)
            assert mine.keys() == alone.keys()
            part = max(float((mine[x] - alone[x]).abs().max()) for x in mine)
            for grad in mine.values():
                dist.all_reduce(grad)
            norm = max(float(grad.abs().max()) for grad in alone.values())
            error = max(float((mine[x] - alone[x]).abs().max()) for x in mine)
            found[f"{name}, {way}"] = (error / norm, part / norm)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    spawn(work, (folder,), 2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_of_two_processes_are_those_of_one(found, pair):
    for rank in found:
        error, part = rank[pair]
        assert error < 1e-5 < part  # of one process alone it is a part
