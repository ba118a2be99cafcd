"""The page: settings on the left, two players and what was measured on the right."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import gradio as gr

from dit_accel.app import examples, stage, views
from dit_accel.app.ask import Ask, Limits, Side
from dit_accel.app.desk import Desk, url
from dit_accel.app.form import Form
from dit_accel.app.stop import Cancelled
from dit_accel.pages.render import render

TITLE = "dit_accel: two clips from the same noise"


def asset(name: str) -> str:
    """A text file of this folder."""
    return resources.files("dit_accel.app").joinpath(name).read_text("utf-8")


def theme() -> gr.themes.Base:
    """Quiet colours, fonts of the system: nothing is fetched from elsewhere."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_sm,
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return base.set(
        button_primary_background_fill="#0d7a6f",
        button_primary_background_fill_hover="#0a655c",
        button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="#0d7a6f",
        button_primary_background_fill_hover_dark="#11998b",
        slider_color="#0d7a6f",
        slider_color_dark="#3fc9b8",
        body_background_fill="#fbfaf9",
        body_background_fill_dark="#141211",
        block_border_width="0px",
        block_padding="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_info_text_size="*text_xs",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1c1a18",
        input_border_width="1px",
        input_border_color="#e6e2de",
        input_border_color_dark="#322e2b",
        checkbox_label_background_fill="transparent",
        checkbox_label_background_fill_dark="transparent",
        checkbox_label_padding="*spacing_xs *spacing_sm *spacing_xs 0",
        form_gap_width="0px",
        block_label_text_size="*text_sm",
    )


def build(desk: Desk, limits: Limits) -> gr.Blocks:
    """The Blocks app; `desk` serves its jobs."""
    shown = examples.stored()
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(
            '<div class="masthead"><b>dit_accel</b><span>The same noise, two ways of computing '
            "attention: see what sparsity saves and what it changes.</span></div>"
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=300, elem_id="ask"):
                form = Form(limits)
                chips = _chips(shown)
                note = gr.HTML(elem_classes="note-line")
                with gr.Row(elem_id="actions"):
                    go = gr.Button(
                        "Generate both", variant="primary", elem_id="go", min_width=120, scale=2
                    )
                    stop = gr.Button("Cancel", interactive=False, elem_id="stop", min_width=80)
                form.settings()
            with gr.Column(scale=11, min_width=340):
                screen, results = _screens(shown)
        _wire(demo, desk, limits, form, (screen, results, note, go, stop))
        for name, chip in chips.items():
            chip.click(
                _shower(name, shown[name], form),
                outputs=[*form.fields, screen, results, note],
                queue=False,
                api_visibility="private",
            )
    demo.queue(max_size=limits.queue, api_open=False)
    return demo


def _chips(shown: dict[str, Any]) -> dict[str, gr.Button]:
    with gr.Row(elem_id="chips"):
        return {name: gr.Button(record["prompt"]) for name, record in shown.items()}


def _screens(shown: dict[str, Any]) -> tuple[gr.HTML, gr.HTML]:
    first = next(iter(shown), None)
    value = stage.recorded(shown[first], _home(first)) if first else stage.waiting(Ask("-"), "")
    screen = gr.HTML(
        value,
        html_template=render("app/stage.html", sides=stage.SIDES),
        js_on_load=asset("stage.js"),
        apply_default_css=False,
        elem_id="stage",
    )
    text = views.results(shown[first], _home(first)) if first else ""
    results = gr.HTML(
        text, js_on_load=asset("results.js"), apply_default_css=False, elem_id="results"
    )
    return screen, results


def _home(example: str) -> str:
    return url(examples.FOLDER.resolve() / example)


def _shower(name: str, record: dict[str, Any], form: Form):
    """The click of an example's chip: its record, and its settings in the form."""

    def show() -> list[Any]:
        sides = [Side(**record[s]["side"]) for s in stage.SIDES]
        count, height, width = record["size"]
        values = form.values(
            record["prompt"], sides, record["seed"], record["steps"], (width, height, count)
        )
        home = _home(name)
        return [*values, stage.recorded(record, home), views.results(record, home), ""]

    return show


def _wire(demo: gr.Blocks, desk: Desk, limits: Limits, form: Form, parts: tuple) -> None:
    screen, results, note, go, stop = parts
    asked = gr.State()
    outputs = [screen, results, note, go, stop]

    def begin(*values: Any) -> list[Any]:
        try:
            ask = form.ask(*values, limits=limits)
        except (ValueError, TypeError) as error:
            return [None, *_still(gr.skip(), error)]
        return [ask, stage.waiting(ask), "", "", *_buttons(running=True)]

    def run(ask: Ask | None, request: gr.Request) -> Iterator[list[Any]]:
        if ask is None:  # a generator that yields nothing would blank its outputs
            yield [gr.skip() for _ in outputs]
            return
        value = stage.waiting(ask)
        try:
            for value, found in desk.serve(_visitor(request), ask):
                done = found is not None
                yield [value, found if done else gr.skip(), "", *_buttons(running=not done)]
        except Cancelled:
            yield _still(stage.stopped(value, "cancelled"), None)
        except Exception as error:  # whatever a model does, the page goes on
            if not isinstance(error, ValueError):
                traceback.print_exc()
            yield _still(stage.stopped(value, "failed"), error)

    def cancel(request: gr.Request) -> None:
        desk.cancel(_visitor(request))
        time.sleep(0.3)  # progress on its way to the page arrives before `settle` reads the stage

    def settle(value: dict[str, Any]) -> list[Any]:
        return _still(stage.stopped(value, "cancelled"), None)

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    started = go.click(begin, form.fields, [asked, *outputs], queue=False, **quiet)
    job = started.success(run, asked, outputs, concurrency_limit=1, **quiet)
    job.failure(_refused, screen, outputs, queue=False, **quiet)
    stopping = stop.click(cancel, queue=False, cancels=[job], **quiet)
    stopping.then(settle, screen, outputs, queue=False, **quiet)
    demo.unload(_leave(desk))


def _visitor(request: gr.Request) -> str:
    """Who asks: gradio knows of every request that comes from a page."""
    return request.session_hash or ""


def _leave(desk: Desk) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        desk.cancel(_visitor(request))

    return leave


def _refused(value: dict[str, Any]) -> list[Any]:
    """The queue was full; a job that had begun has said itself why it ended."""
    begun = value["left"].get("state") != stage.WAITING
    return _still(gr.skip() if begun else stage.stopped(value, "the queue is full"), None)


def _buttons(running: bool) -> tuple[Any, Any]:
    return gr.update(interactive=not running), gr.update(interactive=running)


def _still(value: Any, error: Exception | None) -> list[Any]:
    """Outputs when nothing runs: the stage as given, and the reason if something went wrong."""
    note = views.alert(error) if error else ""
    return [value, gr.skip(), note, *_buttons(running=False)]
