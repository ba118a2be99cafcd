"""What the tests of living pipelines share."""

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry

from dit_accel import Schedule

NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}
ALL = {"keep": 0.999}  # rounds up to every block, and runs the sparse operator


def wan(pipe, steps=2, seed=0, size=128, **more):
    """Latents of a tiny Wan clip."""
    arguments = {
        "prompt": "a rocket",
        "height": size,
        "width": size,
        "num_frames": 9,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "max_sequence_length": 16,
    }
    return pipe(**arguments | more)[0]


def flux(pipe, steps=2, seed=0, **more):
    """Latents of a tiny Flux picture."""
    arguments = {
        "prompt": "a rocket",
        "height": 64,
        "width": 64,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "max_sequence_length": 16,
    }
    return pipe(**arguments | more)[0]


def calls(report):
    """All attention calls that a report counts."""
    return sum(row["sparse"] + row["dense"] for row in report.layers)


def ours(value):
    """Is this object, or its class, made by dit_accel?"""
    kinds = (value, type(value), getattr(value, "__func__", None), getattr(value, "func", None))
    return any(str(getattr(kind, "__module__", "")).startswith("dit_accel") for kind in kinds)


def left_on(transformer):
    """Everything of ours that a transformer, or diffusers itself, still holds."""
    left = []
    for name, module in transformer.named_modules():
        for key, value in vars(module).items():
            inside = value.values() if isinstance(value, dict) else [value]
            found = "accel" in key or any(map(ours, inside))
            left += [f"{name}.{key}"] * found
        left += [f"{name}: {type(module)}"] * ours(module)
        processor = getattr(module, "processor", None)
        own = getattr(processor, "__dict__", ())
        left += [f"{name}.processor.{key}" for key in own if "accel" in key]
    for registry in (AttentionProcessorRegistry, TransformerBlockRegistry):
        left += [kind.__name__ for kind in registry._registry if "dit_accel" in kind.__module__]
    return left


def flux_adapter(transformer):
    """Weights of a Flux IP-Adapter with four tokens, for pictures embedded in 32 numbers."""
    torch.manual_seed(5)
    config, width = transformer.config, transformer.config.joint_attention_dim
    inner = config.num_attention_heads * config.attention_head_dim
    projection = {
        "proj.weight": torch.randn(4 * width, 32) * 0.05,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers = {}
    for i in range(config.num_layers):
        for part in "kv":
            layers[f"{i}.to_{part}_ip.weight"] = torch.randn(inner, width) * 0.05
            layers[f"{i}.to_{part}_ip.bias"] = torch.zeros(inner)
    return {"image_proj": projection, "ip_adapter": layers}
