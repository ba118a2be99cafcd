"""HunyuanVideo 1.5 distilled with SSTA: Tencent's names, a forward of the published form."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import checkpoint_layouts as layouts
import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.transformers import transformer_hunyuan_video15 as stock
from published import error, ssta
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoints.load import read

GRID, TILE = (5, 9, 17), (2, 4, 8)  # short on every side
PARAM = {
    "win_size": [[3, 1, 3]], "tile_size": [2, 4, 8], "ssta_topk": 8, "ssta_threshold": 0.0,
    "ssta_lambda": 0.7, "ssta_sampling_type": "importance", "ssta_adaptive_pool": None,
    "attn_sparse_type": "ssta", "attn_pad_type": "zero", "attn_use_text_mask": 1,
    "attn_mask_share_within_head": 0,
}  # fmt: skip


class Pipe:
    """As much of the pipeline as is needed."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.scheduler = None
        self.transformer = HunyuanVideo15Transformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=64,
            num_layers=2,
            num_refiner_layers=2,
            patch_size=2,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(16, 24, 24),
        ).eval()

    @torch.no_grad()
    def __call__(self):
        torch.manual_seed(0)
        t, h, w = GRID
        valid = SimpleNamespace(of=lambda n, *ls: torch.arange(n) < torch.tensor(ls)[:, None])
        return self.transformer(
            hidden_states=torch.randn(2, 4, t, 2 * h, 2 * w),
            timestep=torch.tensor([500.0, 500.0]),
            encoder_hidden_states=torch.randn(2, 20, 16),
            encoder_attention_mask=valid.of(20, 12, 7),
            encoder_hidden_states_2=torch.randn(2, 6, 8),
            encoder_attention_mask_2=valid.of(6, 4, 6),
            image_embeds=torch.randn(2, 3, 8),
            return_dict=False,
        )[0]


@contextmanager
def published(transformer):
    """Every attention of the blocks is the published SSTA."""
    attention, plain, inside = ssta(GRID, TILE, 8, (3, 1, 3), 0.7), stock.dispatch_attention_fn, []

    def dispatch(q, k, v, attn_mask=None, **more):
        if not inside:
            return plain(q, k, v, attn_mask=attn_mask, **more)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return attention(None, *heads, None, attn_mask[:, 0, 0]).transpose(1, 2)

    hooks = []
    for block in transformer.transformer_blocks:
        hooks.append(block.attn.register_forward_pre_hook(lambda *_: inside.append(1)))
        hooks.append(block.attn.register_forward_hook(lambda *_: inside.clear()))
    stock.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        stock.dispatch_attention_fn = plain
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def world():
    pipe = Pipe(3)
    with published(pipe.transformer):
        return pipe.transformer.state_dict(), pipe()


def saved(folder, tensors, param=PARAM):
    folder.mkdir(parents=True)
    save_file({n: x.contiguous() for n, x in tensors.items()}, folder / "model.safetensors")
    told = {"attn_mode": "flex-block-attn", "attn_param": param}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_the_published_layout(world, tmp_path):
    state, expected = world
    tensors = layouts.hunyuan(state) | {"double_blocks.9.lost": torch.zeros(1)}
    del tensors["img_in.proj.bias"]
    folder = saved(tmp_path / "720p_i2v_distilled_sparse", tensors)
    pipe = Pipe(4)
    bias = pipe.transformer.x_embedder.proj.bias.data
    bias.copy_(state["x_embedder.proj.bias"])
    found = dit_accel.load_checkpoint(pipe, folder, min_tokens=0)
    assert found.family == "HunyuanVideo 1.5 sparse" and found.sampler is None
    assert found.unused == ["double_blocks.9.lost"]
    assert found.missing == ["x_embedder.proj.bias"]
    assert len(found.found) == len(tensors) - 1
    method = found.config.method
    assert (method.name, method.most, method.tile, method.window) == ("ssta", 8, TILE, (3, 1, 3))
    assert "without guidance" in found.notes[0]
    assert error(pipe(), expected) < 1e-5
    assert not found.handle.report().unplanned
    dense = Pipe(3)()
    assert error(dense, expected) > 1e-3


def test_dense_attention_and_a_form_that_is_not_served(world, tmp_path):
    state, _ = world
    file = tmp_path / "720p_t2v.safetensors"
    save_file(layouts.hunyuan(state), file)
    pipe = Pipe(4)
    found = dit_accel.load_checkpoint(pipe, file)
    assert found.config is None and "no -sparse" in found.notes[0]
    assert all(torch.equal(x, state[n]) for n, x in pipe.transformer.state_dict().items())
    folder = saved(
        tmp_path / "a_sparse", layouts.hunyuan(state), PARAM | {"attn_pad_type": "repeat"}
    )
    with pytest.raises(ValueError, match="attn_pad_type='repeat' is not served"):
        dit_accel.load_checkpoint(pipe, folder)


@pytest.mark.parametrize(
    ("place", "sparse"),
    [("sparseness/720p_t2v", False), ("x/nonsparse_t2v", False), ("x/720p_t2v_sparse", True)],
)
def test_a_word_of_the_name(tmp_path, place, sparse):
    file = tmp_path / "a" / "b" / f"{place}.safetensors"  # the names of four places count
    file.parent.mkdir(parents=True)
    save_file({"double_blocks.0.img_attn_q.weight": torch.zeros(2, 2)}, file)
    (found,) = read(file)
    assert (found.method is not None) == sparse
