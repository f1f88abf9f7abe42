"""The Triton kernels without a GPU: run by the interpreter, compiled ahead of time."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from pat_hf.kernels import forward, hopper, naive  # noqa: E402
from pat_hf.kernels.forward import _of_merge, forward_kernel, tiles  # noqa: E402
from pat_hf.kernels.merge import merge_kernel  # noqa: E402
from pat_hf.kernels.plan import Heads, Machine, Plan, make_plan  # noqa: E402

from . import gluon  # noqa: E402
from .trees import Case, nodes_of, pools  # noqa: E402

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
    heads = _heads("fp16", 128)
    programs = [shape.programs for shape in Machine.gpu(132, heads, 8).shapes]
    assert programs == [132 * tile.per_sm for tile in tiles(heads, 8)]
    # Hopper's kernel has a program a multiprocessor.
    assert {shape.programs for shape in Machine.gpu(132, heads, 9).shapes} == {132}


@pytest.mark.parametrize("major", [8, 9, 12])
@pytest.mark.parametrize("dtype, dim", [("fp16", 64), ("fp16", 128), ("fp16", 256), ("fp32", 128)])
def test_tiles_divide_the_steps_that_plans_have(dtype, dim, major):
    heads = _heads(dtype, dim)
    shapes = Machine.gpu(132, heads, major).shapes
    for shape, tile in zip(shapes, tiles(heads, major), strict=True):
        assert shape.tokens % tile.n == 0, (shape, tile)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dtype, dim, page, features",
    [
        ("fp16", 128, 32, False),
        ("fp16", 256, 32, False),
        ("fp32", 128, 32, False),
        ("fp16", 128, 128, True),
        ("fp16", 120, 32, False),
        ("fp16", 8, 32, False),
    ],
)
def test_shapes_fit_registers_and_shared_memory(capability, dtype, dim, page, features):
    for i, tile in _all_tiles(dtype, dim, capability):
        kernel = _compile(tile, i, dtype, dim, capability, page, features)
        assert kernel.metadata.shared * tile.per_sm <= SHARED[capability], tile
        assert _stack_bytes(kernel.asm["cubin"]) <= STACK[features], tile


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("dims, features", [((128, 128), False), ((64, 96), True)])
def test_hoppers_kernel_fits_registers_and_shared_memory(dims, features, chunk):
    layout, constants = hopper.TILE, {"H": 8, "G": 4, "K": dims[0], "V": dims[1], "P": chunk}
    constants |= {f"{name}P": 8 * chunk for name in "KV"} | {f"{name}H": chunk for name in "KV"}
    constants |= {"QUEUES": 16, "BN": 64}
    constants |= {"STAGES": hopper.STAGES}
    constants |= {"REGISTERS": hopper.REGISTERS[1]}
    constants |= {"USE_SOFTCAP": features, "USE_SINKS": features}
    kinds = {"plan": "*i32", "partial": "*fp32", "lse": "*fp32", "qk_scale": "fp32"}
    kinds |= {"softcap": "fp32", **{name: "*fp16" for name in ("q", "out", "sinks")}}
    for rows, source in ((chunk, "desc"), (hopper.PIECE, "pieces")):
        kinds |= {f"{x}_{source}": f"tensordesc<fp16[{rows}, 64],{layout!r}>" for x in "kv"}
    kernel = hopper.hopper_kernel
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if kinds.get(name, "").startswith("*") or name in ("W", "sq_r", "sq_h")
    }
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "maxnreg": hopper.REGISTERS[0]}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED[90]
    assert _stack_bytes(compiled.asm["cubin"]) <= STACK[features]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 33, 128, 2000])
@pytest.mark.parametrize("heads, dim", [(32, 128), (32, 80), (16, 256), (2, 16)])
def test_the_merge_fits_registers(heads, dim, rows, capability):
    call = SimpleNamespace(
        out=torch.empty(1, 1, heads, dim), plan=None, partial=None, lse=None, sinks=None
    )
    launch = _of_merge(call, rows, 132, capability >= 90)
    kinds = {"plan": "*i32", "partial": "*fp32", "lse": "*fp32", "out": "*fp16", "sinks": "*fp16"}
    constants = {x: y for x, y in launch.options.items() if x in merge_kernel.arg_names}
    signature = {name: kinds.get(name, "constexpr") for name in merge_kernel.arg_names}
    source = ASTSource(merge_kernel, signature, constexprs=constants)
    options = {"num_warps": launch.options["num_warps"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert _stack_bytes(compiled.asm["cubin"]) == 0


@pytest.mark.parametrize("dtype, dim", [("fp16", 128), ("fp16", 256), ("fp32", 128)])
def test_a_gpu_of_little_shared_memory_can_launch_all(dtype, dim):
    for i, tile in _all_tiles(dtype, dim, 120):
        assert _compile(tile, i, dtype, dim, 120).metadata.shared <= SHARED[120], tile


def _heads(dtype, dim, heads=8, group=4):
    return Heads(heads * group, heads, dim, dim, 4 if dtype == "fp32" else 2)


def _all_tiles(dtype, dim, capability):
    return list(enumerate(tiles(_heads(dtype, dim), capability // 10)))


def _compile(tile, i, dtype, dim, capability, page=32, features=False, heads=8, group=4):
    machine = Machine.gpu(1, _heads(dtype, dim, heads, group), capability // 10)
    strides = {
        name: stride
        for side in ("sk", "sv")
        for name, stride in ((f"{side}_p", heads * page * dim), (f"{side}_h", page * dim))
    }
    block = max(triton.next_power_of_2(dim), 16)
    constants = {
        **{"H": heads, "G": group, "K": dim, "V": dim, "P": page, **strides},
        **{"sk_t": dim, "sv_t": dim, "SHAPE": i, "ROWS": machine.shapes[i].rows},
        **{"QUEUES": 24, "CHUNK": machine.chunk(page)},
        **{"BM": tile.m, "BN": tile.n, "BK": block, "BV": block, "STREAM_Q": tile.stream_q},
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
        if name not in constants
        and name not in ("qk_scale", "softcap", "window")
        and (name not in ("sq_r", "sq_h") or dim % 16 == 0)
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


@pytest.mark.parametrize("processors", [1, 2])
def test_each_queue_is_claimed_once(processors, monkeypatch):
    count, counted = gluon._count, []
    monkeypatch.setattr(gluon, "_count", lambda *args: counted.append(1) or count(*args))
    monkeypatch.setattr(hopper, "hopper_kernel", gluon.Kernel())
    monkeypatch.setattr(forward, "processors_of", lambda device: (processors, 9))
    heads, size = Heads(4, 2, 64, 64, 2), 32
    case = Case(nodes_of([0] * 20, [50] * 20, size), np.arange(20), np.full(20, 49), heads, size, 1)
    for machine in (Machine.gpu(processors, heads, 9), Machine.gpu(1, heads, 9)):
        plan = make_plan(*case[:5], machine)
        tensor, queues = plan.tensor("cpu"), 2 * (len(plan.tables.queues) - 1)
        q, k, v = pools(case, torch.float16, case.position)
        for _ in range(2):
            counted.clear()
            forward.forward(q, k, v, tensor, scale=0.1, merge=plan.merges)
            # All but the first one of each program; and each finds once that none is left.
            assert len(counted) == (queues if queues > processors else 0)


@pytest.mark.parametrize("advance, pieces", [(0, 2), (7, 2), (8, 3), (9, 3)])
def test_of_a_chunk_what_is_seen_is_copied_alone(advance, pieces, monkeypatch):
    copied, copy = [], gluon._copy
    monkeypatch.setattr(hopper, "hopper_kernel", gluon.Kernel())
    monkeypatch.setattr(forward, "processors_of", lambda device: (2, 9))
    monkeypatch.setattr(gluon, "LATE", 0)
    monkeypatch.setattr(
        gluon, "_copy", lambda *args: (copied.append(len(args[3].tensor)), copy(*args))
    )
    # Chunks of 18 tokens, which are seen, of 32, and of 18, of which 9 are when it is planned.
    heads, size = Heads(2, 1, 64, 64, 2), 32
    case = Case(nodes_of([0, 1], [18, 50], size), np.array([1]), np.array([58]), heads, size, 1)
    plan = make_plan(*case[:5], Machine.gpu(2, heads, 9))
    tensor = plan.tensor("cpu")
    Plan.positions(tensor).add_(advance)
    q, k, v = pools(case, torch.float16, case.position + advance)
    out = forward.forward(q, k, v, tensor, scale=0.1, merge=plan.merges)
    assert sorted(copied) == sorted(2 * [32, *[8] * (3 + pieces)])
    tree = case.nodes, case.node, case.position + advance
    exact = naive.attention(q, k, v, *tree, scale=0.1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-3)
