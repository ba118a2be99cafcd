"""`dit-accel generate`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dit_accel.cli.options import Metadata, checked, option
from dit_accel.generation.options import WHAT, How, Kv, Ulysses, What, Where
from dit_accel.parallel import launcher

if TYPE_CHECKING:
    from dit_accel.generation.request import Request
    from dit_accel.generation.run import Result

Output = Annotated[
    Path | None, option("File to write. \\[named after the prompt]", WHAT, "--output", "-o")
]


def generate(
    what: What,
    how: How,
    where: Where,
    ulysses: Ulysses = 1,
    kv: Kv = None,
    output: Output = None,
    metadata: Metadata = True,
) -> None:
    """Make one clip or picture with an accelerated pipeline (--method dense for the stock one).

    dit-accel generate "rocket on a blue background"

    dit-accel generate "fox on a red background" --method topk --keep 0.2 --seed 3 -o fox.mp4

    dit-accel generate "a cat" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480
    """
    from dit_accel import api
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.session import load, notices, typed
    from dit_accel.generation.facts import facts_of
    from dit_accel.generation.loading import find_model
    from dit_accel.generation.request import arguments
    from dit_accel.generation.run import generate
    from dit_accel.media import video
    from dit_accel.media.files import check_target

    with checked():
        request, _, boost = what.request(), how.config(), how.boost()
        if output is not None:
            check_target(output, None if request.frames is None else request.frames > 1)
        launcher.check(ulysses, kv)
    with Progress() as progress:
        opened = load(where, request, how, progress, what.fps, ulysses, kv)
        pipe, defaults, config, trained = opened
        with checked():
            values = arguments(pipe, defaults, request)
            target = _target(output, request, values)
            boost.switch_on(pipe)
            handle = api.accelerate(pipe, config)
        with notices(progress):
            result = generate(pipe, defaults, request, progress)
        if not launcher.first(ulysses):
            return
        progress("writing", 0, None)
        told: dict[str, Any] = {"boost": boost, "sampler": request.sampler, "command": typed()}
        told |= {"model": find_model(where.model), "fps": defaults.fps, "trained": trained}
        facts = facts_of(pipe, values, request.seed, config, **told) if metadata else None
        video.save_or_rescue(target, result.frames, defaults.fps, facts)
    _print(result, target, str(handle.report()))


def _target(output: Path | None, request: Request, values: dict[str, Any]) -> Path:
    """Where the clip goes, seen to be writable; ValueError where it is not."""
    from dit_accel.cli.session import free_name, slug
    from dit_accel.media.files import ROOM, check_target

    frames = values.get("num_frames", 1)
    if output is None:
        output = free_name(slug(request), ".mp4" if frames > 1 else ".png", _is_of(request))
    pixels = frames * values.get("height", 0) * values.get("width", 0)
    return check_target(output, frames > 1, ROOM + pixels // 8)


def _is_of(request: Request) -> Callable[[Path], bool]:
    """Whether a file is a clip of this prompt and seed, and may be replaced by another one."""
    from dit_accel.media import metadata

    def same(path: Path) -> bool:
        try:
            facts = metadata.read(path) or {}
        except ValueError:
            return False
        return (facts.get("prompt"), facts.get("seed")) == (request.prompt, request.seed)

    return same


def _print(result: Result, target: Path, report: str) -> None:
    from rich.text import Text

    from dit_accel.cli.screen import screen
    from dit_accel.pages.figures import seconds

    count, height, width = result.frames.shape[:3]
    times, out = result.times, screen()
    size = f"  {width}×{height}, {count} frame{'s' * (count > 1)}"
    out.print(Text.assemble((str(target), "bold"), size))
    out.print(
        f"{seconds(times.total)}: text {seconds(times.encode)}, denoising "
        f"{seconds(times.denoise)}, decoding {seconds(times.decode)}"
    )
    if said := str(result.memory):
        out.print(said)
    out.print(report)
