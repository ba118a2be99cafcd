"""The settings a visitor can change, and the request they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from dit_accel.app.ask import Ask, Limits, Side
from dit_accel.forward.order import ORDERS
from dit_accel.generation.loading import EMBEDDED, GENERATION, Defaults
from dit_accel.methods import find, infos
from dit_accel.pruning.config import TokenPruning

OWN, NONE = "own", "none"
SIDE = 7  # fields of a side


class Form:
    """Builds the components in two places; `fields` are all of them, in the order `ask` takes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.prompt = gr.Textbox(
            "rocket on a blue background",
            label="Prompt",
            lines=2,
            max_length=limits.prompt,
            elem_id="prompt",
        )
        self.fields: list[Any] = [self.prompt]

    def settings(self) -> None:
        """Both sides, the clip and the model."""
        self.left = self._side("left", "dense", "dense")
        self.right = self._side("right", "shared", "balanced")
        self.rest = self._clip()
        self.fields += [*self.left, *self.right, *self.rest]

    def _side(self, name: str, method: str, preset: str) -> list[Any]:
        names = list(infos())
        kind = gr.Dropdown(
            names, value=method, label=f"{name.capitalize()} method", elem_id=f"{name}-method"
        )
        sparse = method != "dense"
        with gr.Column(visible=sparse, elem_classes="more") as more:
            level = gr.Radio(
                ["safe", "balanced", "fast", OWN],
                value=preset if sparse else "balanced",
                label="Preset",
            )
            known = find(method).presets.get(preset, {}).get("keep", 0.25)
            keep = _share("Share of key blocks kept", 0.02, known, 0.01)
            warmup = _share("Share of dense steps, at the start", 0, 0.15, 0.05)
            order = gr.Radio(list(ORDERS), value="raster", label="Token order")
            small = gr.Checkbox(False, label="Accelerate short sequences too")
        prune = gr.Radio(
            [NONE, *TokenPruning.presets],
            value=NONE,
            label="Token pruning",
            visible=not find(method).stateful,
        )
        kind.change(
            _chosen,
            [kind, level],
            [more, level, keep, prune],
            queue=False,
            api_visibility="private",
        )
        level.input(_keep, [kind, level], keep, queue=False, api_visibility="private")
        keep.input(lambda: OWN, None, level, queue=False, api_visibility="private")
        return [kind, level, keep, warmup, order, small, prune]

    def _clip(self) -> list[Any]:
        limits, known = self.limits, _embedded()
        with gr.Accordion("Clip and model", open=False, elem_id="clip"):
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)
                steps = _number("Steps", known.num_inference_steps, limits.steps)
            with gr.Row():
                width = _number("Width", known.width, limits.side)
                height = _number("Height", known.height, limits.side)
                frames = _number("Frames", known.num_frames, limits.frames)
            model = gr.Dropdown(
                [("embedded: animated emoji", ""), *((m, m) for m in limits.models)],
                value="",
                label="Model",
                info=None if limits.public else "or type a folder or a Hugging Face id",
                allow_custom_value=not limits.public,
            )
        clip = [steps, width, height, frames]
        model.change(_defaults, model, clip, queue=False, api_visibility="private")
        return [model, seed, *clip]

    @staticmethod
    def ask(prompt: str, *values: Any, limits: Limits) -> Ask:
        """The request that the fields' values make; ValueError says what is wrong with it."""
        left, right, (model, seed, steps, width, height, frames) = (
            values[:SIDE],
            values[SIDE : 2 * SIDE],
            values[2 * SIDE :],
        )
        return Ask(
            prompt,
            left=_make_side(*left),
            right=_make_side(*right),
            model=model or None,
            seed=seed if seed is not None else 0,
            steps=steps,
            width=width,
            height=height,
            frames=frames,
            limits=limits,
        )

    @staticmethod
    def values(
        prompt: str, sides: Sequence[Side], seed: int, steps: int, clip: tuple[int, int, int]
    ) -> list[Any]:
        """The fields' values for a request; clip is (width, height, frames)."""
        out: list[Any] = [prompt]
        for side in sides:
            method, _, preset = side.method.partition(":")
            out += [method, preset or OWN, side.keep or 0.25, side.warmup, side.order, side.small]
            out.append(side.prune or NONE)
        return [*out, "", seed, steps, *clip]


def _make_side(
    method: str, preset: str, keep: float, warmup: float, order: str, small: bool, prune: str
) -> Side:
    pruned = None if prune == NONE or find(method).stateful else prune
    if method == "dense":
        return Side(prune=pruned)
    name = method if preset == OWN else f"{method}:{preset}"
    return Side(name, float(keep), float(warmup), order, bool(small), pruned)


def _share(label: str, least: float, value: float, step: float) -> gr.Slider:
    return gr.Slider(least, 1, value, step=step, label=label, buttons=[])


def _number(label: str, value: int | None, most: int) -> gr.Number:
    return gr.Number(
        value,
        label=label,
        precision=0,
        minimum=1,
        maximum=most,
        placeholder="the model's",
        elem_id=label.lower(),
        min_width=80,
    )


def _embedded() -> Defaults:
    path = EMBEDDED / GENERATION
    return Defaults.from_file(path) if path.is_file() else Defaults()


def _defaults(model: str) -> list[int | None]:
    known = Defaults() if model else _embedded()
    return [known.num_inference_steps, known.width, known.height, known.num_frames]


def _keep(method: str, preset: str) -> Any:
    kind = find(method)
    return kind.presets[preset].get("keep", kind.keep) if preset in kind.presets else gr.skip()


def _chosen(method: str, preset: str) -> list[Any]:
    """A method was chosen: show its settings at the same preset, or hide them."""
    prune = gr.update(visible=not find(method).stateful)
    if method == "dense":
        return [gr.update(visible=False), gr.skip(), gr.skip(), prune]
    presets = find(method).presets
    level = preset if preset in presets else OWN
    return [gr.update(visible=True), level, _keep(method, level), prune]
