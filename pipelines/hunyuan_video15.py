"""HunyuanVideo 1.5: visual tokens first, then image, glyph and prompt tokens, padded ones last.

diffusers' processor builds the N × N product of valid queries and valid keys in each layer (2.5 GB
at 50 000 tokens) though only padded queries, whose result nobody reads, gain by it. Ours hands on
the [B, 1, 1, N] key padding, for dense calls too.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

from dit_accel.pipelines.base import Adapter, Site, SpanSite, StandIn
from dit_accel.pipelines.grids import latents


def with_key_padding(
    self,
    attn,
    hidden_states,
    encoder_hidden_states=None,
    attention_mask=None,
    image_rotary_emb=None,
):
    """The processor's `__call__` with a key mask; q, k, v as the model makes them."""

    def heads(project, x, norm=None):
        x = project(x).unflatten(2, (attn.heads, -1))
        return x if norm is None else norm(x)

    video, text = hidden_states, encoder_hidden_states
    q, k = heads(attn.to_q, video, attn.norm_q), heads(attn.to_k, video, attn.norm_k)
    v = heads(attn.to_v, video)
    if image_rotary_emb is not None:
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
    if text is not None:
        q = torch.cat([q, heads(attn.add_q_proj, text, attn.norm_added_q)], dim=1)
        k = torch.cat([k, heads(attn.add_k_proj, text, attn.norm_added_k)], dim=1)
        v = torch.cat([v, heads(attn.add_v_proj, text)], dim=1)
    padding = (q.shape[1] - attention_mask.shape[1], 0)
    out = dispatch_attention_fn(
        q,
        k,
        v,
        attn_mask=F.pad(attention_mask.bool(), padding, value=True)[:, None, None],
        backend=self._attention_backend,
        parallel_config=self._parallel_config,
    )
    out = out.flatten(2, 3).to(q.dtype)
    video, text = out[:, : video.shape[1]], None if text is None else out[:, video.shape[1] :]
    for layer in attn.to_out:
        video = layer(video)
    return video, text if text is None else attn.to_add_out(text)


_NAMES = """
    F _attention_backend _parallel_config add_k_proj add_q_proj add_v_proj apply_rotary_emb bool cat
    dispatch_attention_fn dtype embeddings flatten getattr heads norm_added_k norm_added_q norm_k
    norm_q pad repeat shape to to_add_out to_k to_out to_q to_v torch transpose unflatten view
"""
ADAPTER = Adapter(
    classes=("HunyuanVideo15Transformer3DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=latents("last", same_mask=True),
    enter=(Site("rope", 0), Site("x_embedder", 1)),
    leave=Site("proj_out", 1),
    stand_in=StandIn(with_key_padding, _NAMES),
    # freqs_cis: cosines and sines [N, D]
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        (("freqs_cis", 0, 2),),
        ("attn", "ff"),
        text="encoder_hidden_states",
    ),
)
