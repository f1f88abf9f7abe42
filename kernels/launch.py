"""Launches of Triton's kernels, and how these are compiled: side by side, and ahead if need be."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.cache import triton_key


class Launch(NamedTuple):
    """A kernel with its grid, arguments, and options: constants, and Triton's own.

    The first argument is a tensor on the device that it runs on; on "meta", it can't run.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def kind(self) -> Hashable:
        """What the kernel is compiled for; more, if numbers or addresses are not aligned."""
        first = self.arguments[0]
        return self.kernel.__name__, first.device, first.dtype, *self.options.items()


_built: set[Hashable] = set()
_behind = ThreadPoolExecutor(1, "pat_hf")
_begun: list[Future[None]] = []


def begin(launches: Callable[[], Sequence[Launch]]) -> None:
    """Starts to compile kernels in a thread of its own, the longest first."""
    _begun.append(_behind.submit(lambda: _build(launches())))


def wait() -> None:
    """Waits for all that has begun."""
    for future in _begun:
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
        kind = tuple(each.kind for each in launches)
        if kind not in _built:
            # It may have begun; and who compiles beside it holds both up, by Python's lock.
            wait()
            _build([*launches, *more()])
            _built.add(kind)
    for kernel, grid, arguments, options in launches:
        kernel[grid](*arguments, **options)


def _build(launches: Sequence[Launch]) -> None:
    """Has kernels compiled side by side, the longest first, and loaded; on "meta" compiled alone:
    the current GPU, for which that is done, need not be the one that is going to be used."""
    # In a context of its own: Triton 3.6 leaves its mode on behind a kernel that fails.
    contextvars.copy_context().run(_compile, launches, launches[0].arguments[0].device)


def _compile(launches: Sequence[Launch], device: torch.device) -> None:
    place = None if device.type == "meta" else device

    def finish(kernel) -> None:
        kernel = kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel
        if place is None:  # what launches it is compiled as well, and kept on disk
            triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
        else:
            with torch.cuda.device(place):
                kernel.run  # noqa: B018

    # Two at a time, for the first to have Python's lock half of the time at least.
    with torch.cuda.device(place), ThreadPoolExecutor(2) as pool:
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
            finished = pool.map(finish, kernels[::-1])
        list(finished)
