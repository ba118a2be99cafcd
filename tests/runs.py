"""Short runs of the tiny pipelines, accelerated from the first step on."""

import torch

import dit_accel
from dit_accel import Schedule

NOW = Schedule(warmup=0)


def run(pipe, steps=3, seed=0, size=128, frames=9, guidance=3.0):
    options = {"num_frames": frames} if hasattr(pipe, "transformer_2") else {}
    return pipe(
        prompt="a rocket",
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        max_sequence_length=16,
        **options,
    )[0]


def on(pipe, method, **options):
    return dit_accel.accelerated(pipe, method, **{"min_tokens": 0, "schedule": NOW, **options})
