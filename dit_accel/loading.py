"""Where recipes of version 0.1.0 look for the embedded model."""

from dit_accel.generation.loading import EMBEDDED

__all__ = ["EMBEDDED"]
