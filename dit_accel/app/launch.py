"""The page from its start to Ctrl-C: what `dit-accel app` does."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.app.ask import Limits
from dit_accel.inputs.fields import within

if TYPE_CHECKING:
    from dit_accel.app.studio import Studio


def studio(
    device: str | None = None,
    dtype: str | None = None,
    offload: bool | str = False,
    metadata: bool = True,
) -> Studio:
    """What runs the clips; ValueError for a device or a dtype that is none here."""
    from dit_accel.app.studio import Studio
    from dit_accel.generation.loading import load_pipeline, pick_device, pick_dtype
    from dit_accel.generation.offload import Offload

    where = pick_device(device)
    pick_dtype(dtype, where)
    if moving := Offload.named(offload):
        moving.check(where)
    load = partial(load_pipeline, device=device, dtype=dtype, offload=offload)
    return Studio(load, metadata, device)


def warning(host: str, limits: Limits) -> str:
    """What to say of a page that others can reach, and is not set up for them; "" elsewhere."""
    if limits.public or host == "localhost" or _loopback(host):
        return ""
    return (
        f"anyone who reaches {host} can use this page, read any model folder of this machine and "
        "keep it busy: add --public"
    )


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    studio: Studio,
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 7860,
    browser: bool = False,
    names: tuple[str, ...] = (),
) -> None:
    """Serve the page until Ctrl-C; `browser` opens it. names: host names that it is called by.

    OSError where the port is taken, ModuleNotFoundError without Gradio, Starlette or uvicorn.
    """
    within("port", port, 1, 65535)
    import uvicorn

    from dit_accel.app import server
    from dit_accel.app.desk import Desk

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    if said := warning(host, limits):
        print(f"dit_accel: {said}", file=sys.stderr)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as door, tempfile.TemporaryDirectory(prefix="dit-accel-app-") as at:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        desk = Desk(studio, Path(at, "jobs"), limits.on(studio.where.type))
        own = () if _address(host) else (host,)
        app = server.build(desk, (*own, *names), warm=True)
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"dit_accel: {address}", file=sys.stderr)
        if browser:
            threading.Timer(1.0, webbrowser.open, [address]).start()
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=2
        )
        uvicorn.Server(config).run(sockets=[door])


def _address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
