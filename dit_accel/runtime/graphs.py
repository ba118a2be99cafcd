"""Whole transformer forwards as CUDA graphs: recorded once, replayed without Python.

Where a forward's kernels take less time than Python takes to launch them (a short clip, a small or
distilled model, few kept blocks), the GPU waits. A graph launches them at once.

What an accelerated forward does depends on those before it in its generation: methods keep a state.
So the forwards that were seen form a tree: from a node, what may come next, by what it is given and
where the generation stands. A forward that comes for the first time runs as ever, which compiles
its kernels. When it comes again, and all before it in this generation were replayed, it is
recorded; from then on it is replayed. Its state is kept with it, so that after it any forward can
run as ever. A stock transformer has no state: each of its forwards hangs at the root.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from dit_accel.machine import holding
from dit_accel.runtime import first_block, patch
from dit_accel.runtime.decision import Unseen
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.first_block import FirstBlockCache
from dit_accel.runtime.kinds import PLAIN, Build, Given, hooks, mode, obstacle
from dit_accel.runtime.recorded import After, Node, Recorded, State, Tree, apart
from dit_accel.runtime.recorder import Ask, Cuda, NotRecorded, Recorder


class Graphs:
    """The forwards of the transformers of one pipeline.

    inputs: where graphs read arguments; those that are given alike share their place, for each
    fills it first. scheduler: of the pipeline, has other timesteps in each generation. built: of a
    transformer the mark of the generation in which it was looked at, and what was found.
    """

    def __init__(self, recorder: Recorder, scheduler: object = None) -> None:
        self.recorder, self.scheduler = recorder, scheduler
        self.built: weakref.WeakKeyDictionary[nn.Module, tuple[object, Build]]
        self.built = weakref.WeakKeyDictionary()
        self.inputs: dict[Hashable, Tensor] = {}
        self.stock = Node()
        self.trees: weakref.WeakKeyDictionary[Engine, Tree] = weakref.WeakKeyDictionary()

    def forward(self, transformer: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the transformer's own forward returns."""
        own: Any = type(transformer).forward
        run, entry = own.__get__(transformer), patch.of(transformer)
        engine = None if entry is None else entry.engine
        tree = self._tree(engine)
        watched = engine is not None and engine.books.watcher is not None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or watched:
            tree.replayed = False
            return run(*args, **kwargs)
        build = self._build(transformer, tree.mark)
        hooked = build.hooked()
        cache = first_block.of(transformer)
        if why := obstacle(build, [transformer, *hooked], engine) or _unkept(cache, engine):
            raise NotRecorded(f"{why}, which CUDA graphs cannot follow: leave out one of them")
        given = Given.of(args, kwargs, self.recorder)
        at = None if engine is None else engine.here
        where = None if at is None else (at.step, at.steps, at.passname)
        kind = (id(transformer), build.digest, tuple(map(hooks, hooked)), mode(), cache is None)
        key = (kind, where, str(given.spec), given.keys)
        node, known = tree.go(key)
        replayed, tree.replayed = known and tree.replayed, False  # until it has been
        found = self._known(node, given, cache) if replayed else None
        if replayed and found is None:
            found = self._record(node, transformer, run, given, engine, cache)
        if found is None:
            out = run(*args, **kwargs)
            tree.went(node, None if cache is None else cache.computes)
            node.ran.add(node.last)
            return out
        out = found.finish(engine, cache)
        tree.went(node, found.answer)
        tree.replayed = True
        return out

    def _known(self, node: Node, given: Given, cache: FirstBlockCache | None) -> Recorded | None:
        """The recording that does what this forward does, begun, if there is one. Most often it
        does what it did the last time; each recording can ask. None is made twice: what came after
        it reads the memory of the first."""
        found = node.recorded.get(node.last) or next(iter(node.recorded.values()), None)
        if found is not None and (answer := found.begin(given, cache)) != found.answer:
            found = node.recorded.get(answer)
            if found is not None:
                found.begin(given, cache)
        return found

    def _tree(self, engine: Engine | None) -> Tree:
        """Where the forward at hand belongs, and where it stands there."""
        if engine is None:
            return Tree(self.stock, self.stock, getattr(self.scheduler, "timesteps", None))
        tree = self.trees.setdefault(engine, Tree())
        tree.begin(engine.clock.generation)
        return tree

    def _build(self, transformer: nn.Module, mark: object) -> Build:
        """Of what it is made, looked up once in a generation."""
        then, build = self.built.get(transformer, (None, None))
        if build is None or mark is None or mark is not then:
            self.built[transformer] = mark, (build := Build.of(transformer))
        return build

    def _record(
        self,
        node: Node,
        transformer: nn.Module,
        run: Callable[..., Any],
        given: Given,
        engine: Engine | None,
        cache: FirstBlockCache | None,
    ) -> Recorded | None:
        """This forward, begun; None where its step cache decides as it did not before."""
        device = next(transformer.parameters()).device
        inputs = [self._input(i, given) for i in range(len(given.leaves))]
        args, kwargs = tree_unflatten(inputs, given.spec)

        def forward(ask: Ask) -> Any:
            with nullcontext() if cache is None else cache.decision.asking(ask, node.ran):
                return run(*args, **kwargs)

        before = None if engine is None else State.of(engine, cache)
        try:
            with holding() as held, apart(engine) as (books, dense):
                made = self.recorder.record(forward, device)
        except Unseen:
            if before is not None and engine is not None:
                before.restore(engine, cache)
                engine.here.calls.clear()  # its layers will come for the first time
            return None
        if strange := [x for x in tree_leaves(made.out) if not isinstance(x, (Tensor, *PLAIN))]:
            raise NotRecorded(
                f"a transformer that returns {type(strange[0]).__name__} cannot be recorded as a "
                "CUDA graph: leave graphs out"
            )
        held += [] if engine is None else [engine.here, engine.order.pair]
        after = None if engine is None else After(State.of(engine, cache), books, dense)
        answer = None if cache is None else cache.computes
        found = Recorded(inputs, made, held, after, answer)
        node.recorded[found.answer] = found
        return found

    def _input(self, i: int, given: Given) -> Any:
        """Argument i as a graph reads it."""
        x, key = given.leaves[i], (i, given.keys[i])
        if not given.read[i]:
            return x
        if key not in self.inputs:
            with torch.inference_mode(False):
                self.inputs[key] = torch.empty_like(x)
        return self.inputs[key].copy_(x)


def _unkept(cache: FirstBlockCache | None, engine: object) -> str:
    """Why the state of a step cache is not kept from forward to forward, or ""."""
    if cache is None or engine is not None:
        return ""
    return 'a step cache is enabled on a pipeline that is not accelerated ("dense" would do)'


@contextmanager
def graphed(
    transformers: list[nn.Module], recorder: Recorder | None = None, scheduler: object = None
) -> Iterator[None]:
    """Forwards without gradients as CUDA graphs, for the length of a block.

    A forward is recorded the second time that a generation comes by it with the same shapes, steps
    and weights, and replayed from the third on; the first runs as ever. Each way to begin (a size,
    a number of steps) keeps the memory of its activations once; the oldest go when there are more
    than 8. While tables are watched (`Handle.watch`) forwards run as ever.

    A LoRA or weights that come, go or change are seen at the next generation, hooks at the next
    forward; plain attributes of modules are not, and what hooks inside do in Python is not done
    again.

    A step cache decides as ever, each time: a forward is recorded up to there and from there
    on, once for each decision. What follows decisions that have not come before runs as ever.

    recorder: None takes CUDA graphs. scheduler: that of the pipeline, if there is one. Raises
    NotRecorded, a ValueError and a RuntimeError, for a transformer that is not whole on a GPU, is
    offloaded, shares its sequence with other processes or is here already, and at a forward that
    cannot be recorded: it waits for the GPU, prunes tokens, has another step cache (or any without
    `accelerate`), weights that have gone since, or arguments beside tensors and plain values.
    """
    graphs, done = Graphs(recorder or Cuda(), scheduler), list[nn.Module]()
    for transformer in transformers:
        graphs.recorder.check(transformer)
        build = Build.of(transformer)
        why = obstacle(build, [transformer, *build.hooked()])
        why = why or ("its forward has been replaced" if "forward" in vars(transformer) else "")
        if why:
            raise NotRecorded(
                f"CUDA graphs are for a transformer as it is, and in this "
                f"{type(transformer).__name__} {why}: leave graphs out"
            )

    def forward(transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return graphs.forward(transformer, args, kwargs)

    try:
        for transformer in transformers:
            vars(transformer)["forward"] = MethodType(forward, transformer)
            done.append(transformer)
        yield
    finally:
        for transformer in done:
            vars(transformer).pop("forward", None)
