"""Several devices: one command as several processes, one generation over them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_accel.parallel.sharing import share

__all__ = ["share"]


def __getattr__(name: str) -> object:
    if name == "share":  # torch is not imported for the launcher's sake
        from dit_accel.parallel.sharing import share

        return share
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
