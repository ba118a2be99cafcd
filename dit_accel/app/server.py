"""Gradio's server, told to keep to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_accel.app import examples
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk
from dit_accel.app.page import asset, build, theme
from dit_accel.app.studio import Studio


def settings(jobs: Path) -> dict[str, Any]:
    """Arguments of `launch`: which files may be served, the look, and no door left open."""
    return {
        "allowed_paths": [str(jobs), str(examples.FOLDER.resolve())],
        "theme": theme(),
        "css": asset("style.css"),
        "footer_links": [],
        "max_file_size": "1kb",
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "quiet": True,
    }


def serve(studio: Studio, limits: Limits, jobs: Path, host: str, port: int, browser: bool) -> None:
    """Serve until interrupted."""
    jobs.mkdir(parents=True)
    demo = build(Desk(studio, jobs), limits)
    demo.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        **settings(jobs),
    )
