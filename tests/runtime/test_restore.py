"""After restore, nothing of ours is left on any model, and its output is bit for bit stock's."""

import importlib
import inspect
import pkgutil

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from support import NOW, left_on
from zoo import Pipe, forward, zoo

import dit_accel
from dit_accel import TokenPruning, TopK
from dit_accel.pipelines import registry

ZOO = zoo()
PRUNE = TokenPruning(
    keep=0.5, start=1, end=0, first=1, last=None, criterion="ttv*drift", context="pooled"
)


def attributes(model):
    """(owner, name, identity) of everything that a model's modules and processors hold."""
    seen = set()
    for name, module in model.named_modules():
        seen |= {(name, key, id(value)) for key, value in vars(module).items()}
        seen |= {(name, "class", id(type(module)))}
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            seen |= {(name, "hook", id(hook)) for hook in hooks.values()}
        processor = getattr(module, "processor", None)
        seen |= {(name, "processor", id(processor)), (name, "kind", id(type(processor)))}
        seen |= {(name, key, id(x)) for key, x in getattr(processor, "__dict__", {}).items()}
    return seen


def diffusers_globals():
    """(module, name, identity) of all functions and classes in the loaded modules of diffusers."""
    modules = {n: m for n, m in dict(importlib.sys.modules).items() if n.startswith("diffusers")}
    return {
        (name, key, id(value))
        for name, module in modules.items()
        for key, value in vars(module).items()
        if inspect.isroutine(value) or inspect.isclass(value)
    }


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_left(name):
    case = ZOO[name]
    model = case.build()
    options = [{}, {"order": "hilbert"}]
    adapter = registry.find(model)
    options += [{"prune": PRUNE}] if adapter.span is not None else []
    with torch.no_grad():
        once = attributes(model)
        stock = forward(model, case.arguments())
        before, around = attributes(model), diffusers_globals()
        own = {(owner, key) for owner, key, _ in once ^ before}  # a model may exchange its own
        for more in options:
            handle = dit_accel.accelerate(Pipe(model), TopK(keep=0.3), **NOW, **more)
            assert left_on(model)
            forward(model, case.arguments())
            handle.restore()
            assert left_on(model) == []
            assert {(a, b) for a, b, _ in attributes(model) ^ before} <= own
            assert diffusers_globals() == around
            assert torch.equal(forward(model, case.arguments()), stock)


def denoiser_classes():
    """Names of diffusers' transformers, and of what its pipelines call one, or a prior."""
    found = set()
    package = importlib.import_module("diffusers.models.transformers")
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        own = [kind for kind in vars(module).values() if inspect.isclass(kind)]
        found |= {
            kind.__name__
            for kind in own
            if issubclass(kind, ModelMixin) and kind.__module__ == info.name
        }
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if kind is None or not inspect.isclass(kind) or "__init__" not in vars(kind):
            continue
        for slot, parameter in inspect.signature(kind.__init__).parameters.items():
            if "transformer" in slot or "denoiser" in slot:
                text = parameter.annotation
                text = text if isinstance(text, str) else getattr(text, "__name__", str(text))
                found |= {part for part in text.replace("|", " ").split() if part[0].isupper()}
    return sorted(name.split(".")[-1] for name in found - {"None"})


def test_every_transformer_of_diffusers_is_served_or_refused_with_a_reason():
    known = {*registry.known(), *registry.left_alone()}
    missing = [name for name in denoiser_classes() if name not in known]
    assert missing == [] and len(denoiser_classes()) > 75
    assert all(len(why.split()) > 3 for why in registry.left_alone().values())
