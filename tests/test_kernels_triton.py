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
SHARED = {80: 163 << 10, 90: 227 << 10}
STACK = 160  # bytes a thread


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


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype, dim", [("fp16", 128), ("fp16", 256), ("fp32", 128)])
def test_shapes_fit_registers_and_shared_memory(capability, dtype, dim):
    few, many = (tiles(4 if dtype == "fp32" else 2, dim, capability // 10, n) for n in (1, 10_000))
    for i, tile in {*enumerate(few), *enumerate(many)}:
        kernel = _compile(tile, i, dtype, dim, capability)
        assert kernel.metadata.shared * tile.per_sm <= SHARED[capability], tile
        assert _stack_bytes(kernel.asm["cubin"]) <= STACK, tile


def _compile(tile, i, dtype, dim, capability, heads=8, group=4, page=64):
    strides = {
        name: stride
        for side in ("sk", "sv")
        for name, stride in ((f"{side}_p", heads * page * dim), (f"{side}_h", page * dim))
    }
    constants = {
        **{"H": heads, "G": group, "K": dim, "V": dim, "P": page, **strides},
        **{"sk_t": dim, "sv_t": dim, "SHAPE": i, "STEP": 9},
        **{"ROWS": Machine.gpu(1).shapes[i].rows, "N": Machine.gpu(1).shapes[i].tokens},
        **{"BM": tile.m, "BN": tile.n, "BK": dim, "BV": dim, "STREAM_Q": tile.stream_q},
        **{"USE_WINDOW": False, "USE_SOFTCAP": False, "USE_SINKS": False},
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
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
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
