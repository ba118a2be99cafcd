"""What the benchmark compares with on a GPU: PyTorch's attention backends, and rivals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_accel.bench import rivals
from dit_accel.table import BlockTable

DENSE = ("dense", "cudnn", "flash", "flash4")  # the fastest of them is what ratios refer to
SPARSE = ("flex", "flash4_sparse", "bsa", "bsa_fp8")  # at the same table
_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def gpu(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, flex: bool = True
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Dense cuDNN and FlashAttention, FlexAttention at the same table, and the packages of others
    (rivals.py): those that run here, and for the others the reason why not.

    flex: with FlexAttention, which is compiled for each table's shape.
    """

    def dense(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    runs: dict[str, Callable[[], Tensor]]
    runs = {name: partial(dense, backend) for name, backend in _BACKENDS.items()}
    if flex:
        compiled, mask = torch.compile(flex_attention), flex_mask(table)
        runs["flex"] = lambda: compiled(q, k, v, block_mask=mask)
    others, reasons = rivals.runs(q, k, v, table)
    served = {}
    for name, run in (runs | others).items():
        try:
            run()
        except Exception as error:  # each package has its own
            reasons[name] = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            served[name] = run
    return served, reasons


def flex_mask(table: BlockTable) -> BlockMask:
    """The table as FlexAttention's block mask: every kept block is full, so no pair is masked."""
    kept = table.to_mask()
    indices = torch.argsort(kept, dim=-1, descending=True, stable=True).int()

    def read(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return kept[b, h, i // table.block_q, j // table.block_k]

    return BlockMask.from_kv_blocks(
        torch.zeros_like(table.counts),
        indices,
        table.counts,
        indices,
        BLOCK_SIZE=(table.block_q, table.block_k),
        mask_mod=read,
        seq_lengths=(table.n_q, table.n_k),
    )
