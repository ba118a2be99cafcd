"""Everything of diffusers that dit_accel relies on, by name: a new release that moves one of these
fails here with a list of what moved, before anything else fails with a riddle."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from importlib import import_module

import diffusers
import pytest
from diffusers.models import attention_dispatch

from dit_accel.pipelines import registry

# processors whose code we re-bind: module under diffusers.models → classes
PROCESSORS = {
    "attention_processor": "AllegroAttnProcessor2_0 AttnProcessor2_0 AuraFlowAttnProcessor2_0 "
    "CogVideoXAttnProcessor2_0 HunyuanAttnProcessor2_0 JointAttnProcessor2_0 "
    "LuminaAttnProcessor2_0 MochiAttnProcessor2_0",
    "transformers.transformer_anyflow": "AnyFlowAttnProcessor",
    "transformers.transformer_bria": "BriaAttnProcessor",
    "transformers.transformer_bria_fibo": "BriaFiboAttnProcessor",
    "transformers.transformer_bria_fibo2": "BriaFibo2AttnProcessor",
    "transformers.transformer_chronoedit": "WanAttnProcessor",
    "transformers.transformer_cogview4": "CogView4AttnProcessor",
    "transformers.transformer_cosmos": "CosmosAttnProcessor2_0 CosmosAttnProcessor2_5",
    "transformers.transformer_easyanimate": "EasyAnimateAttnProcessor2_0",
    "transformers.transformer_ernie_image": "ErnieImageSingleStreamAttnProcessor",
    "transformers.transformer_flux": "FluxAttnProcessor FluxIPAdapterAttnProcessor",
    "transformers.transformer_flux2": "Flux2AttnProcessor Flux2ParallelSelfAttnProcessor",
    "transformers.transformer_flux3": "Flux3AttnProcessor",
    "transformers.transformer_glm_image": "GlmImageAttnProcessor",
    "transformers.transformer_helios": "HeliosAttnProcessor",
    "transformers.transformer_hidream_image": "HiDreamAttnProcessor",
    "transformers.transformer_hunyuan_video": "HunyuanVideoAttnProcessor2_0",
    "transformers.transformer_hunyuan_video15": "HunyuanVideo15AttnProcessor2_0",
    "transformers.transformer_hunyuanimage": "HunyuanImageAttnProcessor",
    "transformers.transformer_ideogram4": "Ideogram4AttnProcessor",
    "transformers.transformer_joyimage": "JoyImageAttnProcessor",
    "transformers.transformer_joyimage_edit_plus": "JoyImageEditPlusAttnProcessor",
    "transformers.transformer_kandinsky": "Kandinsky5AttnProcessor",
    "transformers.transformer_kandinsky6": "Kandinsky6AttnProcessor",
    "transformers.transformer_krea2": "Krea2AttnProcessor",
    "transformers.transformer_longcat_image": "LongCatImageAttnProcessor",
    "transformers.transformer_ltx": "LTXVideoAttnProcessor",
    "transformers.transformer_ltx2": "LTX2AudioVideoAttnProcessor LTX2PerturbedAttnProcessor",
    "transformers.transformer_lumina2": "Lumina2AttnProcessor2_0",
    "transformers.transformer_minimax_h3": "MiniMaxH3AttnProcessor",
    "transformers.transformer_motif_video": "MotifVideoAttnProcessor2_0",
    "transformers.transformer_nucleusmoe_image": "NucleusMoEAttnProcessor2_0",
    "transformers.transformer_ovis_image": "OvisImageAttnProcessor",
    "transformers.transformer_prx": "PRXAttnProcessor2_0",
    "transformers.transformer_qwenimage21": "QwenImage21AttnProcessor",
    "transformers.transformer_qwenimage": "QwenDoubleStreamAttnProcessor2_0",
    "transformers.transformer_skyreels_v2": "SkyReelsV2AttnProcessor",
    "transformers.transformer_wan": "WanAttnProcessor",
    "transformers.transformer_wan_animate": "WanAttnProcessor",
    "transformers.transformer_z_image": "ZSingleStreamAttnProcessor",
}
CALLS = {"dispatch_attention_fn", "scaled_dot_product_attention"}
# forward arguments that adapters read, besides hidden_states
ARGUMENTS = {
    "BriaFibo2Transformer2DModel": "context_latents encoder_attention_mask",
    "BriaFiboTransformer2DModel": "img_ids",
    "BriaTransformer2DModel": "img_ids",
    "ChromaTransformer2DModel": "img_ids controlnet_block_samples controlnet_single_block_samples",
    "Flux2Transformer2DModel": "img_ids kv_cache_mode",
    "Flux3Transformer2DModel": "img_ids image_cond_ids",
    "FluxTransformer2DModel": "img_ids encoder_hidden_states controlnet_block_samples "
    "controlnet_single_block_samples",
    "HunyuanVideoFramepackTransformer3DModel": "latents_clean latents_history_2x "
    "latents_history_4x",
    "GlmImageTransformer2DModel": "kv_caches attention_mask",
    "Ideogram4Transformer2DModel": "indicator segment_ids position_ids",
    "JoyImageEditPlusTransformer3DModel": "shape_list",
    "Kandinsky5Transformer3DModel": "sparse_params",
    "Krea2Transformer2DModel": "position_ids",
    "LTX2VideoTransformer3DModel": "num_frames height width timestep",
    "LTXVideoTransformer3DModel": "num_frames height width timestep",
    "LongCatImageTransformer2DModel": "img_ids",
    "Lumina2Transformer2DModel": "encoder_attention_mask",
    "MiniMaxH3Transformer3DModel": "video_indices position_ids",
    "NucleusMoEImageTransformer2DModel": "img_shapes",
    "OvisImageTransformer2DModel": "img_ids",
    "QwenImage21Transformer2DModel": "img_shapes encoder_hidden_states",
    "QwenImageTransformer2DModel": "img_shapes",
    "WanTransformer3DModel": "timestep",
    "WanVACETransformer3DModel": "timestep control_hidden_states",
    "ZImageTransformer2DModel": "x patch_size f_patch_size controlnet_block_samples",
}
DISPATCH = (
    "query key value attn_mask dropout_p is_causal scale enable_gqa attention_kwargs backend "
    "parallel_config"
)
# module → attributes; "Class.attribute" where it belongs to a class
ATTRIBUTES = {
    "diffusers.hooks._helpers": "AttentionProcessorRegistry.register "
    "AttentionProcessorRegistry.get",
    "diffusers.models.attention": "AttentionModuleMixin.set_processor",
    "diffusers.models.attention_dispatch": "_templated_context_parallel_attention",
    "diffusers.models.attention_processor": "Attention.set_processor",
    "diffusers.models.cache_utils": "CacheMixin.cache_context",
    "diffusers.models.embeddings": "apply_rotary_emb",
    "diffusers.models.modeling_utils": "ModelMixin.compile_repeated_blocks",
    "diffusers.schedulers": "FlowMatchEulerDiscreteScheduler.step_index "
    "FlowMatchEulerDiscreteScheduler.begin_index UniPCMultistepScheduler.step_index",
}
# fields of ContextParallelConfig
SHARED = "ring_degree ulysses_degree ulysses_anything _ulysses_mesh"


def gone() -> Iterator[str]:
    """What this release of diffusers no longer has, one sentence each."""
    for module, names in PROCESSORS.items():
        for name in names.split():
            kind = _get(f"diffusers.models.{module}", name)
            if kind is None:
                yield f"diffusers.models.{module} has no {name}"
            elif not CALLS & set(kind.__call__.__code__.co_names):
                yield f"{name}.__call__ calls neither of {', '.join(sorted(CALLS))}"
    for module, names in ATTRIBUTES.items():
        for name in names.split():
            if _get(module, name) is None:
                yield f"{module} has no {name}"
    yield from _forwards()
    fields = {field.name for field in dataclasses.fields(diffusers.ContextParallelConfig)}
    yield from (f"ContextParallelConfig has no {n}" for n in SHARED.split() if n not in fields)
    has = list(inspect.signature(attention_dispatch.dispatch_attention_fn).parameters)
    if has != DISPATCH.split():
        yield f"dispatch_attention_fn takes {' '.join(has)} instead of {DISPATCH}"


def _forwards() -> Iterator[str]:
    for name in registry.known():
        kind = getattr(diffusers, name, None)
        if kind is None:
            yield f"diffusers has no {name}"
            continue
        needs = ARGUMENTS.get(name, "hidden_states").split()
        lost = [n for n in needs if n not in inspect.signature(kind.forward).parameters]
        if lost:
            yield f"{name}.forward takes no {', '.join(lost)}"


def _get(module: str, path: str):
    try:
        found = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def test_diffusers_still_has_what_we_rely_on():
    lost = list(gone())
    assert not lost, f"diffusers {diffusers.__version__}:\n  " + "\n  ".join(lost)


def test_the_guard_names_what_is_gone(monkeypatch):
    from diffusers.models.transformers import transformer_wan

    monkeypatch.delattr(transformer_wan, "WanAttnProcessor")
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "forward", lambda self, x: x)
    lost = list(gone())
    assert lost == [
        "diffusers.models.transformers.transformer_wan has no WanAttnProcessor",
        "WanTransformer3DModel.forward takes no timestep",
    ]


@pytest.mark.parametrize("context", ["step_index", "num_inference_steps"])
def test_cache_context_announces(context):
    from diffusers.hooks.hooks import CacheContext

    assert context in inspect.signature(CacheContext).parameters
