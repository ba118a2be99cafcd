"""What a forward shows of its tokens: probe blocks, their attention, and the model's output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dit_accel.forward.clock import Clock
from dit_accel.pruning.config import TokenPruning
from dit_accel.pruning.criteria import Facts, text_share, transition_variation
from dit_accel.pruning.restore import Memory
from dit_accel.pruning.rows import Rows


@dataclass
class Observer:
    """What is seen between the first block and the span, and at the end.

    prune: whose criterion wants to know.
    clock: which guidance pass this is.
    rows: where the tokens of this forward lie.
    first: [B, N, C] tokens at the first block, until the span starts.
    transition: [B, N] summed Token Transition Variation of the probe modules.
    reading: [N] summed share of the probe blocks' attention that goes to the text.
    output: pass name → [B, N, P] tokens of the model's output at the previous step.
    """

    prune: TokenPruning
    clock: Clock
    rows: Rows
    first: Tensor | None = None
    transition: Tensor | None = None
    reading: Tensor | None = None
    output: dict[str, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Let go of a forward's tensors; the output stays for the next step."""
        self.first = self.transition = self.reading = None

    def enter(self, tokens: Tensor) -> Tensor:
        """The span starts with tokens [B, N, C]: what the probe blocks did to them."""
        assert self.first is not None, "the first block has run"
        probe, self.first = tokens - self.first, None
        return probe

    def facts(self, tokens: Tensor, probe: Tensor, known: Memory) -> Facts:
        """What a criterion is told of tokens [B, N, C] that enter the span."""
        return Facts(
            tokens=tokens,
            probe=probe,
            reference=known.reference,
            seen=known.seen,
            step=self.clock.step,
            seed=self.prune.seed,
            block=self.prune.block,
            transition=self.transition,
            output=self.output,
            text=self.reading,
        )

    def watch_attention(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """An attention call [B, n, H, D] comes; those of probe blocks tell who reads the text."""
        if self.prune.criterion != "text" or self.first is None:
            return
        n, n_keys = self.rows.n, k.shape[1]
        if n_keys == n:  # a self-attention of the visual tokens alone
            return
        visual = self.rows.among(n_keys, n)
        padding = mask is not None and mask.dtype == torch.bool and mask.shape[-2] == 1
        queries = q if q.shape[1] == n else q[:, visual]
        share = text_share(queries, k, visual, mask if padding else None, self.prune.block)
        self.reading = share if self.reading is None else self.reading + share

    def watch_transition(
        self, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        """Forward hook of a probe module; of joint attention the visual part is first."""
        if self.rows.running:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            found = transition_variation(*map(self.rows.visual, (x, y)))
            self.transition = found if self.transition is None else self.transition + found

    def watch_output(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        """Forward hook of the model's last projection."""
        if self.rows.running:
            output = output.transpose(0, 1) if self.rows.site.tokens_first else output
            self.output[self.clock.passname] = self.rows.visual(output)
