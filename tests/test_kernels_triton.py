"""The Triton kernels without a GPU: run by the interpreter, compiled ahead of time."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pat_hf.kernels.forward import forward_kernel, tiles  # noqa: E402
from pat_hf.kernels.plan import Machine  # noqa: E402

CHECK = Path(__file__).parent / "gpu" / "check.py"
SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a multiprocessor, by capability
STACK = {False: 160, True: 256}  # bytes a thread, without and with all features


def test_interpreted_kernels_equal_the_reference():
    # Triton reads the variable when it is imported.
    run = subprocess.run(
        [sys.executable, str(CHECK), "--small"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_plans_are_made_for_the_programs_that_run():
    programs = [shape.programs for shape in Machine.gpu(132).shapes]
    assert programs == [132 * tile.per_sm for tile in tiles(2, 128, 9, 1)]
    assert programs == [132 * tile.per_sm for tile in tiles(2, 128, 9, 10_000)]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dtype, dim, page, features",
    [
        ("fp16", 128, 32, False),
        ("fp16", 256, 32, False),
        ("fp32", 128, 32, False),
        ("fp16", 128, 128, True),
    ],
)
def test_shapes_fit_registers_and_shared_memory(capability, dtype, dim, page, features):
    for i, tile in _all_tiles(dtype, dim, capability):
        kernel = _compile(tile, i, dtype, dim, capability, page, features)
        assert kernel.metadata.shared * tile.per_sm <= SHARED[capability], tile
        assert _stack_bytes(kernel.asm["cubin"]) <= STACK[features], tile


@pytest.mark.parametrize("dtype, dim", [("fp16", 128), ("fp16", 256), ("fp32", 128)])
def test_a_gpu_of_little_shared_memory_can_launch_all(dtype, dim):
    for i, tile in _all_tiles(dtype, dim, 120):
        assert _compile(tile, i, dtype, dim, 120).metadata.shared <= SHARED[120], tile


def _all_tiles(dtype, dim, capability):
    itemsize = 4 if dtype == "fp32" else 2
    few, many = (tiles(itemsize, dim, capability // 10, rows) for rows in (1, 10_000))
    return {*enumerate(few), *enumerate(many)}


def _compile(tile, i, dtype, dim, capability, page=32, features=False, heads=8, group=4):
    strides = {
        name: stride
        for side in ("sk", "sv")
        for name, stride in ((f"{side}_p", heads * page * dim), (f"{side}_h", page * dim))
    }
    constants = {
        **{"H": heads, "G": group, "K": dim, "V": dim, "P": page, **strides},
        **{"sk_t": dim, "sv_t": dim, "SHAPE": i, "STEP": 7 + 128 // page},
        **{"ROWS": Machine.gpu(1).shapes[i].rows, "N": Machine.gpu(1).shapes[i].tokens},
        **{"BM": tile.m, "BN": tile.n, "BK": dim, "BV": dim, "STREAM_Q": tile.stream_q},
        **{"USE_WINDOW": features, "USE_SOFTCAP": features, "USE_SINKS": features},
        **{"IS_FLOAT32": dtype == "fp32", "USE_PDL": capability >= 90},
    }
    kinds = {"plan": "*i32", "partial": "*fp32", "lse": "*fp32"}
    kinds |= {name: f"*{dtype}" for name in ("q", "k", "v", "out", "sinks")}
    kinds |= {"qk_scale": "fp32", "softcap": "fp32"}
    names = forward_kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and name not in ("qk_scale", "softcap", "window")
    }
    source = ASTSource(forward_kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _stack_bytes(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return max(int(x) for x in re.findall(r"STACK:(\d+)", text.stdout + text.stderr))
