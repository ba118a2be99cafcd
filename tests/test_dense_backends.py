"""Dense attention by a named backend, or by the fastest exact one; the report tells which."""

import pytest
import torch
import torch.nn.functional as F
from runtime.support import wan
from tiny import tiny_flux, tiny_wan

from dit_accel import Schedule, accelerate
from dit_accel.ops import backends
from dit_accel.testing import assert_close


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    monkeypatch.setattr(backends, "_MEASURED", {})


def tokens(n=100, heads=2, d=16):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, n, heads, d, generator=generator) for _ in range(3))


def sdpa(q, k, v, mask=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("name", ["native", "native_math", "_native_math", "kernel"])
def test_a_named_backend_gives_dense_attention(name):
    q, k, v = tokens()
    out = backends.Backends(name)(q, k, v, None, None, own=None)
    assert_close(name, out, sdpa(*(x.double() for x in (q, k, v))).float(), sdpa(q, k, v))


@pytest.mark.parametrize("method", ["dense", "shared"])
@pytest.mark.parametrize("dense", ["auto", "_native_math", "kernel"])
def test_a_pipeline_runs_it_and_says_so(dense, method):
    pipe = tiny_wan()
    options = {"schedule": Schedule(warmup=1), "min_tokens": 0}
    with_own = accelerate(pipe, method, **options)
    expected = wan(pipe, steps=3)
    assert with_own.report().backends == []
    handle = accelerate(pipe, method, dense=dense, **options)
    out = wan(pipe, steps=3)
    (found,) = handle.report().backends
    assert found["backend"] == {"auto": "native"}.get(dense, dense)
    assert f"  backend: {found['backend']} × {found['calls']} for [" in str(handle.report())
    layers, passes = len(handle.report().layers), 2
    dense_steps = {"dense": 3, "shared": 2}[method]  # the warm-up, and the first full step
    assert found["calls"] == layers * passes * dense_steps
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-3)
    handle.restore()


def test_processors_that_call_sdpa_are_served_too():
    pipe = tiny_flux()
    handle = accelerate(pipe, "topk", dense="kernel", min_tokens=10**6)
    picture = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16}
    pipe("a cat", **picture, output_type="latent")
    assert {found["backend"] for found in handle.report().backends} == {"kernel"}


def test_the_fastest_that_agrees_is_taken_once_for_each_kind_of_call(monkeypatch):
    ran = []

    def slow(q, k, v, mask, scale):
        ran.append("slow")
        for _ in range(20):
            out = sdpa(q, k, v, mask)
        return out

    fakes = {
        "native": lambda q, k, v, mask, scale: sdpa(q, k, v, mask),
        "slow": slow,
        "wrong": lambda q, k, v, mask, scale: q,
        "broken": lambda *call: 1 / 0,
    }
    monkeypatch.setattr(backends, "run", fakes.__getitem__)
    monkeypatch.setattr(backends, "at_hand", lambda device: ["broken", "wrong", "slow", "native"])
    q, k, v = tokens(410)
    chosen = backends.Backends("auto")
    for n in (410, 401, 100):
        chosen(q[:, :n], k[:, :n], v[:, :n], None, None, own=None)
    near, far = chosen.choices.values()
    assert (near.backend, near.calls, far.calls) == ("native", 2, 1)
    assert set(near.ms) == {"slow", "native"} and near.ms["native"] < near.ms["slow"]
    assert near.refused["broken"] == "division by zero" and "differs" in near.refused["wrong"]
    times = len(ran)
    backends.Backends("auto")(q, k, v, None, None, own=None)  # another pipeline, the same call
    assert len(ran) == times


def test_what_needs_gradients_or_a_mask_stays_with_the_pipelines_own():
    q, k, v = tokens()
    own = []

    def mine(q, k, v, mask, scale):
        own.append(mask is not None)
        return sdpa(q, k, v, mask)

    kernel = backends.Backends("kernel")
    kernel(q, k, v, torch.ones(1, 1, 1, 100, dtype=torch.bool), None, mine)
    kernel(q.requires_grad_(), k, v, None, None, mine).sum().backward()
    assert own == [True, False] and q.grad is not None
    assert "our kernel takes no mask" in str([c.refused for c in kernel.choices.values()])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fast", "there is no dense backend 'fast': take auto, or one of kernel, flash_4, flash"),
        ("flash_4", "the dense backend 'flash_4' is not at hand: pip install flash-attn-4"),
        ("flash", "the dense backend 'flash' is not at hand: Flash Attention backend"),
    ],
)
def test_an_unknown_or_missing_backend_is_refused_before_the_pipeline_is_touched(
    name, said, monkeypatch
):
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    pipe = tiny_wan()
    with pytest.raises(ValueError, match="dense backend") as refusal:
        accelerate(pipe, "topk", dense=name)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert "_dit_accel" not in vars(pipe.transformer)


def test_a_backend_that_cannot_serve_the_call_is_named():
    q, k, v = tokens()
    with pytest.raises(RuntimeError, match=r"_native_cudnn cannot serve \[1, 100, 2, 16\] × 100 "):
        backends.Backends("_native_cudnn")(q, k, v, None, None, own=None)


def test_of_a_gpu_the_best_guess_stands_where_nothing_can_be_measured(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: "absent" * name.startswith("flash"))
    names = backends.at_hand(torch.device("cuda"))
    assert names == ["_flash_3", "kernel", "_native_cudnn", "native"]  # none of the Hub's is here
    assert backends.fastest(names[:1], *tokens()).backend == "_flash_3"
