"""Which implementation serves, and the reasons of the others."""

import subprocess
import sys

import pytest
import torch

from dit_accel import ops
from dit_accel.ops import dispatch

Q = torch.zeros(1, 1, 64, 16)


def test_cpu_is_served_by_torch():
    assert dispatch.select("block_sparse_attention", Q).name == "torch"
    assert dispatch.select("block_sparse_attention.backward", Q).name == "torch"


def test_explain_names_every_implementation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = dict(dispatch.explain("block_table", Q))
    assert reasons == {"triton": reasons["triton"], "torch": None, "reference": None}
    assert "CUDA" in reasons["triton"]


def test_the_variable_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIT_ACCEL_KERNELS", "reference")
    assert dispatch.select("block_table", Q).fn.__module__.endswith("reference")
    monkeypatch.setenv("DIT_ACCEL_KERNELS", "torch")
    assert dispatch.select("block_table", Q).fn.__module__.endswith("torch")


def test_a_forced_implementation_that_cannot_serve_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("DIT_ACCEL_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="CUDA tensor, not one on cpu"):
        ops.block_table(Q, Q, 0.5)


def test_an_unknown_name_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIT_ACCEL_KERNELS", "cuda")
    with pytest.raises(ValueError, match="triton, torch, reference, not 'cuda'"):
        dispatch.select("block_table", Q)


def test_an_operator_without_the_part_gives_the_reason():
    with pytest.raises(RuntimeError, match="torch: it has no backward"):
        dispatch.select("block_table.backward", Q)


def test_the_cpu_path_does_not_import_triton():
    # torch itself imports triton for some operators; what counts is that our kernels do not.
    code = (
        "import sys, torch; from dit_accel import ops; q = torch.randn(1, 1, 64, 8);"
        "ops.block_sparse_attention(q, q, q, ops.block_table(q, q, 1.0));"
        "sys.exit(any(m.startswith('dit_accel.kernels') and m.endswith('.triton')"
        " for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
