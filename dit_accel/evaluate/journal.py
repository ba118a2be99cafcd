"""A file of finished work, one JSON line each, that survives being killed at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_accel.inputs.fields import expect
from dit_accel.media.files import check_place


class Journal:
    """Lines by key; the first line is the setting that all others were measured in.

    Raises ValueError when the file was written in another setting, or is no such file.
    """

    def __init__(self, path: Path, setting: dict[str, object]) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        setting = json.loads(json.dumps(setting, default=str))
        check_place(path)
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"setting": setting})
            return
        head, *lines = self._read()
        known = head["setting"]
        known.setdefault("weights", setting.get("weights"))  # of an older journal
        changed = [key for key in {**known, **setting} if known.get(key) != setting.get(key)]
        if changed == ["weights"]:
            raise ValueError(f"{path} was measured with other weights: choose another --output")
        if changed:
            key = changed[0]
            raise ValueError(
                f"{path} was measured with {key} = {known.get(key)!r}, not {setting.get(key)!r}: "
                "choose another --output"
            )
        self.lines = {line["key"]: line for line in lines}

    def add(self, key: str, line: dict[str, Any]) -> dict[str, Any]:
        """Write a finished piece of work, and give it back."""
        line = {"key": key, **line}
        self._append(line)
        self.lines[key] = line
        return line

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; the rest of one that was cut off is removed, once it is seen to be a
        journal of ours."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()]
            expect("setting", head["setting"], dict)
            for line in lines:
                expect("key", line["key"], str)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f"{self.path} is no journal of dit-accel, or is damaged: choose another --output"
            ) from None
        if len(whole) < len(text):
            self.path.write_bytes(whole)
        return [head, *lines]

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
