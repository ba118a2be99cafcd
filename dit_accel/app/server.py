"""The page's routes: what may be read, sent and stopped, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from dit_accel.app import blocks, catalog, examples, form, pairs, stage, views
from dit_accel.app.ask import Ask, BadField
from dit_accel.app.cost import told
from dit_accel.app.desk import Desk, Full, Job, sentence
from dit_accel.app.guard import FORM, REPORT, Guard, body_of
from dit_accel.config import CROSSOVER
from dit_accel.generation import speeds
from dit_accel.generation.options import How
from dit_accel.pages.render import render

TYPES = {".js": "text/javascript", ".css": "text/css"}
SCRIPTS = ("dom", "form", "history", "job", "look", "page", "stage")
PICTURE = 12 * 2**20  # bytes of a picture that a visitor may send
BEAT = 0.15


def build(desk: Desk, hosts: tuple[str, ...] = (), warm: bool = False) -> Guard:
    """The ASGI app; `desk` serves its jobs. hosts: names that it is called by. warm: load the
    embedded model at once."""
    page, gradio = _Page(desk), blocks.serving(desk)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async with gradio.router.lifespan_context(gradio):
            desk.start(warm)
            yield
            await run_in_threadpool(desk.stop)

    routes = [
        Route("/", page.home),
        Route("/static/{name}", page.static),
        Route("/examples/{name}", page.example),
        Route("/examples/{name}/files/{file}", page.example_file),
        Route("/models", page.model),
        Route("/estimate", page.estimate, methods=["POST"]),
        Route("/jobs", page.submit, methods=["POST"]),
        Route("/jobs/{id}", page.job, methods=["GET", "DELETE"]),
        Route("/jobs/{id}/events", page.events),
        Route("/jobs/{id}/files/{file}", page.job_file),
        Route("/pairs", page.pair),
        Route("/sent/{kind}", page.send, methods=["POST"]),
    ]
    squeeze = Middleware(GZipMiddleware, minimum_size=1000)
    app = Starlette(routes=routes, lifespan=life, middleware=[squeeze])
    return Guard(app, hosts, gradio, blocks.OPEN, loose=(blocks.PATH,))


def _wrong(error: Exception, status: int = 400) -> JSONResponse:
    """A refusal, in a sentence, with the field that it is about."""
    name = error.name if isinstance(error, BadField) else ""
    return JSONResponse({"error": sentence(error), "field": name}, status)


def _gone() -> Response:
    return JSONResponse({"error": "The server no longer has that run.", "field": ""}, 404)


class _Page:
    """The routes of one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def home(self, request: Request) -> Response:
        html = await run_in_threadpool(_home, self.desk)
        return HTMLResponse(html, headers={"cache-control": "no-cache"})

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _static_names():
            return PlainTextResponse("There is no such file.", 404)
        text = _asset(name)
        mark = f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
        head = {"cache-control": "no-cache", "etag": mark}
        if mark in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=head)
        return Response(text, media_type=TYPES[Path(name).suffix], headers=head)

    async def example(self, request: Request) -> Response:
        name = request.path_params["name"]
        record = examples.stored().get(name)
        if record is None:
            return PlainTextResponse("There is no such example.", 404)
        return JSONResponse(_shown(record, f"examples/{name}/files"))

    async def example_file(self, request: Request) -> Response:
        name, file = request.path_params["name"], request.path_params["file"]
        if name not in examples.stored():
            return PlainTextResponse("There is no such example.", 404)
        return await _file(examples.FOLDER / name, file)

    async def model(self, request: Request) -> Response:
        name = request.query_params.get("name") or None
        if self.desk.limits.public and name not in (None, *self.desk.limits.models):
            return _wrong(BadField("model", "This page is public and runs its own models only."))
        try:
            return JSONResponse((await run_in_threadpool(catalog.card, name)).facts())
        except (ValueError, OSError) as error:
            return _wrong(error)

    async def estimate(self, request: Request) -> Response:
        try:
            values, ask = await self._read(request)
            return JSONResponse(await run_in_threadpool(told, self.desk.studio, ask))
        except ValueError as error:
            return _wrong(error)

    async def submit(self, request: Request) -> Response:
        client = request.client.host if request.client else ""
        try:
            values, ask = await self._read(request)
            job = await run_in_threadpool(self.desk.take, ask, values, client)
        except Full as error:
            return _wrong(error, 429)
        except ValueError as error:
            return _wrong(error)
        return JSONResponse({"job": job.id, **self.desk.news(job)})

    async def _read(self, request: Request) -> tuple[dict[str, Any], Ask]:
        data = await body_of(request, FORM)
        if data is None:
            raise ValueError(f"A form has at most {FORM // 1024} KiB.")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("A request is JSON: an object of fields and values.") from None
        ask = form.read(values, self.desk.limits, self.desk.opened)
        return values, ask

    async def job(self, request: Request) -> Response:
        job = self.desk.job(request.path_params["id"])
        if job is None:
            return _gone()
        if request.method == "DELETE":
            self.desk.cancel(job)
            return JSONResponse(self.desk.news(job))
        found = self.desk.news(job)
        if job.record is not None:
            found |= await run_in_threadpool(_shown, job.record, job.base)
        return JSONResponse({**found, "asked": job.asked})

    async def events(self, request: Request) -> Response:
        job = self.desk.job(request.path_params["id"])
        if job is None:
            return _gone()
        return StreamingResponse(
            self._follow(job, request),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def _follow(self, job: Job, request: Request) -> AsyncIterator[str]:
        seen = -1
        with job.leash.held():
            for beat in range(10**9):
                waiting = job.state == "waiting" or beat % 7 == 0
                if job.version != seen or waiting:
                    seen = job.version
                    yield f"data: {json.dumps(self.desk.news(job))}\n\n"
                if job.over or await request.is_disconnected():
                    return
                await asyncio.sleep(BEAT)

    async def job_file(self, request: Request) -> Response:
        job, file = self.desk.job(request.path_params["id"]), request.path_params["file"]
        if job is None:
            return _gone()
        if file == "report.html" and job.record is not None:
            html = await run_in_threadpool(pairs.report, job.record, job.folder)
            name = 'attachment; filename="report.html"'
            head = {"content-security-policy": REPORT, "content-disposition": name}
            return HTMLResponse(html, headers=head)
        return await _file(job.folder, file)

    async def pair(self, request: Request) -> Response:
        """Any two clips of this visit, held against each other."""
        found = []
        for side in views.SIDES:
            name, _, which = request.query_params.get(side, "").partition(":")
            job = self.desk.job(name)
            if job is None or job.record is None or which not in views.SIDES:
                return _gone()
            found.append((job.record, which, job.folder, job.base))
        try:
            data = await run_in_threadpool(pairs.pair, *found)
        except ValueError as error:
            return _wrong(error)
        return JSONResponse(_shown(data, ""))

    async def send(self, request: Request) -> Response:
        kind = request.path_params["kind"]
        if kind not in ("picture", "preset"):
            return PlainTextResponse("Pictures and presets are taken.", 404)
        most = PICTURE if kind == "picture" else FORM
        data = await body_of(request, most)
        if data is None:
            return _wrong(BadField("image", f"A {kind} has at most {most // 1024:,} KiB."), 413)
        try:
            token = await run_in_threadpool(self.desk.keep, kind, data)
            return JSONResponse({"token": token})
        except (ValueError, OSError) as error:
            return _wrong(error)


async def _file(folder: Path, name: str) -> Response:
    """A file of a folder that this page wrote: its own name, no path."""
    path = folder / name
    known = await run_in_threadpool(lambda: {p.name for p in folder.glob("*.*") if p.is_file()})
    if name not in known or name.startswith("."):
        return PlainTextResponse("There is no such file.", 404)
    return FileResponse(path, headers={"cache-control": "private, max-age=3600"})


def _shown(record: Mapping[str, Any], base: str) -> dict[str, Any]:
    """A finished pair as the page shows it."""
    data = dict(record)
    return {
        "value": stage.recorded(data, base),
        "html": views.results(data, base),
        "headline": views.headline(data),
        "asked": data.get("asked") or {},
        "prompt": data["prompt"],
        "frames_like": data["size"],
    }


def _home(desk: Desk) -> str:
    stored = examples.stored()
    first = next(iter(stored), None)
    limits = desk.limits
    shown = _shown(stored[first], f"examples/{first}/files") if first else None
    facts = {
        "card": catalog.card(None).facts(),
        "shown": {k: v for k, v in shown.items() if k != "html"} if shown else None,
        "example": first,
        "kinds": [asdict(kind) for kind in form.kinds(limits)],
        "limits": {"prompt": limits.prompt},
        "beside": form.BESIDE,
        "speeds": {name: _profile(name) for name in speeds.NAMES},
        "crossover": str(CROSSOVER.get(desk.studio.where.type, "")),
    }
    return render(
        "app/page.html",
        facts=facts,
        html=shown["html"] if shown else "",
        examples={name: record["prompt"] for name, record in stored.items()},
        sides=form.SIDES,
        levels=form.LEVELS,
        kinds=form.kinds(limits),
        clip=form.clip_controls(),
        side=form.side_controls(limits),
        weights=form.weights_controls(limits),
        models=limits.models,
        limits=limits,
        device=desk.studio.where.type,
        scripts=SCRIPTS,
        example=first,
        prompt=_first_prompt(shown),
        shown=bool(shown),
    )


def _profile(name: str) -> dict[str, Any]:
    """What a profile stands for, with the keep of its method's preset."""
    return {**speeds.options(name), "keep": How(speed=name).config().method.keep}


def _first_prompt(shown: Mapping[str, Any] | None) -> str:
    if shown:
        return str(shown["prompt"])
    words = catalog.card(None).words
    return words.examples(1)[0] if words else ""


@cache
def _static_names() -> tuple[str, ...]:
    return ("page.css", *(f"{name}.js" for name in SCRIPTS))


@cache
def _asset(name: str) -> str:
    return resources.files("dit_accel.app").joinpath(name).read_text("utf-8")
