"""What the tests of the page ask for, of a tiny pipeline."""

import threading

from dit_accel.app.ask import Ask, Side
from dit_accel.app.studio import Pair, Studio
from dit_accel.generation.loading import Defaults

DEFAULTS = Defaults(
    height=128,
    width=128,
    num_frames=9,
    num_inference_steps=4,
    guidance_scale=1.0,
    max_sequence_length=16,
    fps=8,
)
SPARSE = Side("topk", keep=0.3, warmup=0.25, small=True)
ASK = Ask("a red rocket", right=SPARSE, steps=4)


def pair_of(studio: Studio, ask: Ask) -> Pair:
    return list(studio.run(ask, threading.Event()))[-1]
