"""Gradients through an accelerated transformer, and what is trained."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from dit_accel import SLA, VSA, api, ops
from dit_accel.finetune.config import Settings
from dit_accel.finetune.student import Teacher, build, training_config
from dit_accel.methods.learned import Learned
from dit_accel.methods.sla import GATE
from dit_accel.methods.trained import lessons


def gradients(pipe, batch, **options):
    """Name → gradient of one teacher-MSE step, and the teacher's velocity."""
    settings = Settings(out=".", **{"method": SLA(keep=0.3), **options})
    teacher = Teacher(pipe.transformer, settings.train)
    student = build(pipe.transformer, settings, batch)
    target = teacher.velocity(batch)
    with api.accelerated(student, training_config(student, settings)) as handle:
        found = student(batch.noisy, batch.time, batch.conditions)
        F.mse_loss(found, target).backward()
    report = handle.report()
    assert report.kept == pytest.approx(1 / 3) and not report.fallbacks
    return {n: p.grad for n, p in student.named_parameters() if p.requires_grad}, target


def test_a_zero_projection_has_a_gradient_in_every_layer(pipe, batch):
    found, _ = gradients(pipe, batch)
    assert set(found) == {f"learned.layers-{i}-{x}" for i in (0, 1) for x in ("weight", "bias")}
    assert all(g.isfinite().all() and g.any() for g in found.values())


def test_checkpointing_changes_no_gradient(pipe, batch):
    plain, _ = gradients(pipe, batch)
    again, _ = gradients(pipe, batch, checkpointing=True)
    assert plain.keys() == again.keys()
    for name, g in plain.items():
        torch.testing.assert_close(again[name], g, msg=name)


def test_the_gate_starts_near_top_k_and_has_a_gradient(pipe, batch):
    found, _ = gradients(pipe, batch, method=SLA(keep=0.3, combine="gate"))
    assert len(found) == 2 and all(g.any() for g in found.values())
    assert 0.95 < torch.tensor(GATE).sigmoid() < 1


@pytest.mark.parametrize(
    "choice", [{"select": "window(t=1)"}, {"sort": "time"}, {"linear_layers": (1,)}], ids=str
)
def test_sla_learns_over_a_window_and_in_another_order(pipe, batch, choice):
    """AllMem's form: a window, and a linear memory of all keys; MiniCPM-SALA's: sparse and linear
    layers. A step down the gradient helps."""
    settings = Settings(out=".", method=SLA(keep=0.3, **choice))
    teacher = Teacher(pipe.transformer, settings.train)
    student = build(pipe.transformer, settings, batch)
    target, losses = teacher.velocity(batch), []
    with api.accelerated(student, training_config(student, settings)) as handle:
        for _ in range(2):
            found = student(batch.noisy, batch.time, batch.conditions)
            losses.append(F.mse_loss(found, target))
            losses[-1].backward()
            with torch.no_grad():
                for p in (p for p in student.parameters() if p.requires_grad):
                    p -= 0.05 * p.grad / p.grad.norm()
                    p.grad = None
        linear = len(settings.method.linear_layers)
        assert handle.report().kept == pytest.approx((2 - linear) / 6)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("branch", ["decay & rms", "gated", "rala", "conv", "memory", "latents"])
def test_a_branch_learns_every_tensor(pipe, batch, branch):
    """In a transformer, from where it is top-k; checkpointing changes no gradient."""
    method = SLA(keep=0.3, branch=branch)
    parts = set(method.parts) - {"weight", "bias"}
    first, _ = gradients(pipe, batch, method=method)
    assert parts <= {name.rpartition("-")[2] for name in first}
    with torch.no_grad():  # W = 0 hides what it projects
        start = {f"layers.{i}.weight": torch.eye(64) / 4 for i in (0, 1)}
        method = replace(method, weights=None).with_weights(start)
    plain, _ = gradients(pipe, batch, method=method)
    assert all(g.isfinite().all() and g.any() for g in plain.values())
    again, _ = gradients(pipe, batch, method=method, checkpointing=True)
    for name, g in plain.items():
        torch.testing.assert_close(again[name], g, msg=name)


@dataclass(frozen=True)
class Louder(Learned):
    """Pooled attention, each head times 1 + a number that is learned."""

    name: ClassVar[str] = "louder"
    description: ClassVar[str] = "pooled, and a factor for each head"
    parts = {"factor": "of each head, less one [H]"}

    def fresh(self, heads, head_dim, width):
        return {"factor": torch.zeros(heads)}

    def __call__(self, q, k, v, call):
        out = ops.pooled_attention(q, k, v, self.table(q, k, call, v), call.scale)
        learned = self.of(call, q.device)
        return out if learned is None else out * (1 + learned["factor"][:, None, None])


def test_any_method_with_tensors_is_trained(pipe, batch, tmp_path):
    found, _ = gradients(pipe, batch, method=Louder(keep=0.3))
    assert set(found) == {f"learned.layers-{i}-factor" for i in (0, 1)}
    assert all(g.shape == (2,) and g.any() for g in found.values())
    method = Louder(0.3).with_weights({"layers.0.factor": torch.ones(2)})
    method.save(tmp_path / "louder.safetensors")
    again = Louder(0.3, weights=str(tmp_path / "louder.safetensors"))
    assert torch.equal(again.tensors()["layers.0.factor"], torch.ones(2))


@pytest.mark.parametrize("linear", ["all", None])
def test_a_selector_learns_beside_the_model(pipe, batch, linear):
    """Its loss comes once a layer, checkpointed or not, and reaches its tensors alone."""
    method = SLA(keep=0.3, linear=linear, select="learned(rank=4)")
    found = {}
    for again in (False, True):
        settings = Settings(out=".", method=method, checkpointing=again)
        student = build(pipe.transformer, settings, batch)
        with (
            api.accelerated(student, training_config(student, settings)) as handle,
            lessons() as losses,
        ):
            velocity = student(batch.noisy, batch.time, batch.conditions)
            (0 * velocity.sum() + sum(losses)).backward()
        assert len(losses) == 2 and handle.report().kept == pytest.approx(1 / 3)
        found[again] = {n: p.grad for n, p in student.named_parameters() if p.requires_grad}
    for name, g in found[False].items():
        own = name.endswith(("route_q", "route_v"))  # B = 0 there would leave A without
        assert g.any() == own and g.isfinite().all(), name
        torch.testing.assert_close(found[True][name], g, msg=name)


def test_vsa_starts_without_a_gate_and_its_gradient_reaches_it(pipe, batch):
    method = VSA(keep=1 / 3, tile=(1, 8, 8))
    found, _ = gradients(pipe, batch, method=method)
    assert set(found) == {f"learned.layers-{i}-weight" for i in (0, 1)}
    assert all(g.shape == (128, 128) and g.isfinite().all() and g.any() for g in found.values())
    again, _ = gradients(pipe, batch, method=method, checkpointing=True)
    for name, g in found.items():
        torch.testing.assert_close(again[name], g, msg=name)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_teacher_is_the_model_as_it_was(pipe, batch, train):
    with torch.no_grad():
        stock = pipe.transformer(batch.noisy, batch.time, **batch.conditions)[0]
    found, target = gradients(pipe, batch, train=train, **{"rank": 2} if train == "lora" else {})
    assert torch.equal(target, stock)
    touched = [n for n, g in found.items() if g is not None and g.any()]
    assert any("attn1.to_q" in n for n in touched) and any("learned" in n for n in touched)
    assert all("lora" in n or "learned" in n for n in found) == (train == "lora")


def test_adapters_reach_the_whole_block_when_asked_to(pipe, batch):
    found, _ = gradients(pipe, batch, train="lora", rank=2, adapt="blocks")
    reached = {n for n, g in found.items() if g is not None and g.any()}
    for part in ("attn1.to_q", "attn2.to_out", "ffn.net"):
        assert any(part in n and "blocks-0" in n.replace(".", "-") for n in reached), part
    assert not any("proj_out" in n or "condition_embedder" in n for n in found)


def test_weights_to_start_from_must_fit(pipe, batch, tmp_path):
    path = tmp_path / "sla.safetensors"
    SLA().with_weights({"layers.0.weight": torch.ones(32, 32)}).save(path)
    settings = Settings(out=".", method=SLA(keep=0.3, weights=str(path)))
    with pytest.raises(ValueError, match=r"is \[32, 32\], but this model's head_dim makes it"):
        build(pipe.transformer, settings, batch)
    SLA().with_weights({"layers.7.weight": torch.ones(64, 64)}).save(path)
    settings = Settings(out=".", method=SLA(keep=0.3, weights=str(path)))
    with pytest.raises(ValueError, match="layers.7.weight, which this model has no use for"):
        build(pipe.transformer, settings, batch)


def test_latents_of_another_model_are_refused(pipe, batch):
    batch.conditions["encoder_hidden_states"] = torch.randn(1, 16, 8)
    with pytest.raises(ValueError, match="cannot run sparse on these data: mat1 and mat2"):
        build(pipe.transformer, Settings(out=".", method=SLA(keep=0.3)), batch)
