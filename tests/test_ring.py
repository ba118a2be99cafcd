"""Queries that stay on two processes, keys that are gathered or go round: equal to one process."""

import json
from contextlib import ExitStack

import pytest
import torch
from forked import spawn
from runs import on
from tiny import tiny_flux, tiny_wan

from dit_accel import (
    SLA,
    VSA,
    Pooled,
    Rectified,
    Rettention,
    Schedule,
    SharedResidual,
    TopK,
    step_cached,
)
from dit_accel.bench.models import MODELS, build, inputs
from dit_accel.config import AccelConfig
from dit_accel.generation import compare
from dit_accel.generation.comparison import CLIPS
from dit_accel.generation.loading import Defaults
from dit_accel.generation.offload import Offload
from dit_accel.generation.request import Request
from dit_accel.media import video
from dit_accel.parallel import sharded, share
from dit_accel.parallel.context import Split
from dit_accel.table import BlockTable

HEADS = Schedule(warmup=0, head_keep=((0, (0.1, 0.6)), (1, (0.7, 0.2))))
WARM = Schedule(warmup=1)
WAN = {
    "topk": TopK(0.3),
    "sub": TopK(0.3, select="sub"),
    "pooled": Pooled(0.3),
    "rectified": Rectified(0.3),
    "shared": SharedResidual(0.3, period=2),
    "pooled residual": SharedResidual(0.3, period=2, residual="pooled"),
    "rettention": Rettention(0.3, period=2),
    "sla": SLA(0.3),
    "sla, gate": SLA(0.3, combine="gate", feature_map="elu"),
}
CASES = {f"wan, {name}": ("wan", method, {}) for name, method in WAN.items()} | {
    "wan, tile": ("wan", Pooled(0.3), {"order": "tile"}),
    "wan, budgets": ("wan", TopK(0.3), {"schedule": HEADS}),
    "wan, warm": ("wan", TopK(0.3), {"schedule": WARM}),
    "wan, blocks offloaded": ("wan offloaded", TopK(0.3), {}),
    "wan, cached": ("wan", TopK(0.3), {"cache": 0.75}),
    "three heads": ("three heads", TopK(0.3), {}),
    "flux": ("flux", Pooled(0.3), {}),
    "flux, hilbert": ("flux", TopK(0.3), {"order": "hilbert"}),
    "flux, odd text": ("flux odd", TopK(0.3), {}),
    "hunyuan": ("hunyuan", Pooled(0.3), {}),
}


def made(kind):
    """A tiny pipeline, the arguments of a call, and whether its tokens may not divide."""
    sizes = {"height": 128, "width": 128, "guidance_scale": 3.0, "prompt": "a red cat"}
    if kind == "hunyuan":
        pipe = build(MODELS["hunyuan-720p"], torch.device("cpu"), torch.float32, tiny=True)
        return pipe, inputs(MODELS["hunyuan-720p"], pipe, torch.device("cpu"), tiny=True), True
    if kind.startswith("flux"):
        text = 15 if kind == "flux odd" else 16
        return tiny_flux(), {**sizes, "max_sequence_length": text}, kind == "flux odd"
    pipe = tiny_wan(heads=3 if kind == "three heads" else 2)
    if kind == "wan offloaded":
        Offload(1).switch_on(pipe, torch.device("cpu"))
    return pipe, {**sizes, "num_frames": 9, "max_sequence_length": 16}, False


def learned(pipe, method):
    """A fine-tuned method with weights for each layer."""
    if not isinstance(method, SLA):
        return method
    torch.manual_seed(0)
    parts = {"gate": (1,)} if method.combine == "gate" else {"weight": (64, 64), "bias": (64,)}
    names = {
        f"layers.{i}.{part}": shape
        for i in range(len(pipe.transformer.blocks))
        for part, shape in parts.items()
    }
    return method.with_weights({name: torch.randn(shape) / 8 for name, shape in names.items()})


def run(pipe, call, method, options):
    """Latents of three steps, and the report."""
    call = {**call, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    options, skips = dict(options), ExitStack()
    if cache := options.pop("cache", None):
        skips.enter_context(step_cached(pipe, cache))
    with skips, on(pipe, learned(pipe, method), **options) as handle:
        return pipe(**call, num_inference_steps=3)[0], handle.report()


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2
    )
    went = []
    parts = sharded.Ring.parts
    sharded.Ring.parts = lambda self, k, v: went.append(1) or parts(self, k, v)
    found = {}
    for name, (kind, method, options) in CASES.items():
        alone, report = run(*made(kind)[:2], method, options)
        for kv in ("gather", "ring"):
            if (
                method is None
            ):  # CPU attention of diffusers gives no log-sum-exp: no ring of its own
                continue
            pipe, call, anything = made(kind)
            share(pipe, kv=kv, anything=anything)
            went.clear()
            together, shared = run(pipe, call, method, options)
            found[f"{name}, {kv}"] = {
                "error": float((alone - together).abs().max() / alone.abs().max()),
                "kept": (report.kept, shared.kept),
                "unplanned": shared.unplanned,
                "went": len(went),
            }
    pipe, call, _ = made("wan")
    share(pipe, kv="gather")
    _, report = run(pipe, call, VSA(0.3), {})
    found["refused"] = report.unplanned
    found["sides"] = sides(folder / str(rank))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def sides(folder):
    """How far both sides of a comparison by two processes are from those of one, in levels."""
    request = Request("a red cat", steps=3, height=256, width=256, frames=1, guidance=3.0)
    config = AccelConfig(TopK(0.3), Schedule(warmup=1), min_tokens=0)
    clips = {}
    for kv in (None, "gather", "ring"):
        pipe = tiny_wan()
        if kv is not None:
            share(pipe, kv=kv, anything=True)
        done = compare(pipe, Defaults(max_sequence_length=16), request, config, folder / str(kv))
        assert done.data["kept"] < 0.9 and done.data["attention"]["unplanned"] == {}
        clips[kv] = [video.read(done.files[name]).astype(int) for name in CLIPS[:2]]
    pairs = (pair for kv in ("gather", "ring") for pair in zip(clips[None], clips[kv], strict=True))
    return [int(abs(one - two).max()) for one, two in pairs]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ring")
    spawn(work, (folder,), 2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kv", ["gather", "ring"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(found, name, kv):
    results = [rank[f"{name}, {kv}"] for rank in found]
    method = CASES[name][1]
    for result in results:
        assert result["error"] < 1e-5 and result["unplanned"] == {}
        by_parts = kv == "ring" and method.by_parts
        assert (result["went"] > 0) == by_parts
    alone = results[0]["kept"][0]
    together = sum(result["kept"][1] for result in results) / 2
    assert together < 0.9 and together == pytest.approx(alone, abs=0.05)


def test_a_method_that_lays_out_the_whole_clip_is_dense_by_reason(found):
    for rank in found:
        assert list(rank["refused"]) == [
            "vsa lays a whole clip out: set ulysses_degree instead of ring_degree"
        ]


def test_both_sides_of_a_comparison_share_their_queries(found):
    """A stock pipeline would run diffusers' ring, which its CPU attention does not serve."""
    for rank in found:
        assert len(rank["sides"]) == 4 and max(rank["sides"]) <= 1


def routes(split, order, keys, block):
    return [
        sharded.route(split, order, keys, block, rank, torch.device("cpu"))
        for rank in range(split.ranks)
    ]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("text", [(0, False), (5, True), (7, False)])
def test_tokens_find_their_way(text, keys, ranks):
    """What `Route.go` exchanges, by hand."""
    split = Split(text[0], 70, text[1], False, ranks)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    ways, held = routes(split, order, keys, 16), split.held()
    sent = [way.send.split(way.sent) for way in ways]
    whole = []
    for rank, way in enumerate(ways):
        came = torch.cat([held[other][sent[other][rank]] for other in range(ranks)])
        assert [len(sent[other][rank]) for other in range(ranks)] == way.got
        whole.append(came[way.place])
        assert len(whole[-1]) == way.bounds[rank + 1] - way.bounds[rank]
        assert way.first % 16 == 0 and way.first == way.bounds[rank]
    visual = split.visual + order
    text = torch.arange(split.n_text) + (0 if split.text_first else 70)
    wanted = (
        visual if not keys else torch.cat([text, visual] if split.text_first else [visual, text])
    )
    assert torch.equal(torch.cat(whole), wanted)


def test_what_stays_is_not_sent():
    way = routes(Split(0, 64, False, False, 2), None, False, 16)[1]
    x = torch.arange(32.0)[None, :, None]
    assert way.stays and torch.equal(way.go(x, None), x) and torch.equal(way.back(x, None), x)
    assert not routes(Split(0, 64, False, False, 2), torch.arange(64).flip(0), False, 16)[0].stays
    assert sharded.part_bounds(100, 16, 3) == [0, 48, 80, 100]


def test_parts_of_a_table():
    mask = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    table = BlockTable.from_mask(mask, 16, 16, 75, 110)
    assert torch.equal(table.columns(32, 48).to_mask(), mask[..., 2:5])
    assert torch.equal(table.columns(80, 30).to_mask(), mask[..., 5:])
    assert torch.equal(table.rows(32, 43).to_mask(), mask[:, :, 2:])
    assert table.rows(16, 32).counts.shape == (2, 3, 2)


def test_parts_are_merged_by_their_log_sum_exp():
    logits = torch.randn(2, 2, 9, 30, generator=torch.Generator().manual_seed(0)).double() * 4
    logits[:, :, 0, :20] = -torch.inf  # a row of which two parts hold no key
    v = torch.randn(2, 2, 30, 8, dtype=torch.float64)
    merged = sharded.Merged()
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        lse = logits[..., part].logsumexp(-1)
        out = (logits[..., part] - lse[..., None]).exp().nan_to_num(0.0) @ v[:, :, part]
        merged.add(out.float(), lse.float())
    expected = logits.softmax(-1) @ v
    assert (merged.out - expected).abs().max() < 1e-5
    assert (merged.lse - logits.logsumexp(-1)).abs().max() < 1e-5


def test_another_kv_is_refused():
    with pytest.raises(ValueError, match="kv is 'gather', 'ring' or None"):
        share(tiny_wan(), kv="all")
