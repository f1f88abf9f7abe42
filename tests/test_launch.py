"""Kernels compiled ahead are those that calls launch; Hopper's, for a GPU that is imitated."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")


def test_what_is_compiled_ahead_is_all_that_calls_need(tmp_path):
    # In a process of its own: what is compiled here can't run, and Triton would keep it.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    ahead, calls, launched = (
        done.stdout.split("\n")[:3] if not done.returncode else [done.stderr] * 3
    )
    assert ahead == "hopper_kernel merge_kernel store_kernel"
    assert calls == ""
    assert launched == "store_kernel hopper_kernel merge_kernel " * 2


def main() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from pat_hf.cache.memory import Memory
    from pat_hf.kernels import forward, launch, ops
    from pat_hf.kernels.store import store

    launched: list[str] = []

    def launcher(source, metadata):
        return lambda *args: launched.append(source.fn.__name__)

    utils = SimpleNamespace(
        load_binary=lambda *args: (None, None, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    driver = SimpleNamespace(
        utils=utils,
        launcher_cls=launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    torch.cuda.device = lambda device: nullcontext()
    forward.processors_of = lambda device: (132, 9)
    ops.backend = lambda device: "triton"
    torch.Tensor.is_cuda = True
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)

    shapes = [(8, 32, 128)] * 2
    ops.prepare(*Memory.sample(shapes, torch.float16, torch.device("cpu")), 32)
    launch.ready("nothing", list, torch.device("cpu"))
    print(*sorted(set(compiled)))
    compiled.clear()
    whole = torch.randn(5, 2, 8, 32, 128).half()  # pages of K and V side by side
    pages = whole.unbind(1)
    for rows, batch in ((9000, 1), (32, 32)):  # of a prefill, and of a decode step
        q, k, v = (
            torch.randn(batch, rows // batch, heads, 128).half().transpose(1, 2)
            for heads in (32, 8, 8)
        )
        where = torch.zeros(rows, dtype=torch.int64)
        plan = torch.zeros(1, 1, 5, -(-rows // 64) * 64, dtype=torch.int32)
        store(*pages, k, v, where, where)
        forward.forward(q, *pages, plan, scale=1.0)
    print(*compiled)
    print(*launched, "")


if __name__ == "__main__":
    main()
