"""`dit-accel generate`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dit_accel.cli.options import WHAT, How, Ulysses, What, Where, checked, option
from dit_accel.parallel import launcher as ranks

if TYPE_CHECKING:
    from dit_accel.generation.run import Result

Output = Annotated[
    Path | None, option("File to write. \\[named after the prompt]", WHAT, "--output", "-o")
]


def generate(
    what: What, how: How, where: Where, ulysses: Ulysses = 1, output: Output = None
) -> None:
    """Make one clip or picture with an accelerated pipeline (--method dense for the stock one).

    dit-accel generate "rocket on a blue background"

    dit-accel generate "cat on a red background" --method topk --keep 0.2 --seed 3 -o cat.mp4

    dit-accel generate "a cat" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480
    """
    from dit_accel import api
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.session import load, notices, slug
    from dit_accel.generation.run import generate
    from dit_accel.media import video
    from dit_accel.media.files import IMAGE, check_target

    with checked():
        request, config, boost = what.request(), how.config(), how.boost()
        if output is not None:
            check_target(output, moving=output.suffix.lower() not in IMAGE)
        ranks.check(ulysses)
    with Progress() as progress:
        pipe, defaults = load(where, request, config, progress, what.fps, ulysses)
        with checked():
            boost.switch_on(pipe)
            handle = api.accelerate(pipe, config)
        with notices(progress):
            result = generate(pipe, defaults, request, progress)
        if not ranks.first(ulysses):
            return
        moving = len(result.frames) > 1
        target = output or Path(f"{slug(request)}.{'mp4' if moving else 'png'}")
        progress("writing", 0, None)
        video.save(target, result.frames, defaults.fps)
    _print(result, target, str(handle.report()))


def _print(result: Result, target: Path, report: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    from dit_accel.pages.figures import seconds

    count, height, width = result.frames.shape[:3]
    times = result.times
    screen = Console(highlight=False, soft_wrap=True)
    screen.print(
        f"[bold]{escape(str(target))}[/bold]  {width}×{height}, {count} frame{'s' * (count > 1)}"
    )
    screen.print(
        f"{seconds(times.total)}: text {seconds(times.encode)}, denoising "
        f"{seconds(times.denoise)}, decoding {seconds(times.decode)}"
    )
    screen.print(report, markup=False)
