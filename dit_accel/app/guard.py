"""What every answer carries and every request must: hosts, origins, sizes, headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
# report.html holds its own script, style and clips, and must reach nothing else.
REPORT = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; media-src data:; frame-ancestors 'none'; sandbox allow-scripts allow-downloads"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
# For the document of Gradio's form, whose scripts are of its own making.
LOOSE = {name: value for name, value in HEADERS.items() if name != "content-security-policy"}


FORM = 64 * 2**10  # bytes of a form


@dataclass
class Guard:
    """Around the app.

    hosts: names it is called by, beside localhost and plain addresses, which no foreign page can
    rebind. gradio: the app behind `doors`, paths or, where they end in / or =, beginnings of paths;
    it answers nothing else. loose: paths of documents that run scripts of their own.
    """

    app: App
    hosts: tuple[str, ...] = ()
    gradio: App | None = None
    doors: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        host = headers.get("host", "")
        if not self.knows(host):
            return await _refuse(send, 400, "This page is not called by that name.")
        origin = headers.get("origin")
        reads = scope["method"] in ("GET", "HEAD")
        if not reads and origin and urlsplit(origin).netloc != host:
            return await _refuse(send, 403, "This request comes from another page.")
        path = scope["path"]
        send = _with_headers(send, LOOSE if path in self.loose else HEADERS)
        if self.gradio is None or not self._door(path):
            return await self.app(scope, receive, send)
        length = headers.get("content-length", "")
        if not reads and not (length.isdecimal() and int(length) <= FORM):
            return await _refuse(send, 413, f"A form has at most {FORM // 1024} KiB.")
        return await self.gradio(scope, receive, send)

    def _door(self, path: str) -> bool:
        """Does it lead to Gradio's app?"""
        return any(
            path.startswith(door) if door.endswith(("/", "=")) else path == door
            for door in self.doors
        )

    def knows(self, host: str) -> bool:
        """Is this Host header one of ours?"""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", *self.hosts):
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True


def _with_headers(send: Send, headers: dict[str, str] = HEADERS) -> Send:
    async def answer(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            message["headers"] = [
                *message["headers"],
                *(
                    (name.encode(), value.encode())
                    for name, value in headers.items()
                    if name.encode() not in given
                ),
            ]
        await send(message)

    return answer


async def _refuse(send: Send, status: int, text: str) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8")]
    start = {"type": "http.response.start", "status": status, "headers": head}
    await _with_headers(send)(start)
    await send({"type": "http.response.body", "body": text.encode()})


async def body_of(request: Any, most: int) -> bytes | None:
    """The body of a request; None where it is longer than `most` bytes: the rest is not read."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            return None
    return bytes(data)
