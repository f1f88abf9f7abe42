"""`pat_hf.kernels.hopper` without a GPU: what its kernel says, done by PyTorch.

Warps that have a part of their own are a thread each, and what they wait for waits in earnest. What
is read or written out of bounds raises, and a wait that may end too early. Some copies come late.
Layouts mean nothing here, nor does what is done ahead. Programs run one after the other, so the
first one claims all queues that there are to claim.
"""

from __future__ import annotations

import importlib.util
import inspect
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton

from pat_hf.kernels import hopper

PATIENCE = 60  # seconds, until what is waited for counts as never coming
LATE = 0.2  # of copies, see `_ask`
_unfenced = threading.local()  # where this thread has stored since its last fence
_knowledge = threading.local()  # see `_over`
_copies = threading.local()  # what this thread copies, until it waits for it: open, committed


@dataclass(frozen=True)
class Pointer:
    """Elements of a flat tensor: one, or as many as there are offsets."""

    memory: torch.Tensor
    offset: torch.Tensor

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + step)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offset[index])

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def inside(self, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets, 0 where masked, and the mask, both in full."""
        mask = torch.tensor(True) if mask is None else mask
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        reached = offset[mask]
        if len(reached) and not (0 <= reached.min() and reached.max() < len(self.memory)):
            raise IndexError(f"{reached.min()} to {reached.max()} of {len(self.memory)}")
        return torch.where(mask, offset, 0), mask


def pointer(x: torch.Tensor) -> Pointer:
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return Pointer(flat, torch.tensor(x.storage_offset()))


@dataclass(frozen=True)
class Memory:
    """Shared memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def index(self, i: Any) -> Memory:
        return Memory(self.tensor[int(i)])

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def slice(self, first: int, count: int, dim: int = 0) -> Memory:
        return Memory(self.tensor.narrow(dim, first, count))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
        return Memory(self.tensor.view(dtype).view(shape))

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.tensor.permute(order))

    def load(self, layout: Any) -> torch.Tensor:
        return self.tensor.long() if self.tensor.dtype == torch.int32 else self.tensor.clone()

    def store(self, x: torch.Tensor) -> None:
        self.tensor.copy_(x)
        vars(_unfenced).setdefault("places", set()).add(self.tensor.data_ptr())

    def read(self) -> torch.Tensor:
        """As the matrix units do."""
        if self.tensor.data_ptr() in vars(_unfenced).get("places", ()):
            raise RuntimeError("What was stored is multiplied without a fence between.")
        return self.tensor.float()


class Barrier:
    """An mbarrier: a phase is over once all have arrived, and all bytes announced have come.

    Who waits for it learns which phases those who arrived knew to be over, of all barriers.
    """

    def __init__(self, changed: threading.Condition):
        self.changed, self.phase, self.count, self.bytes = changed, 0, 0, 0
        self.over: dict[Barrier, int] = {}

    def init(self, count: int) -> None:
        self.count = self.left = count

    def come(self, arrivals: int, bytes: int) -> None:
        with self.changed:
            _learn(self.over, _over())
            self.left -= arrivals
            self.bytes += bytes
            if self.left < 0:
                raise RuntimeError("More arrive than are waited for.")
            if not self.left and not self.bytes:
                self.phase, self.left = self.phase + 1, self.count
                self.over[self] = self.phase
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE):
                raise TimeoutError("What is waited for doesn't come.")
            _learn(_over(), self.over)


class Barriers:
    def __init__(self, shape: list[int], changed: threading.Condition):
        self.shape, self.all = shape, [Barrier(changed) for _ in range(shape[0])]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


def _over() -> dict[Barrier, int]:
    """How many phases of barriers this thread knows to be over."""
    return vars(_knowledge).setdefault("over", {})


def _learn(over: dict[Barrier, int], more: dict[Barrier, int]) -> None:
    over.update({bar: phase for bar, phase in more.items() if phase > over.get(bar, 0)})


def _knowing(wait: Callable[..., None]) -> Callable[..., None]:
    """The kernel's wait for a step at its stage, by those alone who know the one before to be over:
    parity doesn't tell the two."""

    def waits(bars: Barriers, n: Any, flip: int = 0) -> None:
        stages = bars.shape[0]
        if _over().get(bars.index(n % stages), 0) < int(n) // stages - flip:
            raise RuntimeError("By parity, a step may be taken for the one before in its stage.")
        wait(bars, n, flip)

    return waits


def _load(p: Pointer, mask: Any = None, other: Any = 0) -> torch.Tensor:
    offset, mask = p.inside(mask)
    x = torch.where(mask, p.memory[offset], torch.tensor(other, dtype=p.memory.dtype))
    return x.long() if x.dtype == torch.int32 else x


def _count(p: Pointer, last: Any) -> torch.Tensor:
    """See `hopper._count`, which is the GPU's own."""
    number = p.memory[p.offset].long()
    p.memory[p.offset] = 0 if number >= last else number + 1
    return number


def _store(p: Pointer, x: Any, mask: Any = None, eviction_policy: str = "") -> None:
    offset, mask = p.inside(mask)
    x = torch.as_tensor(x, dtype=p.memory.dtype).expand(offset.shape)
    p.memory[offset[mask]] = x[mask]


def _ask(desc: Any, where: list[Any], bar: Barrier, to: Memory) -> None:
    """Copies a block of a tensor: at once, or when others, asked for later, have come."""
    where = [int(x) for x in where]
    if random.Random(sum(where)).random() < LATE:
        threading.Timer(0.1, _copy, (desc, where, bar, to)).start()
    else:
        _copy(desc, where, bar, to)


def _copy(desc: Any, where: list[int], bar: Barrier, to: Memory) -> None:
    (row, column), (rows, columns) = where, desc.block_shape
    source = pointer(desc.base)
    inside = row * desc.strides[0] + torch.arange(rows)[:, None] * desc.strides[0]
    column = column + torch.arange(columns)
    x = _load(source + (inside + column), (column < desc.shape[1]).expand(rows, columns), 0.0)
    to.tensor.copy_(x)
    bar.come(0, -x.numel() * x.element_size())


def _copy_rows(to: Memory, p: Pointer, mask: Any) -> None:
    vars(_copies).setdefault("open", []).append((to.tensor, _load(p, mask, 0.0)))


def _commit_group() -> None:
    vars(_copies).setdefault("committed", []).extend(vars(_copies).pop("open", []))


def _wait_group(left: int) -> None:
    assert left == 0
    for tensor, x in vars(_copies).pop("committed", []):
        tensor.copy_(x)


def _multiply(a: Any, b: Memory, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False):
    product = (a.read() if isinstance(a, Memory) else a.float()) @ b.read()
    return acc + product if use_acc else product


class Program:
    """One program of a grid of so many: what Gluon's names mean in it."""

    def __init__(self, number: int, count: int):
        changed = threading.Condition()

        def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Memory | Barriers:
            if dtype == torch.int64:
                return Barriers(shape, changed)
            unset = torch.nan if dtype.is_floating_point else 1 << 30
            return Memory(torch.full(shape, unset, dtype=dtype))

        def pair(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))

        def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        language = SimpleNamespace(
            **{name: getattr(torch, name) for name in ("int32", "int64", "float32")},
            **{name: getattr(torch, name) for name in ("exp2", "log2", "where")},
            program_id=lambda axis: torch.tensor(number),
            num_programs=lambda axis: count,
            load=_load,
            store=_store,
            arange=lambda begin, end, layout: torch.arange(begin, end),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            minimum=pair(torch.minimum),
            maximum=pair(torch.maximum),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            convert_layout=lambda x, layout: x,
            static_range=range,
            static_assert=nothing,
            allocate_shared_memory=allocate,
            warp_specialize=_side_by_side,
            inline_asm_elementwise=nothing,
        )
        for layout in ("Slice", "Blocked", "DotOperand", "NVMMADistributed", "NVMMAShared"):
            setattr(language, f"{layout}Layout", nothing)
        language.SwizzledSharedLayout = nothing
        self.names = {
            "gl": language,
            "tl": SimpleNamespace(
                extra=SimpleNamespace(cuda=SimpleNamespace(gdc_launch_dependents=nothing))
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=nothing,
                init=lambda bar, count: bar.init(count),
                wait=lambda bar, parity: bar.wait(parity),
                arrive=lambda bar, count: bar.come(count, 0),
                expect=lambda bar, bytes, pred=True: bar.come(1, bytes) if pred else None,
            ),
            "warpgroup_mma": _multiply,
            "warpgroup_mma_wait": lambda left, deps: deps if len(deps) > 1 else deps[0],
            "async_load": _ask,
            "async_copy": SimpleNamespace(commit_group=_commit_group, wait_group=_wait_group),
            "copy_rows": _copy_rows,
            "reinterpret": Memory.reinterpret,
            "fence_async_shared": lambda: vars(_unfenced).pop("places", None),
            "barrier": nothing,
        }


def _side_by_side(parts: list[tuple], warps: list[int], registers: list[int]) -> None:
    failed: list[BaseException] = []

    def run(function: Callable[..., None], args: tuple) -> None:
        try:
            function(*args)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not failed:
        for thread in threads:
            thread.join(0.05)
    if failed:
        raise failed[0]


class Kernel:
    """`hopper_kernel`, to be launched as Triton's are: kernel[grid](*args, **options)."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        spec = importlib.util.spec_from_file_location("emulated", hopper.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, value in list(vars(module).items()):
            if hasattr(value, "fn"):
                setattr(module, name, value.fn)
            elif isinstance(value, triton.language.constexpr):
                setattr(module, name, value.value)
        module._wait, module._count = _knowing(module._wait), _count

        def launch(*args: Any, **options: Any) -> None:
            known = inspect.signature(module.hopper_kernel).parameters
            args = [pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
            options = {name: x for name, x in options.items() if name in known}
            for desc in args:
                if hasattr(desc, "block_shape"):
                    object.__setattr__(desc, "block_type", SimpleNamespace(shape=desc.block_shape))
            for number in range(grid[0]):
                vars(module).update(Program(number, grid[0]).names)
                module.hopper_kernel(*args, **options)

        return launch
