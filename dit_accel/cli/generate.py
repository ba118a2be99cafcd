"""`dit-accel generate`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dit_accel import api
from dit_accel.cli.options import Common, checked
from dit_accel.cli.progress import Progress
from dit_accel.cli.session import load, notices, slug
from dit_accel.generation.run import generate
from dit_accel.media import video
from dit_accel.media.files import IMAGE, check_target
from dit_accel.pages.figures import seconds
from dit_accel.parallel import launcher as ranks


def run_generate(common: Common, output: Path | None) -> None:
    """`dit-accel generate`."""
    with checked():
        request, config, boost = common.request(), common.config(), common.boost()
        if output is not None:
            check_target(output, moving=output.suffix.lower() not in IMAGE)
        ranks.check(common.ulysses)
    with Progress() as progress:
        pipe, defaults = load(common, request, config, progress)
        with checked():
            boost.switch_on(pipe)
            handle = api.accelerate(pipe, config)
        with notices(progress):
            result = generate(pipe, defaults, request, progress)
        if not ranks.first(common.ulysses):
            return
        moving = len(result.frames) > 1
        target = output or Path(f"{slug(request)}.{'mp4' if moving else 'png'}")
        progress("writing", 0, None)
        video.save(target, result.frames, defaults.fps)
    count, height, width = result.frames.shape[:3]
    times = result.times
    screen = Console(highlight=False, soft_wrap=True)
    screen.print(
        f"[bold]{escape(str(target))}[/bold]  {width}×{height}, {count} frame{'s' * moving}"
    )
    screen.print(
        f"{seconds(times.total)}: text {seconds(times.encode)}, denoising "
        f"{seconds(times.denoise)}, decoding {seconds(times.decode)}"
    )
    screen.print(str(handle.report()), markup=False)
