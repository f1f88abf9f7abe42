"""Launches of Triton's kernels, and how these are compiled: side by side, and ahead if need be."""

from __future__ import annotations

from collections.abc import Sequence
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


_behind = ThreadPoolExecutor(1, "pat_hf")
_begun: list[Future[None]] = []


def begin(launches: Sequence[Launch], device: torch.device) -> None:
    """Starts to `build` them in a thread of its own."""
    _begun.append(_behind.submit(build, launches, device))


def wait() -> None:
    """Waits for what has begun. Whoever compiles meanwhile holds both up: Python's lock is one."""
    for future in _begun:
        future.exception()  # which whoever launches it will meet again


def build(launches: Sequence[Launch], device: torch.device) -> None:
    """Has kernels compiled and loaded, unless they are. The first should take the longest."""

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
            loaded = pool.map(load, kernels)
        list(loaded)
