"""One generation over two processes: equal to one process, dense and sparse, joint models too."""

import json
from contextlib import ExitStack

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig
from forked import spawn
from tiny import tiny_flux, tiny_wan
from torch.distributed.device_mesh import init_device_mesh

import dit_accel
from dit_accel import Schedule, TokenPruning
from dit_accel.config import named
from dit_accel.generation.boost import compiled_blocks
from dit_accel.parallel import sharing, ulysses
from dit_accel.parallel.context import Split
from dit_accel.pipelines.base import Geometry
from dit_accel.pruning import criteria, select
from dit_accel.table import block_count, kept_blocks

NOW = Schedule(warmup=0)
HEADS = Schedule(warmup=0, head_keep=((0, (0.1, 0.6)), (1, (0.7, 0.2))))
UNLEVEL = Schedule(warmup=0, head_keep=((0, (0.6, 0.5, 0.2, 0.1)), (1, (0.1, 0.7, 0.2, 0.6))))
ODD = Schedule(warmup=0, head_keep=((0, (0.6, 0.5, 0.1)), (1, (0.1, 0.1, 0.5))))
WAN = {"build": "wan", "num_frames": 9, "max_sequence_length": 16}
FLUX = {"build": "flux", "max_sequence_length": 16}
CASES = {
    "wan": {**WAN},
    "wan-dense": {**WAN, "method": "dense"},
    "wan-tile": {**WAN, "options": {"order": "tile"}},
    "wan-rectified": {**WAN, "method": "rectified"},
    "wan-rettention": {**WAN, "method": "rettention"},
    "wan-pooled": {**WAN, "method": "pooled"},
    "wan-sla": {**WAN, "method": "sla"},
    "wan-heads": {**WAN, "options": {"schedule": HEADS}},
    "wan-level": {**WAN, "heads": 4, "options": {"schedule": UNLEVEL}},
    "wan-level-shared": {**WAN, "heads": 4, "method": "shared", "options": {"schedule": UNLEVEL}},
    "wan-level-odd": {**WAN, "heads": 3, "anything": True, "options": {"schedule": ODD}},
    "wan-shards-odd": {**WAN, "heads": 3, "anything": True, "select": "shards"},
    "wan-shards": {**WAN, "select": "shards"},
    "wan-anything": {**WAN, "anything": True},
    "wan-vsa": {**WAN, "method": "vsa", "gated": True},
    "wan-vsa-anything": {**WAN, "method": "vsa", "gated": True, "anything": True},
    "wan-ssta": {**WAN, "method": "ssta"},
    "wan-pruned": {**WAN, "prune": {"criterion": "stratified"}},
    "wan-pruned-drift": {**WAN, "prune": {"criterion": "drift", "block": 20}},
    "wan-compiled": {**WAN, "compiled": True},
    "wan-compiled-pruned": {**WAN, "compiled": True, "prune": {"criterion": "stratified"}},
    "wan-skipped": {**WAN, "prune": {"keep": 0.0, "block": 20}},
    "wan-cached": {**WAN, "cache": 0.75},
    "flux": {**FLUX},
    "flux-dense": {**FLUX, "method": "dense"},
    "flux-hilbert": {**FLUX, "options": {"order": "hilbert"}},
    "flux-cached": {**FLUX, "cache": 2.0},
    "flux-compiled": {**FLUX, "compiled": True},
    "flux-odd": {**FLUX, "max_sequence_length": 15, "anything": True},
}


REFUSED = {
    "text is shared": ("flux", {}),
    "take first=1": ("wan", {"first": 0}),
    "criterion='cfg' does not run": ("wan", {"criterion": "cfg"}),
    "restore='blend' does not run": ("wan", {"restore": "blend"}),
    "context='stale' does not run": ("wan", {"context": "stale"}),
    "anchor_frames would run more": ("wan", {"anchor_frames": 1}),
}


def in_halves(prune):
    """What two processes pick: as many blocks in each half of the tokens."""

    def pick(scores, count, block, always=None, threshold=None):
        n = scores.numel() // 2
        count = kept_blocks(prune.keep, block_count(n, block)) if prune.keep else 0
        short = torch.arange(n) >= n - n % block if n % block and prune.keep else None
        halves = [scores[:n]] * 2 if prune.criterion == "stratified" else scores.split(n)
        chosen = [criteria.pick(half, count, block, short) for half in halves]
        return torch.cat([chosen[0], chosen[1] + n])

    return pick


def generate(
    pipe,
    build,
    method="topk",
    options=(),
    anything=False,
    prune=None,
    compiled=False,
    gated=False,
    select="means",
    heads=2,
    cache=None,
    **kwargs,
):
    """Latents of three steps, and the report; stock for "dense"."""
    size = {"height": 128, "width": 128, **kwargs}
    generator = torch.Generator().manual_seed(0)

    def call():
        latents = pipe(
            "a red cat",
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=generator,
            output_type="latent",
            **size,
        )[0]
        return latents

    if method == "dense":
        return call(), None
    kind = type(named(method))
    if prune is not None:
        pruning = TokenPruning(refresh=2, start=1, end=0, last=None, **{"block": 16, **prune})
        options = {**dict(options), "prune": pruning}
    with ExitStack() as stack:
        if cache is not None:
            stack.enter_context(dit_accel.step_cached(pipe, cache))
        if compiled:
            stack.enter_context(compiled_blocks(pipe.transformer, "eager"))
        settings = {"schedule": NOW, "min_tokens": 0, **dict(options)}
        small = {"tile": (1, 8, 8), "window": (1, 1, 1)} if method == "ssta" else {}
        chosen = {"select": select} if select != "means" else {}
        made = kind(keep=0.3, **small, **chosen)
        if gated:
            torch.manual_seed(0)
            names = (f"layers.{i}.weight" for i in range(len(pipe.transformer.blocks)))
            width = pipe.transformer.config.num_attention_heads * 64
            made = made.with_weights({name: torch.randn(width, width) / 8 for name in names})
        handle = stack.enter_context(dit_accel.accelerated(pipe, made, **settings))
        return call(), handle.report()


def in_another_order(rank):
    """Each head, and its gate, comes to whom it is dealt to, and back; its error."""
    pipe = tiny_wan(heads=4)
    sharing.share(pipe)
    config = pipe.transformer.blocks[0].attn1.processor._parallel_config
    q = torch.arange(4.0).expand(1, 3, 4)[..., None] * torch.ones(8)
    seen = []

    def inner(q, k, v, mask, gate):
        seen.extend(int(x) for x in q[0, 0, :, 0])
        assert torch.equal(q, v) and torch.equal(2 * k, gate)
        return q + gate

    geometry = Geometry((1, 2, 3))

    def run(q, k, v, gate):
        return ulysses.gathered(q, k, v, None, config, geometry, inner, gate)

    out = ulysses.dealt(q, q, q, 2 * q, (0, 3, 1, 2), run)
    assert seen == [[0, 3], [1, 2]][rank]
    return float((out - 3 * q).abs().max())


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2
    )
    found = {}
    for name, case in CASES.items():
        heads = case.get("heads", 2)
        pipe = tiny_wan(heads=heads) if case["build"] == "wan" else tiny_flux()
        whole = select.pick
        if "prune" in case:
            select.pick = in_halves(TokenPruning(**case["prune"]))
        # compiled or not makes no difference here, and takes a second each time
        alone, report = generate(pipe, **{**case, "compiled": False})
        select.pick = whole
        sharing.share(pipe, anything=case.get("anything", False))
        together, shared = generate(pipe, **case)
        found[name] = {
            "error": float((alone - together).abs().max() / alone.abs().max()),
            "kept": (report.kept, shared.kept) if report else None,
            "unplanned": shared.unplanned if shared else None,
            "ran": [r.steps for r in (report, shared) if r],
            "tokens": [[f["tokens"] for f in r.steps] for r in (report, shared) if r],
        }
    found["refused"] = {}
    for says, (build, prune) in REFUSED.items():
        pipe = tiny_wan() if build == "wan" else tiny_flux()
        sharing.share(pipe)
        try:
            generate(pipe, build, prune=prune)
        except RuntimeError as error:
            found["refused"][says] = str(error)
    found["order"] = in_another_order(rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ulysses")
    spawn(work, (folder,), 2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(found, name):
    for rank in found:
        result = rank[name]
        assert result["error"] < 1e-5
        if "cache" in CASES[name]:
            ran = [{f["sparse"] for f in r} for r in result["ran"]]
            assert ran[0] == ran[1] == {1, 2}
        if "prune" in CASES[name]:
            alone, together = result["tokens"]
            assert alone == together and min(alone) < 0.7
        if result["kept"]:
            alone = result["kept"][0]
            together = sum(other[name]["kept"][1] for other in found) / 2
            assert together < 0.9 and together == pytest.approx(alone, abs=0.05)
            assert result["unplanned"] == {}


def test_heads_are_dealt_out_and_come_back(found):
    assert [rank["order"] for rank in found] == [0, 0]


def test_pruning_of_shared_tokens_is_refused_by_reason(found):
    for rank in found:
        for says in REFUSED:
            assert says in rank["refused"][says]


def test_places_of_shared_tokens():
    cpu = torch.device("cpu")
    there, back = ulysses.token_places(Split(5, 7, True, False, 2), cpu)
    # rank 0 brings text 0-2 and picture 5-8, rank 1 text 3-4 and picture 9-11
    assert back.tolist() == [0, 1, 2, 5, 6, 7, 8, 3, 4, 9, 10, 11]
    assert back[there].tolist() == list(range(12))
    _, back = ulysses.token_places(Split(2, 4, False, False, 2), cpu)
    assert back.tolist() == [0, 1, 4, 2, 3, 5]


def gather_masks(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=3
    )
    context = ContextParallelConfig(ulysses_degree=3, ulysses_anything=True)
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=context)
    config.setup(rank, 3, torch.device("cpu"), mesh=mesh)
    n = 5 if rank == 0 else 4
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
    mask[..., -1] = rank != 2
    whole = ulysses._whole_mask(mask, n, config)
    assert ulysses._whole_mask(whole, n, config) is whole
    (folder / f"{rank}.json").write_text(json.dumps(whole.flatten().tolist()))
    torch.distributed.destroy_process_group()


def test_masks_of_unequal_parts(tmp_path):
    """Three processes: with two, what fills up stands at the end."""
    spawn(gather_masks, (tmp_path,), 3)
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [True] * 12 + [False]


def test_a_ring_of_ulysses_stays_dense_with_the_reason():
    pipe = tiny_wan()
    handle = dit_accel.accelerate(pipe, "topk", schedule=NOW, min_tokens=0)
    both = ContextParallelConfig(ring_degree=2, ulysses_degree=2)
    both = ParallelConfig(context_parallel_config=both)
    seen = []

    def dispatch(q, k, v, **kwargs):
        seen.append(kwargs["parallel_config"])
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)

    for layer in handle._patches[0].layers:
        layer.processor._parallel_config = both
        layer.dispatch = dispatch
    generate_once(pipe)
    assert seen and all(config is both for config in seen)
    why = "ring_degree and ulysses_degree are both above 1: set one of them"
    assert set(handle.report().unplanned) == {why}
    handle.restore()
    handle = dit_accel.accelerate(pipe, "topk", schedule=NOW, min_tokens=0, strict=True)
    with pytest.raises(RuntimeError, match="set one of them"):
        generate_once(pipe)


def generate_once(pipe):
    pipe("a", height=64, width=64, num_frames=9, num_inference_steps=1, output_type="latent")


def test_sharing_needs_processes_and_a_plan(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="torchrun"):
        sharing.share(tiny_wan())
