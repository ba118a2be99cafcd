"""The comparison as a Gradio app, under /gradio: a plain form, and a queue for gradio_client.

The page beside it shows more; both ask the same desk.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import gradio as gr

from dit_accel.app import catalog, form
from dit_accel.app.desk import sentence
from dit_accel.app.views import SIDES, headline

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from dit_accel.app.desk import Desk

PATH = "/gradio"
# What Gradio offers beside its form and its queue, and this page doesn't.
CLOSED = tuple(
    f"{PATH}/{name}"
    for name in ("gradio_api/upload", "gradio_api/vibe", "gradio_api/undo", "login", "monitoring")
)
INTRO = "Two clips of the same prompt and the same noise, the right one with accelerated attention."
BEAT = 0.15


def mount(app: Starlette, desk: Desk) -> None:
    """Add the Gradio app of this desk to the server."""
    words = catalog.card(None).words
    methods = [name for name in form.infos() if name != "dense"]
    with gr.Blocks(title="dit_accel", analytics_enabled=False) as blocks:
        gr.Markdown(f"# dit_accel\n{INTRO} [The whole page](/) shows more.")
        with gr.Row():
            prompt = gr.Textbox(words.examples(1)[0] if words else "", label="Prompt", scale=3)
            method = gr.Dropdown(methods, value=form.DEFAULT, label="Method")
            seed = gr.Number(0, label="Seed", precision=0)
        start = gr.Button("Generate both", variant="primary")
        with gr.Row():
            clips = [gr.Video(label=label, autoplay=True, loop=True, interactive=False)
                     for label in ("Dense", "Accelerated")]  # fmt: skip
        said = gr.Markdown()
        start.click(
            partial(compare, desk), [prompt, method, seed], [*clips, said], api_name="compare"
        )
    gr.mount_gradio_app(
        app,  # type: ignore[arg-type]  # a FastAPI is one, and no more of it is used
        blocks,
        PATH,
        allowed_paths=[str(desk.folder)],
        footer_links=["api"],
        ssr_mode=False,
        run_history=False,
    )


def compare(desk: Desk, prompt: str, method: str, seed: float | None) -> tuple[str, str, str]:
    """Files of both clips and "1.30× faster, 31.2 dB"; gr.Error, a sentence, for a refusal."""
    start = "" if seed is None else str(int(seed))
    asked = {"prompt": prompt, "seed": start, "right": {"method": method}}
    try:
        job = desk.take(form.read(asked, desk.limits, desk.opened), asked, "gradio")
    except ValueError as error:
        raise gr.Error(sentence(error), print_exception=False) from error
    with job.leash.held():
        while not job.over:
            time.sleep(BEAT)
    if job.record is None:
        raise gr.Error(job.note or "The run was cancelled.", print_exception=False)
    dense, accelerated = (str(job.folder / job.record[side]["clip"]) for side in SIDES)
    return dense, accelerated, f"**{headline(job.record)}**"
