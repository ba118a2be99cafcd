"""What may be asked of any pipeline: bounds of every number, for all that make a request."""

from __future__ import annotations

from typing import Any

from dit_accel.inputs.fields import within

LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "steps": (1, 1000),
    "height": (16, 8192),
    "width": (16, 8192),
    "frames": (1, 1025),
    "guidance": (0, 100),
    "fps": (1, 240),
}
LONGEST = 8000  # letters of a prompt: more than any text encoder reads
# As pipelines call them.
_ARGUMENTS = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}


def check_limits(values: dict[str, Any]) -> None:
    """ValueError for the first number that lies outside its bounds; None is the model's own."""
    for name, value in values.items():
        known = _ARGUMENTS.get(name, name)
        if known in LIMITS and value is not None:
            within(name, value, *LIMITS[known])
