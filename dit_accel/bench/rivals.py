"""Block-sparse kernels of other packages at our table, where they are installed (extra `rivals`).

The signatures are those of flash-attn-4 4.0.0b36 (`flash_attn.cute.flash_attn_func` with
`flash_attn.cute.block_sparsity.BlockSparseTensorsTorch`) and of nvidia-cudnn-frontend 1.32.0
(`cudnn.block_sparse_attention`: `block_sparse_attention_forward`, `…_fp8_forward`). Their indices
ascend in a row, as ours do; the last block may be short.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.ops import backends
from dit_accel.table import BlockTable

Runs = dict[str, Callable[[], Tensor]]
INSTALL = 'it is not installed: pip install "dit-accel[rivals]"'


def runs(q: Tensor, k: Tensor, v: Tensor, table: BlockTable) -> tuple[Runs, dict[str, str]]:
    """Name → a call that gives [B, H, N, D], and for those that are absent the reason.

    q, k, v [B, H, N, D]. flash4: dense; flash4_sparse, bsa, bsa_fp8: at the table.
    """
    found: Runs = {}
    reasons: dict[str, str] = {}
    makers: dict[str, tuple[str, Callable[..., Callable[[], Tensor]]]] = {
        "flash4": ("flash_attn.cute", _dense),
        "flash4_sparse": ("flash_attn.cute", _flash4_sparse),
        "bsa": ("cudnn.block_sparse_attention", _bsa),
        "bsa_fp8": ("cudnn.block_sparse_attention", _bsa_fp8),
    }
    for name, (package, make) in makers.items():
        if not _installed(package):
            reasons[name] = INSTALL
            continue
        try:
            found[name] = make(q, k, v, table)
        except (ImportError, ValueError) as error:
            reasons[name] = str(error).splitlines()[0]
    return found, reasons


def flash4_backward(q: Tensor, k: Tensor, v: Tensor, table: BlockTable) -> Callable[[], None]:
    """Forward and backward of FlashAttention-4 at the table; ValueError where it is absent."""
    if not _installed("flash_attn.cute"):
        raise ValueError(INSTALL)
    attend, sparse = _flash4(), _block_tensors(table)
    turned = BlockTable.from_mask(
        table.to_mask().transpose(2, 3), table.block_k, table.block_q, table.n_k, table.n_q
    )
    back = _block_tensors(turned, (table.block_q, table.block_k))
    leaves = [_rows(x).detach().requires_grad_() for x in (q, k, v)]

    def run() -> None:
        out = attend(*leaves, block_sparse_tensors=sparse, block_sparse_tensors_bwd=back)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def _installed(package: str) -> bool:
    root = package.partition(".")[0]
    return find_spec(root) is not None and find_spec(package) is not None


def _rows(x: Tensor) -> Tensor:
    """[B, H, N, D] as the contiguous [B, N, H, D] that both packages read."""
    return x.transpose(1, 2).contiguous()


def _flash4() -> Callable[..., Any]:
    return import_module("flash_attn.cute").flash_attn_func


def _block_tensors(table: BlockTable, size: tuple[int, int] | None = None) -> Any:
    """Every kept block is full: no pair of its tokens is masked."""
    kind = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    return kind(
        mask_block_cnt=torch.zeros_like(table.counts),
        mask_block_idx=torch.zeros_like(table.indices),
        full_block_cnt=table.counts.contiguous(),
        full_block_idx=table.indices.contiguous(),
        block_size=size or (table.block_q, table.block_k),
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, table: BlockTable) -> Callable[[], Tensor]:
    attend = backends.run("flash_4")
    q, k, v = (_rows(x) for x in (q, k, v))
    return lambda: attend(q, k, v, None, None).transpose(1, 2)


def _flash4_sparse(q: Tensor, k: Tensor, v: Tensor, table: BlockTable) -> Callable[[], Tensor]:
    attend, sparse = _flash4(), _block_tensors(table)
    rows = [_rows(x) for x in (q, k, v)]

    def run() -> Tensor:
        out = attend(*rows, block_sparse_tensors=sparse)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _square(table: BlockTable) -> int:
    if table.block_q != table.block_k:
        raise ValueError(f"its blocks are square, not {table.block_q} × {table.block_k}")
    return table.block_q


def _bsa(q: Tensor, k: Tensor, v: Tensor, table: BlockTable) -> Callable[[], Tensor]:
    attend = import_module("cudnn.block_sparse_attention").block_sparse_attention_forward
    block = _square(table)
    short = -table.n_q % block  # Hopper's kernel of 64 takes whole query blocks alone
    rows = [F.pad(_rows(q), (0, 0, 0, 0, 0, short)), _rows(k), _rows(v)]
    options = {"q2k_block_nums": table.counts.contiguous(), "layout": "bshd"}
    if table.n_k % block:
        sizes = torch.full((table.key_blocks,), block, dtype=torch.int32, device=q.device)
        sizes[-1] = table.n_k % block
        options["block_sizes"] = sizes
    indices = table.indices.contiguous()

    def run() -> Tensor:
        out = attend(*rows, indices, sparse_block_size=block, **options)["o_tensor"]
        return out[:, : table.n_q].transpose(1, 2)

    return run


def _bsa_fp8(q: Tensor, k: Tensor, v: Tensor, table: BlockTable) -> Callable[[], Tensor]:
    attend = import_module("cudnn.block_sparse_attention").block_sparse_attention_fp8_forward
    block = _square(table)
    if table.n_q % block or table.n_k % block or bool((table.counts != table.counts.max()).any()):
        raise ValueError("in eight bits it takes whole blocks and as many of them in each row")
    heads = [x.contiguous() for x in (q, k, v)]
    indices = table.indices[..., : int(table.counts.max())].contiguous()
    return lambda: attend(*heads, indices, sparse_block_size=block)["o_tensor"]
