"""What is asked of a method before it is called."""

from __future__ import annotations

from typing import Any, ClassVar


class Traits:
    """What a method is called, and what it can and cannot do; `Method` has the rest."""

    name: ClassVar[str]
    description: ClassVar[str]
    paper: ClassVar[str] = ""
    finetuning: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    chooses: ClassVar[bool] = True  # blocks, by a selector
    always: ClassVar[bool] = False  # runs at keep = 1, too, not the user's backend
    divisible: ClassVar[bool] = False  # a layer whose state finds no room can run without
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    gated: ClassVar[bool] = False  # reads the attention's input, see `gate`
    by_rows: ClassVar[bool] = False  # serves any whole query blocks by themselves
    whole: ClassVar[bool] = False  # serves the queries of text, too, where all keys are valid
    texts: ClassVar[tuple[str, ...]] = ("select", "reuse", "sort")  # fields that a text names
    later: ClassVar[tuple[str, ...]] = ("sort",)  # fields that a configuration leaves out unchanged

    @property
    def reads_input(self) -> bool:
        """Does it make something of the attention's input, see `gate`?"""
        return self.gated

    @property
    def places(self) -> tuple[str, ...]:
        """What of it, beside selector and sort, looks where tokens lie in the picture."""
        return ()

    @property
    def rounds_down(self) -> bool:
        """Is the number of kept blocks rounded down?"""
        return False

    @property
    def layout(self) -> tuple[int, int, int] | None:
        """(t, h, w) of the tiles it needs its tokens laid out in, or None."""
        return None
