import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.boost import Boost
from dit_accel.loading import EMBEDDED

pipe = WanPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
Boost(compile=False, step_cache=0.15, lora=None, quantize=None, graphs=False).switch_on(pipe)
handle = dit_accel.accelerate(pipe, dit_accel.SharedResidual(keep=0.05, period=0.4))
output = pipe(
    prompt="a large fox on a striped green background, moving right",
    height=384,
    width=384,
    num_frames=33,
    num_inference_steps=20,
    guidance_scale=1.0,
    negative_prompt="",
    max_sequence_length=512,
    generator=torch.Generator("cpu").manual_seed(0),
)
print(handle.report())
