"""Teach the text encoder word order: which place each word stands for. Half a minute on a GPU.

    python assets/training/words.py data/scenes/dit --out data/scenes/words

T5 does not scale its logits by the width of a head. Under Muon its attention became one-hot, its
relative biases lost their say, and "a turtle left of a tree" was to the transformer the same bag
of words as "a tree left of a turtle". Here heads begin anew by looking at neighbours, and learn
beside a linear head that reads, at a word of an object, the centre of that object, and at a colour
of a ramp, its end. The squared distance to what the encoder said before keeps the rest in place.
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path

import scene_set
import torch
from layout import Layout, arrange
from run_state import Average, load, save
from scene_flow import Flow
from squeeze import restore
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from dit_accel.inputs.scene import Scene, split

TEXT_POSITIONS = 32
NEIGHBOURS = (  # from and to, as offsets: what the heads of each layer begin with
    ((-1, -1), (1, 1), (-4, -2), (2, 4)),
    ((-3, -1), (1, 3), (-8, -4), (4, 8)),
)
NEAR = 5.0  # logit of these neighbours above all others
KEPT = 0.3  # weight of the distance to the encoder before
LEARNING_RATE = 2e-3
ATTENTION = ("SelfAttention.q", "SelfAttention.k")  # not for Muon: their logits are not scaled


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids [P, 32] and lengths [P]; ValueError for an unknown word or more than 31 words."""
    vocabulary = tokenizer.get_vocab()
    ids = torch.zeros(len(prompts), TEXT_POSITIONS, dtype=torch.long)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens = [vocabulary.get(word, -1) for word in split(prompt)]
        if len(tokens) >= TEXT_POSITIONS or -1 in tokens:
            raise ValueError(f"Expected at most 31 words of the vocabulary, got {prompt!r}.")
        ids[row, : len(tokens)] = torch.tensor(tokens)
        lengths[row] = len(tokens)
    return ids, lengths


def places(scene: Scene, layout: Layout, prompt: str) -> Tensor:
    """[32, 3]: x and y in [-1, 1] that each word of the prompt stands for, and 1 if it does."""
    words, out, at = split(prompt), torch.zeros(TEXT_POSITIONS, 3), 0
    for thing, (x, y, _) in zip(scene.objects, layout.boxes, strict=True):
        name = split(thing.name)
        at = _find(words, name, at)
        out[at : at + len(name)] = torch.tensor([2 * x - 1, 2 * y - 1, 1.0])
        at += len(name)
    if scene.backdrop.second:
        at = _find(words, ["on", "a"], at)
        while words[at + 3 : at + 4] != ["to"]:  # not the "on a" of a place
            at = _find(words, ["on", "a"], at + 1)
        out[at + 2], out[at + 4] = torch.tensor([0.0, -1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    return out


def _find(words: list[str], some: list[str], start: int) -> int:
    return next(n for n in range(start, len(words)) if words[n : n + len(some)] == some)


class WordPlaces(nn.Module):
    """Linear head on the encoder's output: [B, L, C] to x and y."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 2)

    def loss(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared error where `wanted` ([B, L, 3], of `places`) knows a place."""
        known = wanted[..., 2]
        error = (self.head(hidden.float()) - wanted[..., :2]).square().mean(-1)
        return (error * known).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def look_at_neighbours(encoder: UMT5EncoderModel) -> None:
    """Every head begins with a few neighbours, content left for training."""
    for ranges, block in zip(NEIGHBOURS, encoder.encoder.block, strict=False):
        attention = block.layer[0].SelfAttention
        attention.q.weight.mul_(0.05)
        bias = attention.relative_attention_bias.weight
        bias.zero_()
        for head in range(bias.shape[1]):
            low, high = ranges[head % len(ranges)]
            offsets = torch.arange(low, high + 1)
            bias[attention._relative_position_bucket(offsets), head] = NEAR


def batch(rng: random.Random, count: int, side: int = 384) -> tuple[list[str], Tensor]:
    """Prompts as in training, and the places of their words [B, 32, 3]."""
    prompts, wanted = [], []
    for _ in range(count):
        scene = scene_set.draw(rng, side, counts=scene_set.MANY)
        prompts.append(scene.text(articles=rng.random() < 0.5))
        wanted.append(places(scene, arrange(scene, side, 33, rng), prompts[-1]))
    return prompts, torch.stack(wanted)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder, or file of squeeze.py")
    parser.add_argument("--model", type=Path, default=Path("assets/emoji"))
    parser.add_argument("--out", type=Path, default=Path("data/scenes/words"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    flow, pipe = Flow.of(args.model, scene_set.VOCABULARY)
    found = restore(args.checkpoint) if args.checkpoint.is_file() else load(args.checkpoint)
    average = Average(flow.parts, decay=0.0)
    average.load(found[0])
    device = torch.device(args.device)
    encoder = flow.text_encoder.to(device)
    before = copy.deepcopy(encoder)
    look_at_neighbours(encoder)
    head, rng = WordPlaces(encoder.config.d_model).to(device), random.Random(0)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, args.steps)
    for step in range(1, args.steps + 1):
        prompts, wanted = batch(rng, args.batch)
        ids, lengths = tokenize(pipe.tokenizer, prompts)
        mask = (torch.arange(TEXT_POSITIONS) < lengths[:, None]).long().to(device)
        ids, wanted = ids.to(device), wanted.to(device)
        with torch.no_grad():
            said = before(ids, mask).last_hidden_state
        says = encoder(ids, mask).last_hidden_state
        moved = ((says - said).square() * mask[..., None]).sum() / (
            said.square() * mask[..., None]
        ).sum()
        lost = head.loss(says, wanted)
        (KEPT * moved + lost).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        fall.step()
        if step % 50 == 0:
            print(f"{step}: moved {moved.item():.4f}, places {lost.item():.4f}", flush=True)
    encoder.cpu()
    average.update(0)
    save(args.out, average.values, *found[1:])


if __name__ == "__main__":
    main()
