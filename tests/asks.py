"""What the tests of the page ask for, of a tiny pipeline."""

import threading
from dataclasses import replace
from typing import Any

from dit_accel.app.ask import Ask
from dit_accel.app.catalog import card
from dit_accel.app.studio import Pair, Studio
from dit_accel.generation.loading import Defaults
from dit_accel.generation.options import How, What

DEFAULTS = Defaults(
    height=128,
    width=128,
    num_frames=9,
    num_inference_steps=4,
    guidance_scale=1.0,
    max_sequence_length=16,
    fps=8,
)
DENSE = How("dense")
SPARSE = How("topk", keep=0.3, warmup="0.25", min_tokens=0)
# What the page's form sends for such a clip, of a prompt that the embedded model's words allow.
FORM = {
    "prompt": card(None).words.examples(1)[0],
    "steps": "2",
    "size": "128x128",
    "frames": "9",
    "left": {"method": "dense"},
    "right": {"method": "topk", "min_tokens": "0"},
}
ASK = Ask(What("a red rocket", steps=4), right=SPARSE)


def small_studio(pipe: Any) -> Studio:
    """A studio whose only model is `pipe`, loaded."""
    studio = Studio(lambda name: (pipe, DEFAULTS), find=lambda name: None)
    studio.warm()
    return studio


def pair_of(studio: Studio, ask: Ask) -> Pair:
    return studio.run(ask, threading.Event())


def other(ask: Ask, **what: Any) -> Ask:
    """The request with another clip."""
    return replace(ask, what=replace(ask.what, **what))
