"""Launches of Triton's kernels, and how these are compiled: side by side, and ahead if need be."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.cache import triton_key


class Launch(NamedTuple):
    """A kernel with its grid, arguments, and options: constants, and Triton's own.

    The first argument is a tensor on the device that it runs on.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def kind(self) -> Hashable:
        """What the kernel is compiled for; more, if numbers or addresses are not aligned."""
        return self.kernel.__name__, self.arguments[0].dtype, *self.options.items()


_built: set[Hashable] = set()  # devices, and kinds that are launched together
_behind = ThreadPoolExecutor(2, "pat_hf")  # two, for none to wait for what it can't use
_begun: dict[Hashable, Future[None]] = {}  # by kind


def begin(launches: Sequence[Launch]) -> None:
    """Starts to compile kernels in a thread, the longest first, once others of their kinds are."""
    future = _behind.submit(_build, launches, _alike(launches))
    _begun.update((each.kind, future) for each in launches)


def wait(begun: Iterable[Future[None]] | None = None) -> None:
    """Waits for what has begun; `None`: for all of it."""
    for future in _begun.values() if begun is None else begun:
        future.exception()  # which whoever launches that kernel is going to meet


def run(launches: Sequence[Launch], more: Callable[[], Sequence[Launch]] = list) -> None:
    """Launches kernels, one after another.

    Args:
        launches: one at least.
        more: others that are going to be wanted: where these are the first of their kind, they are
            all compiled together.

    Raises:
        Exception: what Triton does of a kernel that it can't compile or load.
    """
    if launches[0].arguments[0].is_cuda:
        kinds = launches[0].arguments[0].device, *(each.kind for each in launches)
        if kinds not in _built:
            # Who compiles beside those that have begun holds both up, by Python's lock.
            _build([*launches, *more()], _alike(launches))
            _built.add(kinds)
    for kernel, grid, arguments, options in launches:
        kernel[grid](*arguments, **options)


def _alike(launches: Sequence[Launch]) -> list[Future[None]]:
    """What has begun to compile kernels of their kinds."""
    return [_begun[each.kind] for each in launches if each.kind in _begun]


def _build(launches: Sequence[Launch], before: Sequence[Future[None]]) -> None:
    """Has kernels compiled and loaded side by side, the longest first, behind others."""
    wait(before)
    # In a context of its own: Triton 3.6 leaves its mode on behind a kernel that fails.
    contextvars.copy_context().run(_compile, launches, launches[0].arguments[0].device)


def _compile(launches: Sequence[Launch], device: torch.device) -> None:
    def load(kernel) -> None:
        with torch.cuda.device(device):
            (kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel).run  # noqa: B018

    # Two at a time, for the first to have Python's lock half of the time at least.
    with torch.cuda.device(device), ThreadPoolExecutor(2) as pool:
        # Triton reads itself for this, and has a part of its own compiled; neither is quick.
        hashed = pool.submit(triton_key)
        triton.runtime.driver.active.get_current_device()
        hashed.result()
        with triton.AsyncCompileMode(pool):
            kernels = [
                kernel.warmup(*arguments, grid=grid, **options)
                for kernel, grid, arguments, options in launches
            ]
            # The longest last: who doesn't compile it has loaded the others by then.
            loaded = pool.map(load, kernels[::-1])
        list(loaded)
