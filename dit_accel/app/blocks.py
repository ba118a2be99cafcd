"""The comparison as a Gradio app: a plain form at /gradio, and a queue for scripts.

It serves from the root, behind the page's own routes, so that gradio_client is given the page's own
address. Page and form ask the same desk, with the same places for each address.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from dit_accel.app import catalog, form
from dit_accel.app.desk import Job, sentence
from dit_accel.app.views import SIDES, headline
from dit_accel.pages import figures

if TYPE_CHECKING:
    from dit_accel.app.desk import Desk

PATH = "/gradio"
# What Gradio answers here: its form, and the way through its queue. All else of it is closed:
# uploads, log-ins, monitoring, its editor. An entry that ends in / or = is a beginning.
OPEN = (
    PATH,
    *("/config", "/theme.css", "/manifest.json", "/favicon.ico", "/robots.txt"),
    *("/assets/", "/static/fonts/", "/static/img/", "/static/js/"),
    *(
        f"/gradio_api/{name}"
        for name in (
            *("info", "app_id", "startup-events", "login_check"),
            *("queue/", "call/", "file=", "cancel", "reset", "heartbeat/"),
        )
    ),
)
INTRO = "Two clips of the same prompt and the same noise, the right one with accelerated attention."
BEAT = 0.15
HOUR = 3600


def serving(desk: Desk) -> Starlette:
    """The Gradio app of this desk, as an ASGI app with a lifespan of its own."""
    app = Starlette()
    with warnings.catch_warnings():  # it has two pages, and says that these have no SSR
        warnings.simplefilter("ignore", UserWarning)
        gr.mount_gradio_app(
            app,  # type: ignore[arg-type]  # a FastAPI is one, and no more of it is used
            _drawn(_Caller(desk)),
            "/",
            allowed_paths=[str(desk.folder)],
            footer_links=["api"],
            run_history=False,
            theme=_theme(),
        )
    return app


def _theme() -> gr.Theme:
    """Gradio's own, with the page's colour on a button dark enough for white words."""
    colours = {f"button_primary_background_fill{x}": "*primary_700" for x in ("", "_dark")}
    return gr.themes.Default(primary_hue="teal").set(**colours)


def _drawn(caller: _Caller) -> gr.Blocks:
    """The form. Its first page is ours and never asked for; the form is its second."""
    words, usual = catalog.card(None).words, catalog.card(None).facts()["defaults"]
    offered = [k for k in form.kinds(caller.desk.limits) if k.value != form.TRAINED]
    kinds = [(kind.label, kind.value) for kind in offered]
    prompts = words.examples(3) if words else [""]
    blocks = gr.Blocks(title="dit_accel", analytics_enabled=False, delete_cache=(HOUR, HOUR))
    with blocks.route("Gradio", PATH):
        gr.Navbar(main_page_name="The whole page")
        gr.Markdown(f"# dit_accel\n{INTRO}")
        prompt = gr.Textbox(prompts[0], label="Prompt", lines=2)
        with gr.Row():
            method = gr.Dropdown(kinds, value=form.DEFAULT, label="Method on the right")
            keep = gr.Textbox("", label="Keep", placeholder="the method's own")
            seed = gr.Number(0, label="Seed", precision=0)
            size = gr.Textbox("", label="Size", placeholder=str(usual["size"]))
            steps = gr.Textbox("", label="Steps", placeholder=str(usual["steps"]))
            left = gr.Dropdown(kinds, value="dense", label="Method on the left")
        gr.Examples([[text] for text in prompts], [prompt], label="Prompts that the model knows")
        with gr.Row():
            start = gr.Button("Generate both", variant="primary", scale=3)
            stop = gr.Button("Cancel")
        said = gr.Markdown()
        with gr.Row():
            clips = [
                gr.Video(label=side.capitalize(), height=384, autoplay=True, loop=True)
                for side in SIDES
            ]
        table = gr.Dataframe(headers=["", *SIDES, "right to left"], interactive=False, wrap=True)
        asked = [prompt, method, seed, keep, size, steps, left]
        shown = [*clips, said, table]
        # the desk has one run at a time and bounds who waits: Gradio's queue lets all through to it
        run = start.click(caller.compare, asked, shown, api_name="compare", concurrency_limit=None)
        stop.click(lambda: "Cancelled.", None, said, cancels=[run], api_visibility="private")
    return blocks


class _Caller:
    """Asks the desk for whoever calls: each address has its own places there."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def compare(
        self,
        prompt: str,
        method: str,
        seed: float | None,
        keep: str,
        size: str,
        steps: str,
        left: str,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Make both clips: their files, "1.30× faster, 31.2 dB", a table of times and closeness.

        prompt: what to show. method: of the right side. keep, size (WIDTHxHEIGHT), steps: empty is
        the method's or the model's own. left: method of the left side.

        Says on the way where the run stands; gr.Error, a sentence, for a refusal. A caller who goes
        away ends the run.
        """
        asked: dict[str, Any] = {"prompt": prompt, "seed": seed, "size": size, "steps": steps}
        asked |= {"left": {"method": left}, "right": {"method": method, "keep": keep}}
        client = request.client.host if request.client else ""
        job = await run_in_threadpool(self._taken, asked, client)
        seen = ""
        try:
            with job.leash.held():
                while not job.over:
                    if (now := self.desk.news(job)["said"]) != seen:
                        seen = now
                        yield gr.skip(), gr.skip(), now, gr.skip()
                    await asyncio.sleep(BEAT)
        finally:
            self.desk.cancel(job)  # nothing, where it is over
        if job.record is None:
            raise gr.Error(job.note or "The run was cancelled.", print_exception=False)
        files = [str(job.folder / job.record[side]["clip"]) for side in SIDES]
        yield (*files, f"## {headline(job.record)}", _table(job.record))

    def _taken(self, asked: dict[str, Any], client: str) -> Job:
        try:
            ask = form.read(asked, self.desk.limits, self.desk.opened)
            return self.desk.take(ask, asked, client)
        except ValueError as error:
            raise gr.Error(sentence(error), print_exception=False) from error


def _table(record: dict[str, Any]) -> list[list[str]]:
    """What was measured, from the record that the page shows: what, left, right, right to left."""
    left, right = (record[side] for side in SIDES)
    times = figures.time_rows(left["times"], right["times"], record["speedup"])
    near = figures.closeness_rows(record["quality"], "left")
    return [
        ["runs", left["label"], right["label"], ""],
        *(list(row) for row in times),
        *([name, "", "", f"{value} {beside}".strip()] for name, value, beside in near),
    ]
