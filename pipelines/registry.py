"""Transformer class name → adapter. Strings only: a family's file is imported when asked for."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from dit_accel.pipelines.base import Adapter

# file, or file:NAME where a file holds several adapters
_HOME = {
    "AllegroTransformer3DModel": "visual",
    "AnyFlowTransformer3DModel": "wan:ANYFLOW",
    "AuraFlowTransformer2DModel": "joint:AURAFLOW",
    "BriaFibo2Transformer2DModel": "bria_fibo2",
    "BriaFiboTransformer2DModel": "packed",
    "BriaTransformer2DModel": "packed:DOUBLE",
    "ChromaTransformer2DModel": "packed:CHROMA",
    "ChronoEditTransformer3DModel": "wan",
    "CogVideoXTransformer3DModel": "cogvideox",
    "CogView3PlusTransformer2DModel": "cogvideox:COGVIEW3",
    "CogView4Transformer2DModel": "cogvideox:COGVIEW",
    "ConsisIDTransformer3DModel": "cogvideox:CONSISID",
    "CosmosTransformer3DModel": "visual:COSMOS",
    "DiTTransformer2DModel": "visual:DIT",
    "EasyAnimateTransformer3DModel": "joint:EASYANIMATE",
    "ErnieImageTransformer2DModel": "joint:ERNIE",
    "Flux2Transformer2DModel": "packed:FLUX2",
    "Flux3Transformer2DModel": "packed:FLUX3",
    "FluxTransformer2DModel": "flux",
    "GlmImageTransformer2DModel": "cogvideox:GLM",
    "HeliosTransformer3DModel": "wan:HELIOS",
    "HiDreamImageTransformer2DModel": "joint:HIDREAM",
    "HunyuanDiT2DModel": "visual:HUNYUAN_DIT",
    "HunyuanImageTransformer2DModel": "hunyuan_video:IMAGE",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanVideoFramepackTransformer3DModel": "hunyuan_video:FRAMEPACK",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "Ideogram4Transformer2DModel": "one_row:IDEOGRAM",
    "JoyImageEditPlusTransformer3DModel": "joyimage:PLUS",
    "JoyImageEditTransformer3DModel": "joyimage",
    "Kandinsky5Transformer3DModel": "kandinsky",
    "Kandinsky6Transformer3DModel": "kandinsky:SIX",
    "Krea2Transformer2DModel": "packed:KREA2",
    "LTX2VideoTransformer3DModel": "ltx:LTX2",
    "LTXVideoTransformer3DModel": "ltx",
    "LatteTransformer3DModel": "visual:LATTE",
    "LongCatImageTransformer2DModel": "packed:DOUBLE",
    "Lumina2Transformer2DModel": "joint:LUMINA2",
    "LuminaNextDiT2DModel": "visual:LUMINA_NEXT",
    "MiniMaxH3Transformer3DModel": "one_row:MINIMAX",
    "MochiTransformer3DModel": "mochi",
    "MotifVideoTransformer3DModel": "hunyuan_video:MOTIF",
    "NucleusMoEImageTransformer2DModel": "packed:NUCLEUS",
    "OvisImageTransformer2DModel": "packed:DOUBLE",
    "PRXTransformer2DModel": "joint:PRX",
    "PixArtTransformer2DModel": "visual:PIXART",
    "QwenImage21Transformer2DModel": "one_row:QWEN21",
    "QwenImageTransformer2DModel": "packed:QWEN",
    "SD3Transformer2DModel": "joint:SD3",
    "SkyReelsV2Transformer3DModel": "wan:SKYREELS",
    "WanAnimateTransformer3DModel": "wan:ANIMATE",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan:VACE",
    "ZImageTransformer2DModel": "joint:Z_IMAGE",
}
_LINEAR = "its self-attention is linear already, so there is nothing to accelerate"
_SOUND = "it makes sound, a row of tokens without a grid"
_LEFT_ALONE = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR,
    "AnyFlowFARTransformer3DModel": "it attends causally, through a key-value cache",
    "WanAnimate2Transformer3DModel": "it attends through a key-value cache and a block mask",
    "Cosmos3OmniTransformer": "it attends causally to text, sound and actions in one sequence",
    "OmniGenTransformer2DModel": "it attends causally, as a language model does",
    "Kandinsky6SRTransformer3DModel": "it attends through its own sparse mask (NABLA) only",
    "SanaWMLTX2RefinerTransformer3DModel": "it attends through a key-value cache",
    "DreamLiteTransformer2DModel": "it is a part of a U-Net",
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": "it writes codes of sound one by one, as a language model does",
    "PriorTransformer": "it denoises the embedding of a picture, a handful of tokens",
    "RFD4ProteinaTransformer": "it makes proteins; each pair of atoms adds a bias to the scores",
    "Transformer2DModel": "it is a part of U-Nets, or, in VQ Diffusion, guesses codes by class",
    "TransformerTemporalModel": "it is a part of a U-Net",
    "UniDiffuserModel": "it is a U-ViT over text and picture, each block fed by an earlier one",
    "UTransformer2DModel": "it is a part of UniDiffuser's U-ViT",
    "UVit2DModel": "its layers lie between the convolutions of a U-Net",
}
_EXTRA: dict[str, Adapter] = {}


def known() -> list[str]:
    """Names of the transformer classes that have an adapter."""
    return sorted({**_HOME, **_EXTRA})


def left_alone() -> dict[str, str]:
    """Transformer classes that are refused, and why."""
    return dict(_LEFT_ALONE)


def name_of(transformer: nn.Module) -> str:
    """The name under which a module's class is known here, or "".

    A subclass that runs its parent's forward (FSDP makes one) counts as its parent.
    """
    kind = type(transformer)
    for base in kind.__mro__:
        name = base.__name__
        if name in _EXTRA or name in _HOME or name in _LEFT_ALONE:
            return name if getattr(base, "forward", None) is kind.forward else ""
    return ""


def named(name: str) -> Adapter:
    """The adapter of a transformer class; ValueError where there is none."""
    if name in _EXTRA:
        return _EXTRA[name]
    if name in _LEFT_ALONE:
        raise ValueError(f"{name} is left as it is: {_LEFT_ALONE[name]}")
    file, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(f"dit_accel.pipelines.{file}"), attribute or "ADAPTER")


def find(transformer: nn.Module) -> Adapter:
    """The adapter of a transformer; ValueError says what to do when there is none."""
    name = name_of(transformer)
    if not name:
        raise ValueError(
            f"{type(transformer).__name__} has no adapter: write one and register it with "
            "dit_accel.register_adapter; those there are stand in docs/reference/models.md"
        )
    return named(name)


def register_adapter(adapter: Adapter) -> None:
    """Make `accelerate` know the transformer classes of `adapter` (it wins over a built-in one)."""
    if not isinstance(adapter, Adapter):
        raise TypeError(f"an adapter is a dit_accel Adapter, not {type(adapter).__name__}")
    _EXTRA.update(dict.fromkeys(adapter.classes, adapter))
