"""Where recipes of version 0.1.0 look for what runs beside sparse attention."""

from dit_accel.generation.boost import Boost

__all__ = ["Boost"]
