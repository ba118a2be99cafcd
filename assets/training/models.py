"""The four parts of the embedded pipeline, untrained; every size in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from emoji_set import COLOURS, caption, words
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. The defaults are 17.5 M, 5.6 M and 1.5 M parameters."""

    layers: int = 10
    heads: int = 5
    head_dim: int = 64
    ffn: int = 1280
    text: int = 256
    text_layers: int = 2
    vae: int = 48
    latent: int = 16

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1:
            raise ValueError(f"Expected positive sizes, got {self}; use 1 or more.")


TINY = Sizes(layers=2, heads=1, head_dim=16, ffn=32, text=16, text_layers=1, vae=8, latent=4)


def build_vae(sizes: Sizes) -> AutoencoderKLWan:
    """8× in space and 4× in time: 2×2 patches, then two down-samplings."""
    return AutoencoderKLWan(
        base_dim=sizes.vae,
        z_dim=sizes.latent,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * sizes.latent,
        latents_std=[1.0] * sizes.latent,
    )


def build_transformer(sizes: Sizes) -> WanTransformer3DModel:
    """A Wan transformer whose output starts at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.latent,
        out_channels=sizes.latent,
        text_dim=sizes.text,
        freq_dim=256,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
        cross_attn_norm=True,
        rope_max_seq_len=1024,
    )
    transformer.proj_out.weight.data.zero_()
    transformer.proj_out.bias.data.zero_()
    return transformer


def build_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, lower case; a word that no caption has becomes <unk>."""
    return build_word_tokenizer({w for n in names for c in COLOURS for w in words(caption(n, c))})


def build_word_tokenizer(vocabulary: set[str]) -> PreTrainedTokenizerFast:
    """One token for each of these words, lower case; any other becomes <unk>."""
    ids = {word: i for i, word in enumerate(["<pad>", "<unk>", *sorted(vocabulary)])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w’'-]+"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(sizes: Sizes, vocabulary: int) -> UMT5EncoderModel:
    """A small UMT5 encoder, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=sizes.text,
        d_kv=64,
        d_ff=2 * sizes.text,
        num_layers=sizes.text_layers,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
    )
    return UMT5EncoderModel(config)


def build_scheduler(shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of a rectified flow; time shift 3, as in training."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)
