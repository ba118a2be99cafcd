"""Stage 2: transformer and text encoder together, a rectified flow on frozen latents.

Each (emoji, colour) pair but the held-out one is encoded once as a whole clip. The autoencoder is
causal, so the first k latent frames are the latents of the shorter clip: 1, 17, 33 and 65 frames
need no second encoding.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import prompt_keys
import torch
import whole_clip
from clips import Clips, composite
from diffusers import AutoencoderKLWan
from emoji_set import caption, words
from models import Sizes, build_text_encoder, build_tokenizer, build_transformer, build_vae
from muon import optimizers
from run_state import (
    EVERY_SECONDS,
    Average,
    Clock,
    Log,
    Progress,
    learning_rate,
    load,
    restart,
    save,
)
from torch import Tensor, nn
from torch.nn import functional

TOKENS = 81_920
TEXT_POSITIONS = 16
SHIFT = 3.0
SINGLE_FRAMES_UNTIL = 0.2
LENGTHS = {5: 0.5, 9: 0.25, 17: 0.25}
AMBIGUOUS = 4.0  # times as often: an emoji named by a colour, as in "red heart on a yellow …"
PLAIN = ("condition_embedder", "patch_embedding", "proj_out", "shared", "relative_attention")


@dataclass(frozen=True)
class Pairs:
    """latents: [P, Z, t, h, w] normalised; ids, lengths: captions [P, L] and their words [P];
    shares: [P], how often each is drawn."""

    latents: Tensor
    ids: Tensor
    lengths: Tensor
    shares: Tensor


def load_vae(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The trained autoencoder of stage 1 with its latent statistics in its configuration."""
    tensors, _, extra = load(folder)
    if "latents_mean" not in extra:
        raise ValueError(f"Expected a finished autoencoder in {folder}; resume stage vae first.")
    vae = build_vae(Sizes(**extra["sizes"]))
    vae.load_state_dict({k.removeprefix("vae."): v.float() for k, v in tensors.items()})
    statistics = {key: extra[key] for key in ("latents_mean", "latents_std")}
    vae.register_to_config(**statistics)
    return vae.to(device).requires_grad_(False)


def tokenize(names: list[str], pairs: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids [P, 16] and lengths [P] of prompts; ValueError if one has more than 15 words."""
    vocabulary = build_tokenizer(names).get_vocab()
    ids = torch.zeros(len(pairs), TEXT_POSITIONS, dtype=torch.long)
    lengths = torch.zeros(len(pairs), dtype=torch.long)
    for row, prompt in enumerate(pairs):
        tokens = [vocabulary[word] for word in words(prompt)]
        if len(tokens) >= TEXT_POSITIONS:
            raise ValueError(f"Expected at most 15 words, got {len(tokens)}; shorten {prompt!r}.")
        ids[row, : len(tokens)] = torch.tensor(tokens)
        lengths[row] = len(tokens)
    return ids, lengths


@torch.no_grad()
def encode_pairs(
    vae: AutoencoderKLWan, clips: Clips, act: whole_clip.Activation, batch: int = 6
) -> Pairs:
    """Whole-clip latents of every trained pair, normalised per channel, in bfloat16 on a GPU."""
    pairs, colours = clips.trained_pairs(), list(clips.colours)
    device, on_gpu = clips.rgba.device, clips.rgba.is_cuda
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    palette, parts = clips.palette(), []
    for start in range(0, len(pairs), batch):
        emoji, colour = zip(*pairs[start : start + batch], strict=True)
        video = composite(clips.rgba[list(emoji)], palette[list(colour)])
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            moments = whole_clip.encode(vae, video, act).float()
        latents = (moments.chunk(2, dim=1)[0] - mean) / std
        parts.append(latents.to(torch.bfloat16 if on_gpu else torch.float32))
    prompts = [caption(clips.names[n], colours[c]) for n, c in pairs]
    ids, lengths = tokenize(clips.names, prompts)
    named = [bool(set(words(clips.names[n])) & set(colours)) for n, _ in pairs]
    shares = torch.tensor([AMBIGUOUS if x else 1.0 for x in named], device=device)
    return Pairs(torch.cat(parts), ids.to(device), lengths.to(device), shares)


class Flow:
    """Transformer, text encoder and one training step's loss."""

    def __init__(self, sizes: Sizes, vocabulary: int, device: torch.device) -> None:
        self.transformer = build_transformer(sizes).to(device)
        self.text_encoder = build_text_encoder(sizes, vocabulary).to(device)
        self.bias = prompt_keys.install(self.transformer)
        self.parts: dict[str, nn.Module] = {
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
        }

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters, named `part.name`, each once."""
        return [(f"{k}.{n}", p) for k, m in self.parts.items() for n, p in m.named_parameters()]

    def loss(self, x0: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Mean squared error of the velocity noise - x0; 10 % of the prompts are dropped."""
        dropped = torch.rand(len(ids), device=ids.device) < 0.1
        lengths = torch.where(dropped, 0, lengths)
        place = torch.arange(ids.shape[1], device=ids.device)
        mask = (place < lengths[:, None]).long()
        hidden = self.text_encoder(ids, mask).last_hidden_state
        packed, self.bias.value = prompt_keys.pack(hidden, lengths)
        uniform = torch.randn(len(ids), device=ids.device).sigmoid()
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(x0, dtype=torch.float32)
        level = sigma.view(-1, 1, 1, 1, 1)
        mixed = (1 - level) * x0 + level * noise
        velocity = self.transformer(mixed, sigma * 1000, packed, return_dict=False)[0]
        return functional.mse_loss(velocity.float(), noise - x0.float())


def draw(pairs: Pairs, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of about TOKENS tokens: single frames at first, then a mixture of lengths."""
    _, _, most, height, width = pairs.latents.shape
    frames = random.choices(list(LENGTHS), list(LENGTHS.values()))[0]
    frames = 1 if share < SINGLE_FRAMES_UNTIL or random.random() < 0.05 else min(frames, most)
    count = max(1, TOKENS // (frames * height * width // 4)) if pairs.latents.is_cuda else 4
    count = min(count, 256)
    chosen = torch.multinomial(pairs.shares, count, replacement=True)
    return pairs.latents[chosen, :, :frames].float(), pairs.ids[chosen], pairs.lengths[chosen]


def train(
    clips: Clips,
    out: Path,
    sizes: Sizes,
    minutes: float,
    total_minutes: float,
    resume: bool,
    max_steps: int | None = None,
    compile_parts: bool = True,
) -> Progress:
    """Train for `minutes` on the latents of `out/vae`; save `out/dit` every minute and last."""
    device, progress = clips.rgba.device, Progress()
    on_gpu, opened = device.type == "cuda", time.monotonic()
    act = whole_clip.norm_silu
    act = torch.compile(act, dynamic=True) if compile_parts else act
    pairs = encode_pairs(load_vae(out / "vae", device), clips, act)
    print(f"{len(pairs.latents)} pairs encoded in {time.monotonic() - opened:.0f} s", flush=True)
    flow = Flow(sizes, len(build_tokenizer(clips.names)), device)
    average = Average(flow.parts, decay=0.999)
    if resume:
        tensors, progress, _ = load(out / "dit")
        average.load(tensors)
    restart(progress)
    extra = {"sizes": asdict(sizes), "names": clips.names}
    opts = optimizers(flow.parameters(), 2e-3, 1e-3, keep=PLAIN)
    base = [group["lr"] for o in opts for group in o.param_groups]
    if compile_parts:
        flow.transformer.compile_repeated_blocks(fullgraph=True)
    left = max(0.1, minutes - (time.monotonic() - opened) / 60)
    clock, log = Clock(progress, left, total_minutes), Log(out / "dit.jsonl", 50)
    saved = time.monotonic()
    while clock.running(max_steps):
        rate = learning_rate(clock.share(), progress.step - clock.first_step, 200, 0.4)
        for lr, group in zip(base, (g for o in opts for g in o.param_groups), strict=True):
            group["lr"] = lr * rate
        batch = draw(pairs, clock.share())
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = flow.loss(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in flow.parameters()], 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        progress.step += 1
        average.update(progress.step)
        log.add(progress, loss, lr=rate, frames=batch[0].shape[2])
        if time.monotonic() - saved > EVERY_SECONDS:
            save(out / "dit", average.values, progress, extra)
            saved = time.monotonic()
    save(out / "dit", average.values, progress, extra)
    return progress
