"""Tiny random pipelines: stock diffusers classes, a fraction of a second to build, no download.

tiny_wan(): a whole text-to-video WanPipeline; tiny_flux(): a whole FluxPipeline (joint text-image);
saved_tiny_wan(folder): the first one written as a diffusers folder. Same seed, same weights.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["a", "rocket", "cat", "dog", "fish", "star", "on", "red", "blue", "green", "background"]
TEXT_DIM = 32


def tiny_tokenizer(max_length: int = 16) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends each prompt with </s> and pads with id 0."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w'-]+"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def _t5(kind: type, config: type) -> torch.nn.Module:
    return kind(
        config(
            vocab_size=len(WORDS) + 3,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def tiny_wan(
    layers: int = 2,
    head_dim: int = 64,
    heads: int = 2,
    seed: int = 0,
    kind: type = WanPipeline,
    in_channels: int = 16,
    transformer_2: bool = False,
    boundary_ratio: float | None = None,
) -> WanPipeline:
    """A WanPipeline whose 64x64, 9-frame clip is 3 x 4 x 4 = 48 tokens.

    Height and width are multiples of 16, frames 4k + 1. transformer_2 with boundary_ratio gives
    Wan 2.2's pair; kind=WanImageToVideoPipeline with in_channels=36 its image-to-video form.
    """
    torch.manual_seed(seed)

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=in_channels,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=64,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=256,
        ).eval()

    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    pipe = kind(
        tokenizer=tiny_tokenizer(),
        text_encoder=_t5(UMT5EncoderModel, UMT5Config),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(),
        transformer_2=transformer() if transformer_2 else None,
        boundary_ratio=boundary_ratio,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux(double: int = 1, single: int = 1, head_dim: int = 64, seed: int = 0) -> FluxPipeline:
    """A FluxPipeline with `double` joint and `single` fused blocks; 64x64 pixels are 256 tokens."""
    torch.manual_seed(seed)
    axes = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=axes,
    ).eval()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
            projection_dim=TEXT_DIM,
        )
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    ).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_t5(T5EncoderModel, T5Config),
        tokenizer_2=tiny_tokenizer(),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved_tiny_wan(folder: Path, generation: dict | None = None, **options: int) -> Path:
    """tiny_wan(**options) written to `folder` as diffusers does, with generation.json if given."""
    tiny_wan(**options).save_pretrained(folder)
    if generation is not None:
        Path(folder, "generation.json").write_text(json.dumps(generation))
    return Path(folder)


def saved_lora(folder: Path) -> Path:
    """A LoRA of rank 2 for tiny_wan() that changes what it makes, as diffusers writes it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_wan()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for name, weight in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    layers = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder
