"""What a prompt of the embedded model may ask for: read it, write it, refuse the rest.

    prompt   = object [place | others] "on a" backdrop "background" [motion]
    others   = relation object [relation object]
    object   = ["a" | "an"] ["small" | "large"] emoji
    place    = "on the left" | "on the right" | "at the top" | "at the bottom"
    relation = "left of" | "right of" | "above" | "below" | "and"
    backdrop = colour | colour "to" colour | "striped" colour | "dotted" colour
    motion   = "moving" ("left" | "right" | "up" | "down") | "zooming" ("in" | "out")

Case, punctuation and spaces don't matter: "A small rocket left of a ghost on a blue background,
moving up". The emoji and the colours are the model's own: its `training.json` names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

SIZES = ("small", "large")
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
RELATIONS = ("left of", "right of", "above", "below", "and")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "zooming in", "zooming out")
PATTERNS = ("plain", "ramp", "striped", "dotted")
MOST = 3
_WORD = re.compile(r"[\w’'-]+")


class UnknownWords(ValueError):
    """A prompt that the embedded model has no words for; the message says which and what to do."""


@dataclass(frozen=True)
class Object:
    """One emoji, and its size where the prompt names one ("small", "large")."""

    name: str
    size: str | None = None


@dataclass(frozen=True)
class Backdrop:
    """pattern: one of PATTERNS; second: the lower colour of a ramp."""

    pattern: str
    colour: str
    second: str | None = None

    def __str__(self) -> str:
        if self.pattern == "ramp":
            return f"{self.colour} to {self.second}"
        return self.colour if self.pattern == "plain" else f"{self.pattern} {self.colour}"


@dataclass(frozen=True)
class Scene:
    """objects: one to three; relations: one between each and the next; place: of a lone object."""

    objects: tuple[Object, ...]
    backdrop: Backdrop
    relations: tuple[str, ...] = ()
    place: str | None = None
    motion: str | None = None

    def text(self, articles: bool = True) -> str:
        """The prompt that asks for this scene, with or without "a" before each object."""
        parts = []
        for number, thing in enumerate(self.objects):
            words = " ".join(filter(None, (thing.size, thing.name)))
            article = "an" if words[0] in "aeiou" and words != "unicorn" else "a"
            parts += [self.relations[number - 1]] if number else []
            parts += [article, words] if articles else [words]
        parts += [self.place] if self.place else []
        end = f", {self.motion}" if self.motion else ""
        return f"{' '.join(parts)} on a {self.backdrop} background{end}"


@dataclass(frozen=True)
class Vocabulary:
    """The emoji and the colours that one model was trained on."""

    names: tuple[str, ...]
    colours: tuple[str, ...]

    @classmethod
    def load(cls, model: Path) -> Vocabulary | None:
        """Of a model folder; None when its `training.json` is missing or tells of no scenes."""
        file = model / "training.json"
        facts = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if not facts.get("scenes"):
            return None
        return cls(tuple(facts["held_out"]), tuple(facts["colours"]))

    def words(self) -> set[str]:
        """Every word that a prompt may hold."""
        fixed = (*SIZES, *PLACES, *RELATIONS, *MOTIONS, *PATTERNS[2:], "a an on to background")
        return {w for text in (*fixed, *self.names, *self.colours) for w in split(text)}

    def read(self, prompt: str) -> Scene:
        """The scene of a prompt; UnknownWords, in one sentence, for a prompt that is none."""
        return _Reader(self, split(prompt)).scene()


def split(text: str) -> list[str]:
    """The words of a text as the tokenizer splits them, lower case."""
    return _WORD.findall(text.lower())


@lru_cache
def _longest_first(phrases: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Each phrase and its words."""
    return sorted(((p, split(p)) for p in phrases), key=lambda pair: -len(pair[1]))


class _Reader:
    """A walk over the words of one prompt."""

    def __init__(self, vocabulary: Vocabulary, words: Sequence[str]) -> None:
        self.vocabulary, self.words, self.at = vocabulary, list(words), 0

    def scene(self) -> Scene:
        objects, relations = [self._object()], []
        while relation := self._one_of(RELATIONS):
            if len(objects) == MOST:
                raise UnknownWords(f"expected at most {MOST} emoji in a prompt: leave some out")
            relations.append(relation)
            objects.append(self._object())
        place = self._one_of(PLACES) if len(objects) == 1 else None
        backdrop = self._backdrop()
        motion = self._one_of(MOTIONS)
        if self.at < len(self.words):
            self._refuse("nothing more, or one of " + ", ".join(MOTIONS))
        return Scene(tuple(objects), backdrop, tuple(relations), place, motion)

    def _object(self) -> Object:
        self._one_of(("a", "an"))
        size = self._one_of(SIZES)
        name = self._one_of(self.vocabulary.names)
        if name is None:
            some = ", ".join(self.vocabulary.names[:: max(1, len(self.vocabulary.names) // 6)][:6])
            self._refuse(f"one of the {len(self.vocabulary.names)} emoji of this model ({some}, …)")
        return Object(name, size)

    def _backdrop(self) -> Backdrop:
        if not (self._one_of(("on a", "on an"))):
            self._refuse('"on a <colour> background"')
        pattern = self._one_of(PATTERNS[2:])
        colour = self._colour()
        second = self._colour() if pattern is None and self._one_of(("to",)) else None
        if not self._one_of(("background",)):
            self._refuse('"background"')
        return Backdrop(pattern or ("ramp" if second else "plain"), colour, second)

    def _colour(self) -> str:
        colour = self._one_of(self.vocabulary.colours)
        if colour is None:
            self._refuse("a colour (" + ", ".join(self.vocabulary.colours) + ")")
        return colour

    def _one_of(self, phrases: Iterable[str]) -> str | None:
        """Step over the longest of these phrases that stands here."""
        for phrase, words in _longest_first(tuple(phrases)):
            if self.words[self.at : self.at + len(words)] == words:
                self.at += len(words)
                return phrase
        return None

    def _refuse(self, expected: str) -> NoReturn:
        found = " ".join(self.words[self.at : self.at + 3]) or "the end"
        after = " ".join(self.words[max(0, self.at - 3) : self.at])
        place = f' after "{after}"' if after else ""
        raise UnknownWords(f'expected {expected}{place}, got "{found}"')
