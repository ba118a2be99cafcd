"""What the page knows of a model before it is loaded, all of it from the model's own folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit_accel.generation.loading import EMBEDDED, GENERATION, Defaults
from dit_accel.inputs.scene import (
    MOST,
    MOTIONS,
    PATTERNS,
    PLACES,
    RELATIONS,
    SIZES,
    Backdrop,
    Object,
    Scene,
    UnknownWords,
    Vocabulary,
    split,
)

PRESETS = {path.parent.name: path for path in sorted(EMBEDDED.parent.glob("*/preset.json"))}
_JOINING = ("on", "a", "an", "background")


@dataclass(frozen=True)
class Words:
    """The words that a model was trained on, and how they make a prompt.

    names: what it can draw. colours: of backgrounds. scenes: it reads a grammar and refuses the
    rest (dit_accel.inputs.scene). given: prompts to begin with, where the model names some.
    """

    names: tuple[str, ...]
    colours: tuple[str, ...]
    scenes: bool
    given: tuple[str, ...] = ()

    def prompt(self, number: int) -> str:
        """The plain prompt of the name with this number."""
        colour = self.colours[number % len(self.colours)]
        scene = Scene((Object(self.names[number]),), Backdrop("plain", colour))
        return scene.text(articles=self.scenes)

    def grammar(self) -> list[str]:
        """What else a prompt may say, a line each."""
        lines = [f"Backgrounds: {', '.join(self.colours)}."]
        if not self.scenes:
            return lines
        patterns = ", ".join(PATTERNS[2:])
        return [
            f"One to {MOST} of them, {' or '.join(SIZES)}, joined by {', '.join(RELATIONS)}.",
            f"One alone may stand {', '.join(PLACES)}.",
            f"{lines[0][:-1]}; also {patterns}, or one colour to another.",
            f"At the end, if you like: {', '.join(MOTIONS)}.",
        ]

    def examples(self, count: int = 3) -> list[str]:
        """Prompts to begin with: the model's own, else some spread over what it can draw."""
        if len(self.given) >= count:
            return list(self.given[:count])
        if not self.scenes:
            stride = max(1, len(self.names) // count)
            return [self.prompt(i) for i in range(0, len(self.names), stride)][:count]
        return [scene.text() for scene in self._scenes(count)]

    def _scenes(self, count: int) -> list[Scene]:
        """One, two, one, … objects, each with another backdrop and motion."""
        names, colours = self.names, self.colours
        backs = (
            Backdrop("ramp", colours[3 % len(colours)], colours[5 % len(colours)]),
            Backdrop("plain", colours[1 % len(colours)]),
            Backdrop("dotted", colours[-1]),
        )
        found = []
        for i in range(count):
            first = Object(names[(7 + 31 * i) % len(names)])
            second = Object(names[(20 + 31 * i) % len(names)])
            things = (first, second) if i % 2 == 0 else (first,)
            between = ("left of",) if len(things) > 1 else ()
            motion = ("moving up", "zooming in", "moving right")[i % 3]
            found.append(Scene(things, backs[i % 3], between, motion=motion))
        return found

    def trouble(self, prompt: str) -> str | None:
        """One sentence about a prompt that this model cannot follow; None for one that it can."""
        if self.scenes:
            try:
                Vocabulary(self.names, self.colours).read(prompt)
            except UnknownWords as error:
                text = str(error)
                return f"This model reads sentences of one form and {text}."
            return None
        known = {word for text in (*self.names, *self.colours, *_JOINING) for word in split(text)}
        strange = list(dict.fromkeys(word for word in split(prompt) if word not in known))
        if not strange:
            return None
        words = ", ".join(f"“{word}”" for word in strange[:4])
        return f"This model does not know {words}: it draws what it knows of the rest."


@dataclass(frozen=True)
class Card:
    """A model, as the page offers it."""

    name: str
    defaults: Defaults
    words: Words | None
    step: tuple[int, int] = (16, 4)

    def facts(self) -> dict[str, Any]:
        """What the browser is told."""
        words = self.words
        draws = [[n, words.prompt(i)] for i, n in enumerate(words.names)] if words else []
        size = (self.defaults.width, self.defaults.height)
        return {
            "draws": draws,
            "grammar": words.grammar() if words else [],
            "scenes": bool(words and words.scenes),
            "defaults": {
                "size": f"{size[0]}x{size[1]}" if all(size) else "",
                "frames": self.defaults.num_frames,
                "steps": self.defaults.num_inference_steps,
                "guidance": self.defaults.guidance_scale,
                "negative": self.defaults.negative_prompt or "",
                "fps": self.defaults.fps,
            },
        }


def card(model: str | None) -> Card:
    """Of a model's folder; what cannot be known before a hub id is loaded stays open."""
    folder = EMBEDDED if model is None else Path(model).expanduser()
    name = "embedded" if model is None else model
    if not folder.is_dir():
        return Card(name, Defaults(), None)
    return _read(folder, name, _changed(folder))


def _changed(folder: Path) -> float:
    files = (folder / name for name in ("training.json", GENERATION))
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


@lru_cache(maxsize=16)
def _read(folder: Path, name: str, changed: float) -> Card:
    file = folder / GENERATION
    defaults = Defaults.from_file(file) if file.is_file() else Defaults()
    return Card(name, defaults, _words(folder), _granularity(folder))


def _words(folder: Path) -> Words | None:
    facts = _json(folder / "training.json")
    names, colours = facts.get("held_out"), facts.get("colours")
    if not isinstance(names, dict) or not isinstance(colours, dict) or not names or not colours:
        return None
    given = facts.get("examples")
    given = tuple(map(str, given)) if isinstance(given, list) else ()
    return Words(tuple(names), tuple(colours), bool(facts.get("scenes")), given)


def _granularity(folder: Path) -> tuple[int, int]:
    """Pixels and frames that one visual token covers, as far as the folder's files say."""
    vae, transformer = (_json(folder / part / "config.json") for part in ("vae", "transformer"))
    patch = transformer.get("patch_size", 2)
    patch = patch[-1] if isinstance(patch, Sequence) else patch
    return vae.get("scale_factor_spatial", 8) * patch, vae.get("scale_factor_temporal", 4)


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
