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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dit_accel.machine import holding
from dit_accel.ops.backends import Choice
from dit_accel.parallel.context import config_of
from dit_accel.runtime import patch
from dit_accel.runtime.books import Books
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.interception import interceptor

Forward = Callable[..., Any]
MOST = 8  # ways to begin, or to go on, that are kept: shapes, numbers of steps
# what PEFT's layers keep in plain attributes
_ADAPTER = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Recorder(Protocol):
    """What records; `Cuda`, and an emulation on the CPU in the tests."""

    def check(self, transformer: nn.Module) -> None:
        """ValueError for one whose forwards it cannot record."""

    def reads(self, x: Tensor) -> bool:
        """Whether a replay reads this argument again; what others hold is part of the key."""

    def record(
        self, run: Callable[[], Any], device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        """What `run` returned, which works on one device, not computed yet, and what computes it
        again in the same memory."""


class Cuda:
    """CUDA graphs, which share their memory: of what a graph computes only what is still referred
    to afterwards outlives it."""

    def __init__(self) -> None:
        self.pools: dict[torch.device, Any] = {}

    def check(self, transformer: nn.Module) -> None:
        """See Recorder."""
        where = sorted({str(x.device) for x in transformer.parameters()})
        if len(where) != 1 or torch.device(where[0]).type != "cuda":
            raise ValueError(
                f"CUDA graphs are for transformers on one CUDA GPU, and this "
                f"{type(transformer).__name__} is on {', '.join(where)}: leave graphs out"
            )

    def reads(self, x: Tensor) -> bool:
        """See Recorder."""
        return x.is_cuda

    def record(
        self, run: Callable[[], Any], device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        """See Recorder. RuntimeError where `run` waits for the GPU or copies from the host."""
        pool = self.pools.setdefault(device, torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        try:
            # the stream of a capture is one of the current device
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"),
            ):
                out = run()
        except RuntimeError as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"this forward cannot be recorded as a CUDA graph: {why}; leave graphs out"
            ) from error
        return out, graph.replay


class Given(NamedTuple):
    """The arguments of a forward. leaves: tensors and plain values, spec: how they lie. read: of
    each leaf, whether a replay reads it. keys: of each, what one graph serves."""

    leaves: list[Any]
    spec: TreeSpec
    read: list[bool]
    keys: tuple[Hashable, ...]

    @classmethod
    def of(cls, args: Any, kwargs: Any, recorder: Recorder) -> Given:
        """TypeError for an argument that is neither a tensor nor a plain value."""
        leaves, spec = tree_flatten((args, kwargs))
        read = [isinstance(x, Tensor) and recorder.reads(x) for x in leaves]
        return cls(leaves, spec, read, tuple(map(_key, leaves, read)))


@dataclass(eq=False)
class Recorded:
    """A forward that can be replayed. inputs: where it reads its arguments; held: tensors that it
    reads, too, and that nobody else may hold."""

    inputs: list[Any]
    output: list[Any]
    spec: TreeSpec
    replay: Callable[[], None]
    held: list[object]
    after: After | None


@dataclass(eq=False)
class After:
    """How a forward left its engine, and what was booked in it; dense: calls of each kind that a
    dense backend served."""

    state: dict[Any, Any]
    together: dict[Any, Any]
    stateless_from: int | None
    books: Books
    dense: dict[Any, int]

    @classmethod
    def of(cls, engine: Engine, books: Books, dense: dict[Any, int]) -> After:
        """Of a forward that has just been recorded with these books."""
        state, together = _copied(engine.state), _copied(engine.together)
        return cls(state, together, engine.stateless_from, books, dense)

    def restore(self, engine: Engine) -> None:
        """As if the forward had run."""
        for own, left in ((engine.state, self.state), (engine.together, self.together)):
            own.clear()
            own.update(_copied(left))
        engine.stateless_from = self.stateless_from
        engine.books.add(self.books)
        for key, calls in self.dense.items():
            _choices(engine)[key].calls += calls


@dataclass(eq=False)
class Node:
    """A forward that was seen, and what came next."""

    next: dict[Hashable, Node] = field(default_factory=dict)
    recorded: Recorded | None = None


@dataclass(eq=False)
class Tree:
    """The forwards of one engine. at: where its generation stands; replayed: all of it so far;
    mark: an object of this generation, None where that is not known."""

    root: Node = field(default_factory=Node)
    at: Node = field(default_factory=Node)
    mark: object = None
    generation: int | None = None
    replayed: bool = True

    def begin(self, generation: int) -> None:
        """Back to the root where a new generation starts."""
        if generation != self.generation:
            self.at, self.generation, self.replayed = self.root, generation, True
            self.mark = object()

    def go(self, key: Hashable) -> tuple[Node, bool]:
        """On to what comes next, and whether it was seen before."""
        ways, known = self.at.next, key in self.at.next
        node = ways.setdefault(key, Node())
        while len(ways) > MOST:
            del ways[next(iter(ways))]
        self.at = node
        return node, known


class Build(NamedTuple):
    """Of what a transformer is made. modules: those inside of it; digest: of them, of their
    adapters and of where tensors lie; shared: by other processes, too."""

    modules: list[nn.Module]
    digest: int
    shared: bool

    @classmethod
    def of(cls, transformer: nn.Module) -> Build:
        """It takes a millisecond."""
        modules = [m for m in transformer.modules() if m is not transformer]
        tensors = (*transformer.parameters(), *transformer.buffers())
        digest = hash((*map(_module, modules), *(x.data_ptr() for x in tensors)))
        shared = any(config_of(getattr(m, "processor", None)) is not None for m in modules)
        return cls(modules, digest, shared)

    def hooked(self) -> list[nn.Module]:
        """The modules on which something hangs now; guidance hangs it there for one pass of a step.
        A transformer's own hooks run outside of its forward."""
        found = ((m, vars(m)) for m in self.modules)
        names = ("_forward_hooks", "_forward_pre_hooks")
        return [m for m, own in found if own[names[0]] or own[names[1]] or "forward" in own]


def _hooks(m: nn.Module) -> Hashable:
    return id(m), len(m._forward_hooks), len(m._forward_pre_hooks), id(vars(m).get("forward"))


def _obstacle(build: Build, hooked: list[nn.Module], engine: Engine | None = None) -> str:
    """What makes of each forward another one, or "". hooked: what has hooks, the transformer's own
    among them."""
    if engine is not None and engine.span is not None:
        return "token pruning decides on the way which tokens run"
    if build.shared:
        return "other processes share the sequence"
    for own in map(vars, hooked):
        if "_hf_hook" in own:
            return "weights come and go by accelerate's offload"
        if (registry := own.get("_diffusers_hook")) is not None and registry.hooks:
            return f"diffusers' hook {next(iter(registry.hooks))!r} acts on the way"
    return ""


def _module(m: nn.Module) -> Hashable:
    own = vars(m)
    return id(m), id(own.get("processor")), *(str(own[name]) for name in _ADAPTER if name in own)


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
        if why := _obstacle(build, [transformer, *hooked], engine):
            raise RuntimeError(f"{why}, which CUDA graphs cannot follow: leave out one of them")
        given = Given.of(args, kwargs, self.recorder)
        at = None if engine is None else engine.here
        where = None if at is None else (at.step, at.steps, at.passname)
        kind = (id(transformer), build.digest, tuple(map(_hooks, hooked)), _mode())
        key = (kind, where, str(given.spec), given.keys)
        node, known = tree.go(key)
        if not known or not tree.replayed:
            tree.replayed = False
            return run(*args, **kwargs)
        tree.replayed = False  # until it has been
        if node.recorded is None:
            node.recorded = self._record(transformer, run, given, engine)
        out = _replay(node.recorded, given, engine)
        tree.replayed = True
        return out

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
        self, transformer: nn.Module, run: Forward, given: Given, engine: Engine | None
    ) -> Recorded:
        device = next(transformer.parameters()).device
        inputs = [self._input(i, given) for i in range(len(given.leaves))]
        args, kwargs = tree_unflatten(inputs, given.spec)
        with holding() as held, _apart(engine) as (books, dense):
            out, replay = self.recorder.record(lambda: run(*args, **kwargs), device)
        output, spec = tree_flatten(out)
        if strange := [x for x in output if not isinstance(x, (Tensor, *_PLAIN))]:
            raise RuntimeError(
                f"a transformer that returns {type(strange[0]).__name__} cannot be recorded as a "
                "CUDA graph: leave graphs out"
            )
        held += [] if engine is None else [engine.here, engine.order.pair]
        after = None if engine is None else After.of(engine, books, dense)
        return Recorded(inputs, output, spec, replay, held, after)

    def _input(self, i: int, given: Given) -> Any:
        """Argument i as a graph reads it."""
        x, key = given.leaves[i], (i, given.keys[i])
        if not given.read[i]:
            return x
        if key not in self.inputs:
            with torch.inference_mode(False):
                self.inputs[key] = torch.empty_like(x)
        return self.inputs[key].copy_(x)


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

    recorder: None takes CUDA graphs. scheduler: that of the pipeline, if there is one. Raises
    ValueError for a transformer that is not whole on a GPU, is offloaded, shares its sequence with
    other processes or is here already; RuntimeError at a forward that cannot be recorded, for it
    waits for the GPU, prunes tokens, has a step cache or weights that have gone since.
    """
    graphs, done = Graphs(recorder or Cuda(), scheduler), list[nn.Module]()
    for transformer in transformers:
        graphs.recorder.check(transformer)
        build = Build.of(transformer)
        why = _obstacle(build, [transformer, *build.hooked()])
        why = why or ("its forward has been replaced" if "forward" in vars(transformer) else "")
        if why:
            raise ValueError(
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


def _mode() -> Hashable:
    kind = "cuda"
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return torch.is_inference_mode_enabled(), cast, interceptor()


def _key(x: object, read: bool) -> Hashable:
    if isinstance(x, Tensor):
        held = None if read else str(x.tolist())
        return tuple(x.shape), x.stride(), x.dtype, str(x.device), held
    if isinstance(x, _PLAIN):
        return type(x), x
    raise TypeError(
        f"a forward that is given {type(x).__name__} cannot be a CUDA graph: leave graphs out"
    )


@contextmanager
def _apart(engine: Engine | None) -> Iterator[tuple[Books, dict[Any, int]]]:
    """What is counted in a block, in books of its own; the calls of dense backends once it ends."""
    dense: dict[Any, int] = {}
    if engine is None:
        yield Books(), dense
        return
    real, choices = engine.books, _choices(engine)
    before = {key: choice.calls for key, choice in choices.items()}
    engine.books = books = real.blank()
    books.forwards = [replace(real.forwards[-1], sparse=0, dense=0, kept=0.0)]
    try:
        yield books, dense
    finally:
        engine.books = real
        for key, choice in choices.items():
            dense[key] = choice.calls - before.get(key, 0)
            choice.calls -= dense[key]


def _choices(engine: Engine) -> dict[Any, Choice]:
    return {} if engine.backends is None else engine.backends.choices


def _replay(recorded: Recorded, given: Given, engine: Engine | None) -> Any:
    for own, x, read in zip(recorded.inputs, given.leaves, given.read, strict=True):
        if read:
            own.copy_(x)
    recorded.replay()
    if recorded.after is not None and engine is not None:
        recorded.after.restore(engine)
    out = [x.clone() if isinstance(x, Tensor) else x for x in recorded.output]
    return tree_unflatten(out, recorded.spec)


def _copied(x: Any) -> Any:
    """Dictionaries and lists anew, what they hold as it is."""
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return [_copied(value) for value in x] if isinstance(x, list) else x
