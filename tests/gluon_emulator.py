"""Runs a warp-specialized Gluon kernel on the CPU, its roles in an order drawn at random.

The kernel's own text is executed, with this file in the place of Gluon: a role is a thread, of
which one runs at a time; copies by TMA and asynchronous products take effect at any moment that the
barriers and waits allow; memory that a copy is about to fill holds NaN. A protocol that works by
luck gives NaN or other rows here under some seed, or a deadlock, which is an error.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gluon_machine import Barrier, Machine, Role, machine, start
from torch import Tensor

# Of our own code, what the kernels share; the second takes from the first.
PARTS = [
    f"dit_accel.kernels.block_sparse_attention.gluon_{name}"
    for name in ("parts", "backward_parts", "additions")
]


class Value(torch.Tensor):
    """A tensor or scalar of the kernel; its layout is of no consequence here."""

    @property
    def type(self) -> Layout:
        return Layout()

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return self.view(dtype) if bitcast else super().to(dtype)


class Layout:
    """Any layout; also the parent of one."""

    parent = property(lambda self: self)
    layout = property(lambda self: self)
    tensor_type = property(lambda self: self)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass


def value(x: Any, dtype: torch.dtype | None = None) -> Value:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class Pointer:
    """Into the elements of a tensor; reading beyond it is an error."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.base, self.offset + more)

    def to(self, _: torch.dtype) -> Pointer:
        return self

    def at(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset = value(self.offset).long()
        mask = value(True if mask is None else mask).expand(offset.shape)
        used = offset[mask]
        assert not used.numel() or 0 <= used.min() <= used.max() < self.memory.numel(), used
        return offset, mask

    @property
    def memory(self) -> Tensor:
        """All elements from the tensor's first on, as they lie."""
        size = self.base.untyped_storage().nbytes() // self.base.element_size()
        return self.base.as_strided((size - self.base.storage_offset(),), (1,))


class Shared:
    """A view of shared memory: a tensor, or a function that gives its content when it is read."""

    def __init__(self, data: Tensor | Callable[[], Tensor]) -> None:
        self._data = data
        self.shape, self.dtype = list(self.data.shape), self.data.dtype

    @property
    def data(self) -> Tensor:
        return self._data() if callable(self._data) else self._data

    def index(self, i: Any) -> Shared:
        if callable(self._data):
            return Shared(lambda: self.data[int(i)])
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(lambda: self.data.permute(order))

    def slice(self, first: int, length: int, dim: int) -> Shared:
        return Shared(lambda: self.data.narrow(dim, first, length))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], _: Layout) -> Shared:
        if len(shape) == len(self.shape):  # panels of 64 columns as tiles, or the reverse
            return Shared(lambda: _seen_as(self.data, *shape))
        return Shared(self.data.view(shape))

    def load(self, _: Layout) -> Value:
        machine().pause()
        return value(self.data.clone())

    def store(self, x: Tensor) -> None:
        machine().pause()
        self.data.copy_(x)


def _seen_as(x: Tensor, n: int, rows: int, d: int) -> Tensor:
    """[N, R, C] as NVMMASharedLayout has it, all rows of a panel of 64 columns, then the next, read
    as [n, rows, d]."""
    panels = x.view(x.shape[0], x.shape[1], -1, 64).transpose(1, 2).reshape(n, d // 64, rows, 64)
    return panels.transpose(1, 2).reshape(n, rows, d)


class Barriers(list):
    """Barriers in shared memory."""

    def index(self, i: Any) -> Barrier:
        return self[int(i)]


class Descriptor:
    """A tensor descriptor as the kernel and the copies see it."""

    def __init__(self, host: Any) -> None:
        self.host, self.dtype, self.layout = host, host.base.dtype, host.layout

    def box(self, at: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """What of the box at a place is inside of the tensor, and where in the box that is."""
        inside, where = [], []
        for i, size, width in zip(at, self.host.shape, self.host.block_shape, strict=True):
            first, last = min(max(i, 0), size), min(max(i + width, 0), size)
            inside.append(slice(first, last))
            where.append(slice(first - i, last - i) if last > first else slice(0, 0))
        return self.host.base[tuple(inside)], tuple(where)


class Product:
    """An asynchronous product; it reads shared memory when it happens, at the last at its wait."""

    def __init__(self, a: Tensor | Shared, b: Shared, acc: Tensor, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.result: Value | None = None
        self.type = Layout()

    def happen(self) -> None:
        if self.result is None:
            left = self.a.data if isinstance(self.a, Shared) else self.a
            product = left.float() @ self.b.data.float()
            if isinstance(self.acc, Product):
                self.acc = self.acc.result  # products happen in the order in which they are issued
            self.result = value(self.acc + product if self.use_acc else product)


def _wait(bar: Barrier, phase: Any, pred: Any = True) -> None:
    if pred:
        machine().pause(lambda: bar.phases & 1 != int(phase))


def _arrive(bar: Barrier, *, count: int = 1) -> None:
    machine().pause()
    bar.change(count, 0)


def _expect(bar: Barrier, size: int) -> None:
    machine().pause()
    bar.change(0, size)
    bar.change(1, 0)


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.pending = count
    machine().barriers.append(bar)


def _async_load(desc: Descriptor, at: list, bar: Barrier, to: Shared) -> None:
    machine().pause()
    assert list(to.shape) == list(desc.host.block_shape)
    place = [int(i) for i in at]
    to.data.copy_(_poison(to.data.dtype))

    def land() -> None:
        inside, where = desc.box(place)
        to.data.zero_()
        to.data[where] = inside
        bar.change(0, -to.data.numel() * to.data.element_size())

    machine().events.append(land)


def _poison(dtype: torch.dtype) -> Tensor:
    """What memory holds that nobody may read: NaN, or a number that no operand has."""
    return torch.tensor(-128 if dtype == torch.int8 else torch.nan).to(dtype)


def _async_store(desc: Descriptor, at: list, source: Shared) -> None:
    machine().pause()
    place, role = [int(i) for i in at], machine().role

    def leave() -> None:
        inside, where = desc.box(place)
        inside.copy_(source.data[where])
        role.stores.remove(leave)

    role.stores.append(leave)
    machine().events.append(leave)


def _store_wait(pending: int) -> None:
    role = machine().role
    machine().pause(lambda: len(role.stores) <= pending)


def _mma(a: Tensor, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = True) -> Product:
    product = Product(a, b, acc, use_acc)
    machine().role.products.append(product)
    if machine().random.random() < 0.5:
        machine().pause()
        for earlier in machine().role.products:
            earlier.happen()
    return product


def _mma_wait(pending: int, deps: tuple[Product, ...]) -> Value | tuple[Value, ...]:
    products = machine().role.products
    machine().pause()
    while len(products) > pending:
        products.pop(0).happen()
    assert all(p.result is not None for p in deps), "a product is used before its wait"
    results = tuple(p.result for p in deps)
    return results if len(deps) > 1 else results[0]


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) > 1 else Barrier()
    return Shared(_poison(dtype).expand(shape).clone())


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    offset, mask = pointer.at(mask)
    read = pointer.memory[offset.where(mask, 0)]
    return value(torch.where(mask, read, value(other, read.dtype)))


def _store(pointer: Pointer, x: Tensor, mask: Any = None) -> None:
    offset, mask = pointer.at(mask)
    pointer.memory[offset[mask]] = x[mask].to(pointer.base.dtype)


def _asm(asm: str, _: str, args: list, dtype: torch.dtype, is_pure: bool, pack: int) -> None:
    """Addition of four numbers of a thread at the place of the first: of an accumulator it has
    two rows, eight apart, and two columns of each."""
    assert asm.startswith("red") and ".add.v4.f32" in asm and pack == 4
    pointer, x = args
    rows, columns = (torch.arange(size) for size in x.shape)
    nth = (rows % 16 // 8 * 2)[:, None] + columns % 2
    offset, _ = (pointer + nth).at(None)
    pointer.memory.index_put_((offset,), x, accumulate=True)


def _atomic_add(pointer: Pointer, x: Any, mask: Any = None, *, sem: str) -> Value:
    """What was there before, where the mask is true; elsewhere a number that nobody may read."""
    offset, mask = pointer.at(mask)
    before = pointer.memory[offset.where(mask, 0)].masked_fill(~mask, 2**20)
    x = value(x, before.dtype).expand(offset.shape)[mask]
    pointer.memory.index_put_((offset[mask],), x, accumulate=True)
    return value(before)


def _specialize(roles: list[tuple], warps: list[int], registers: list[int]) -> None:
    assert len(roles) == len(warps) + 1 == len(registers) + 1
    threads = [Role(*role) for role in roles]
    for thread in threads:
        thread.start()
    machine().run(threads)


def _jit(fn: Any = None, **_: Any) -> Any:
    return fn if callable(fn) else lambda fn: fn


def _language() -> types.SimpleNamespace:
    gl = types.SimpleNamespace(
        constexpr=lambda x: x, shared_memory_descriptor=Shared, allocate_shared_memory=_allocate,
        program_id=lambda _: value(machine().program),
        num_programs=lambda _: value(machine().programs),
        load=_load, store=_store, inline_asm_elementwise=_asm, atomic_add=_atomic_add,
        warp_specialize=_specialize, static_range=range,
        convert_layout=lambda x, _: x, cdiv=lambda a, b: -(-a // b),
        zeros=lambda shape, dtype, _: value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, x, dtype, _: value(torch.full(shape, x, dtype=dtype)),
        arange=lambda first, last, layout: value(torch.arange(first, last, dtype=torch.int32)),
        where=lambda c, a, b: torch.where(value(c), value(a), value(b)),
        maximum=lambda a, b: torch.maximum(*torch.broadcast_tensors(value(a), value(b))),
        minimum=lambda a, b, **_: torch.minimum(*torch.broadcast_tensors(value(a), value(b))),
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        exp=torch.exp, exp2=torch.exp2, log2=torch.log2, split=lambda x: x.unbind(-1),
        abs=torch.abs, fma=lambda a, b, c: a * b + c, float8e4nv=torch.float8_e4m3fn,
    )  # fmt: skip
    for name in ("int8", "int32", "int64", "float32"):
        setattr(gl, name, getattr(torch, name))
    shared, distributed = ("NVMMAShared", "SwizzledShared"), ("NVMMADistributed", "Blocked")
    for name in (*shared, *distributed, "Slice", "DotOperand"):
        setattr(gl, f"{name}Layout", Layout)

    def static_assert(condition: bool) -> None:
        assert condition

    gl.static_assert = static_assert
    return gl


def _modules() -> dict[str, Any]:
    barrier = types.SimpleNamespace(
        init=_init, wait=_wait, arrive=_arrive, expect=_expect, MBarrierLayout=Layout
    )
    tma = types.SimpleNamespace(
        async_load=_async_load, async_store=_async_store, store_wait=_store_wait
    )
    hopper = types.SimpleNamespace(
        fence_async_shared=lambda: None, mbarrier=barrier, tma=tma, warpgroup_mma=_mma,
        warpgroup_mma_wait=_mma_wait,
    )  # fmt: skip
    gluon = types.SimpleNamespace(jit=_jit, language=_language())
    name = "triton.experimental"
    return {
        name: types.SimpleNamespace(gluon=gluon),
        f"{name}.gluon": gluon,
        f"{name}.gluon.language": gluon.language,
        f"{name}.gluon.language.nvidia.hopper": hopper,
    }


def emulated(path: Path, kernel: str, change: tuple[str, str] | None = None) -> Callable[..., None]:
    """The kernel of that name in the file, to be called as kernel(arguments, programs, seed), and
    what it takes from PARTS; `change` replaces a text of either, to see that an error would be
    noticed."""
    files = [*(Path(find_spec(name).origin) for name in PARTS), path]
    texts = [file.read_text() for file in files]
    if change:
        assert any(change[0] in text for text in texts)
        texts = [text.replace(*change) for text in texts]
    fakes = _modules()
    for name, file, text in zip(PARTS, files, texts, strict=False):
        fakes[name] = types.SimpleNamespace(**_executed(file, text, fakes))
    space = _executed(path, texts[-1], fakes)
    names = space[kernel].__code__.co_varnames[: space[kernel].__code__.co_argcount]

    def run(arguments: dict[str, Any], programs: int, seed: int = 0) -> None:
        ready = {name: _device(arguments[name]) for name in names}
        for program in range(programs):
            start(Machine(seed + program, program, programs))
            space[kernel](**ready)

    return run


def _executed(path: Path, text: str, fakes: dict[str, Any]) -> dict[str, Any]:
    """The names that the text of a file defines, with fakes in the place of modules."""
    kept = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    space: dict[str, Any] = {"__name__": "emulated", "range": _range}
    try:
        exec(compile(text, str(path), "exec"), space)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return space


def _range(*bounds: Any) -> list[Value]:
    return [value(i) for i in range(*(int(bound) for bound in bounds))]


def _device(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    return x
