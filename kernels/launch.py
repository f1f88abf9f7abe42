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
    """A kernel with its grid, arguments, and options: constants, and Triton's own."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


_built: set[Hashable] = set()
_behind = ThreadPoolExecutor(1, "pat_hf")
_begun: list[Future[None]] = []


def begin(launches: Sequence[Launch], device: torch.device) -> None:
    """Starts to compile kernels in a thread of its own, the longest first."""
    _begun.append(_behind.submit(_build, launches, device))


def ready(kind: Hashable, launches: Callable[[], Sequence[Launch]], device: torch.device) -> None:
    """Has kernels compiled and loaded, if it is the first time that they are asked for.

    Args:
        kind: what they depend on.
        launches: gives them.

    Raises:
        Exception: what Triton does of a kernel that it can't compile or load.
    """
    if kind in _built:
        return
    # They may be among all that has begun; and who compiles beside it holds both up, by Python's
    # lock.
    for future in _begun:
        future.exception()  # which this will meet again, if it is the same kernel's
    _build(launches(), device)
    _built.add(kind)


def _build(launches: Sequence[Launch], device: torch.device) -> None:
    """Has kernels compiled and loaded side by side, the longest first."""
    # Of its own: Triton 3.6 leaves its mode on behind a kernel that fails.
    contextvars.copy_context().run(_compile, launches, device)


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
