"""Teach the embedded model scenes: from a pipeline folder, or on from a checkpoint.

    python assets/training/train_scenes.py --seconds 560 --canvas 256:33:32:1 --short 0.3
    python assets/training/train_scenes.py --seconds 560 --resume data/scenes/dit --fall 0.02 \\
        --canvas 256:33:32:0.3 --canvas 384:33:14:0.3 --canvas 512:33:8:0.3 --canvas 512:65:4:0.1

A canvas is side:frames:batch:share of the steps. --seconds counts from the start of the command.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path

import scene_set
import torch
import whole_clip
from clips import Clips
from compose import Composer
from muon import optimizers
from pool import Canvas, Pool
from run_state import Average, Log, Progress, load, restart, save
from scene_flow import Flow
from squeeze import restore
from whereabouts import LEARNING_RATE, Whereabouts
from words import ATTENTION, WordPlaces

PLAIN = ("condition_embedder", "patch_embedding", "proj_out", "shared", "relative_attention",
         *ATTENTION)  # fmt: skip
SHORT = 3  # latent frames of a short step: nine frames
SAVE_EVERY = 120.0
WARMUP = 100
BLIND = 0.95  # noise level above which only words tell what stands where
TIMED = 25  # every so many steps one is timed, by itself
PROFILED = 300  # steps before --profile: every graph is compiled by then


def canvas(text: str) -> Canvas:
    """Of "side:frames:batch:share"."""
    side, frames, batch, share = text.split(":")
    return Canvas(int(side), int(frames), int(batch), float(share))


def round_all(values: torch.Tensor) -> list[float] | float:
    """A tensor's numbers to three places, for the log."""
    found = values.tolist()
    return [round(x, 3) for x in found] if isinstance(found, list) else round(found, 3)


def rate(share: float, steps: int, flat: float, fall: float) -> float:
    """Factor of the learning rate: a short warm-up, flat, then linear to `fall` at the end."""
    down = 0.0 if share < flat else (share - flat) / max(1e-9, 1 - flat)
    return min(1.0, (steps + 1) / WARMUP) * (1 - (1 - fall) * min(1.0, down))


class Run:
    """One command: flow, pools, optimizers, and the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        self.device = torch.device(args.device)
        on_gpu = self.device.type == "cuda"
        clips = Clips.load(args.data, self.device)
        self.say(f"{len(clips.names)} emoji")
        self.flow, self.pipe = Flow.of(args.model, scene_set.VOCABULARY)
        for part in (*self.flow.parts.values(), self.pipe.vae):
            part.to(self.device)
        self.pipe.vae.requires_grad_(False)
        self.average = Average(self.flow.parts, decay=args.average)
        self.progress = Progress()
        if args.resume:
            found = restore(args.resume) if args.resume.is_file() else load(args.resume)
            tensors, self.progress, _ = found
            self.average.load(tensors)
        restart(self.progress)
        act = whole_clip.norm_silu
        act = torch.compile(act, dynamic=True) if on_gpu else act
        composer = Composer(clips)
        self.pools = [
            Pool(c, args.pool, composer, self.pipe.vae, self.pipe.tokenizer, act,
                 1000 * self.progress.step + n)
            for n, c in enumerate(args.canvas)
        ]  # fmt: skip
        self.teacher = self.flow.frozen() if args.distil else None
        self.taught = False
        self.optimizers = optimizers(
            self.flow.parameters(), args.matrix_rate, args.matrix_rate / 2, keep=PLAIN
        )
        self.base = [group["lr"] for o in self.optimizers for group in o.param_groups]
        if on_gpu:
            for flow in filter(None, (self.flow, self.teacher)):
                flow.transformer.set_attention_backend(args.attention)
                flow.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        classes = 1 + len(scene_set.EMOJI)
        self.whereabouts = Whereabouts(self.flow.transformer, classes).to(self.device)
        self.words = WordPlaces(self.flow.text_encoder.config.d_model).to(self.device)
        heads = [*self.whereabouts.parameters(), *self.words.parameters()]
        self.optimizers.append(torch.optim.AdamW(heads, LEARNING_RATE))
        self.base.append(LEARNING_RATE)
        self.lost: dict[str, torch.Tensor] = {}  # of the heads, in the last step

    def say(self, text: str) -> None:
        """A line with the seconds since the start."""
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def fill(self) -> None:
        """The first scenes of every pool."""
        for pool in self.pools:
            count = max(pool.canvas.encode, int(self.args.first * pool.canvas.share))
            while pool.filled < min(count, self.args.pool):
                pool.renew(min(pool.canvas.encode, self.args.pool - pool.filled))
            self.say(f"{pool.filled} scenes of {pool.canvas}")

    def thaw(self, step: int) -> None:
        """Train only the parameters that --only names, in the first --only-steps steps."""
        frozen = step < self.args.only_steps
        for name, p in self.flow.parameters():
            p.requires_grad_(not frozen or re.search(self.args.only, name) is not None)

    @torch.no_grad()
    def teach(self) -> None:
        """From here on the moving average, as it stands now, teaches guidance; clips only."""
        for part, module in self.teacher.parts.items():
            for name, p in module.named_parameters():
                p.copy_(self.average.values[f"{part}.{name}"])
        self.taught = True
        self.say("the teacher begins")

    def step(self) -> tuple[Canvas, torch.Tensor]:
        """One step on a canvas drawn by its share."""
        shares = [p.canvas.share * (not self.taught or p.canvas.frames > 1) for p in self.pools]
        pool = random.choices(self.pools, shares)[0]
        frames, count = pool.canvas.latent[0], pool.canvas.batch
        short = 0.0 if self.taught else self.args.short
        if pool is self.pools[0] and random.random() < short and frames > SHORT:
            frames, count = SHORT, count * frames // SHORT
        batch = pool.draw(count, frames)
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            teacher = self.teacher if self.taught else None
            loss = self.flow.loss(batch, teacher, self.args.distil, self.args.high)
            told = self.flow.lengths > 0
            where = self.whereabouts.where(batch.latents)
            what, right = self.whereabouts.what(batch.owner, told)
            word = self.words.loss(self.flow.hidden, batch.places * told[:, None, None])
        heads = self.args.where * (where.sum() + word) + self.args.what * what.sum()
        (loss + heads).backward()
        blind = torch.where(told & (self.flow.level > BLIND), right, torch.nan)
        self.lost = {"where": where.detach().flatten(), "word": word.detach(),
                     "what": what.detach(), "named": blind.nanmean()}  # fmt: skip
        torch.nn.utils.clip_grad_norm_(
            [p for _, p in self.flow.parameters() if p.requires_grad], 1.0
        )
        for o in self.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        pool.owe(pool.canvas.batch / self.args.uses)
        return pool.canvas, loss

    def wait(self, wanted: bool) -> None:
        """For the device to have done what it was given."""
        if wanted and self.device.type == "cuda":
            torch.cuda.synchronize()

    def profile(self) -> None:
        """Twenty steps, and the kernels and operators that took most of their time."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with profile(activities=kinds) as found:
            for _ in range(20):
                self.step()
                self.progress.step += 1
        order = f"self_{self.device.type}_time_total"
        self.say(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))

    def train(self) -> None:
        """Until the time is up; checkpoints on the way and at the end."""
        self.fill()
        file = self.args.out / "scenes.jsonl"
        logs = {c: Log(file, self.args.every) for c in self.args.canvas}
        counts = dict.fromkeys(self.args.canvas, 0)
        took: dict[Canvas, float] = {}  # milliseconds of the last step that was timed
        first, saved, start = self.progress.step, time.monotonic(), time.monotonic()
        before, end = self.progress.seconds, self.began + self.args.seconds
        while time.monotonic() < end and self.progress.step - first < self.args.steps:
            share = (time.monotonic() - start) / max(1e-9, end - start)
            now = rate(share, self.progress.step - first, self.args.flat, self.args.fall)
            for lr, group in zip(
                self.base, (g for o in self.optimizers for g in o.param_groups), strict=True
            ):
                group["lr"] = lr * now
            if self.args.profile and self.progress.step - first == PROFILED:
                self.profile()
            if self.progress.step - first in (0, self.args.only_steps):
                self.thaw(self.progress.step - first)
            if self.teacher and not self.taught and share >= self.args.distil_from:
                self.teach()
            timed = self.progress.step % TIMED == 0
            self.wait(timed)
            begun = time.monotonic()
            where, loss = self.step()
            self.wait(timed)
            if timed:
                took[where] = round(1000 * (time.monotonic() - begun), 1)
            self.progress.step += 1
            self.progress.seconds = before + time.monotonic() - start
            self.average.update(self.progress.step)
            counts[where] += 1
            at = Progress(counts[where], round(self.progress.seconds, 1))
            told = {"lr": round(now, 3), "canvas": f"{where.side}x{where.frames}"}
            if counts[where] % self.args.every == 0:
                told |= {name: round_all(value) for name, value in self.lost.items()}
                told["ms"] = took.get(where)
            logs[where].add(at, loss, **told)
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.save()
        self.say(f"{self.progress.step - first} steps: {counts}")

    def save(self) -> None:
        """The moving average in bfloat16."""
        extra = {"scenes": True, "distilled": self.args.distil}
        save(self.args.out / "dit", self.average.values, self.progress, extra)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the moving average into the trained parts."""
        for name, p in self.average.live.items():
            p.copy_(self.average.values[name])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--model", type=Path, default=Path("assets/emoji"), help="to begin with")
    parser.add_argument("--out", type=Path, default=Path("data/scenes"))
    parser.add_argument("--resume", type=Path, help="checkpoint, or file of squeeze.py")
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many")
    parser.add_argument("--canvas", type=canvas, action="append", required=True)
    parser.add_argument("--short", type=float, default=0.0, help="share of nine-frame steps")
    parser.add_argument("--uses", type=float, default=6.0, help="of a scene before it is renewed")
    parser.add_argument("--pool", type=int, default=20_000, help="most scenes of one canvas")
    parser.add_argument("--first", type=int, default=1_500, help="scenes before the first step")
    parser.add_argument("--matrix-rate", type=float, default=1.5e-3)
    parser.add_argument("--flat", type=float, default=1.0, help="share of the time at full rate")
    parser.add_argument("--fall", type=float, default=1.0, help="last factor of the rate")
    parser.add_argument("--average", type=float, default=0.999)
    parser.add_argument(
        "--distil",
        type=float,
        default=0.0,
        help="guidance to fold in; 1: a teacher that has it; 0: no teacher",
    )
    parser.add_argument(
        "--distil-from", type=float, default=0.0, help="share of the time before the teacher"
    )
    parser.add_argument("--profile", action="store_true", help="where 20 steps spend their time")
    parser.add_argument(
        "--where", type=float, default=0.1, help="weight of places: whereabouts.py, words.py"
    )
    parser.add_argument("--what", type=float, default=0.03, help="weight of names: whereabouts.py")
    parser.add_argument("--high", type=float, default=0.5, help="share of noise levels near 1")
    parser.add_argument("--only", default="", help="expression for names of parameters")
    parser.add_argument("--only-steps", type=int, default=0, help="steps that train only these")
    parser.add_argument("--attention", default="_native_cudnn", help="diffusers' backend, on a GPU")
    parser.add_argument("--cache", type=Path, help="compiled graphs of a run before, and of this")
    parser.add_argument("--every", type=int, default=50, help="steps between two lines")
    parser.add_argument("--show", action="append", default=[], help="side:frames:guidance:shift")
    parser.add_argument("--show-count", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # a graph for each canvas, trained and sampled
    args = arguments(argv)
    if args.cache and args.cache.exists():
        torch.compiler.load_cache_artifacts(args.cache.read_bytes())
    run = Run(args)
    run.train()
    run.finish()
    if run.args.show:
        from show_scenes import show

        for text in run.args.show:
            side, frames, guidance, shift = text.split(":")
            show(run.flow, run.pipe, int(side), int(frames), float(guidance), float(shift),
                 run.args.show_count, run.args.out, run.device)  # fmt: skip
            run.say(f"shown {text}")
    if args.cache:
        found = torch.compiler.save_cache_artifacts()
        (args.out / args.cache.name).write_bytes(found[0] if found else b"")


if __name__ == "__main__":
    main()
