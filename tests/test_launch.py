"""Kernels compiled ahead are those that calls launch; Hopper's, for a GPU that is imitated."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
)

import pat_hf
from pat_hf.cache import compilation
from pat_hf.cache.memory import Memory
from pat_hf.cache.page_pool import PAGE_SIZE

sys.path.insert(0, str(Path(__file__).parent))

from models import pair  # noqa: E402

pytest.importorskip("triton")

from pat_hf.kernels import launch  # noqa: E402


def test_what_is_compiled_ahead_is_all_that_a_prefill_and_steps_need(tmp_path):
    # In a process of its own: what is compiled here can't run, and Triton would keep it.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    ahead, loaded, calls, launched, asked = done.stdout.split("\n")[:5]
    assert ahead == "hopper_kernel merge_kernel store_kernel"
    assert loaded == "hopper_kernel merge_kernel merge_kernel merge_kernel store_kernel"
    assert calls == ""
    assert launched == "store_kernel hopper_kernel merge_kernel " * 3 + "hopper_kernel "
    assert asked == "once"


@pytest.mark.parametrize("name", ["Mistral", "DeepSeek-V3"])
def test_kernels_of_windows_and_latents_are_not_compiled_ahead(name, ahead):
    pat_hf.PATCache(pair(name)[1])
    assert not ahead


def test_a_cache_has_kernels_compiled_ahead_once(ahead):
    model = copy.deepcopy(pair("Llama")[1]).to(torch.bfloat16)
    for _ in range(2):
        pat_hf.PATCache(model, page_size=64)
    ((keys, values, query_heads, softcap),) = ahead
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    assert keys.shape == values.shape == (2, heads, 64, dim)
    assert keys.stride(0) == values.stride(0) == 2 * heads * 64 * dim
    assert keys.dtype == values.dtype == torch.bfloat16
    assert (query_heads, softcap) == (model.config.num_attention_heads, None)


def test_a_model_has_kernels_compiled_from_when_pytorch_uses_a_gpu(ahead, later):
    config = copy.deepcopy(pair("Llama")[1].config)
    for implementation in ("sdpa", "pat", "pat"):
        made = {"dtype": torch.bfloat16, "attn_implementation": implementation}
        AutoModelForCausalLM.from_config(config, **made)
        assert len(later.initialized) == (implementation == "pat")  # not once for every model
    later.initialized[0]()
    time.sleep(0.1)
    assert not ahead
    later.used.append(1)
    later.wait(ahead)
    ((keys, _, query_heads, _),) = ahead
    assert keys.shape == (2, config.num_key_value_heads, PAGE_SIZE, config.head_dim)
    assert later.asked == [torch.device("cuda", 1)]
    assert keys.dtype == torch.bfloat16
    assert query_heads == config.num_attention_heads


def test_models_that_there_is_nothing_to_compile_for_are_made_all_the_same(ahead, later):
    mamba = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=9, dtype="float16")
    AutoModelForCausalLM.from_config(mamba, attn_implementation="pat")
    config = copy.deepcopy(pair("Llama")[1].config)
    AutoModel.from_config(config, attn_implementation="pat", dtype=torch.float16)  # can't generate
    made = {"dtype": torch.float16, "attn_implementation": "sdpa"}
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(config), **made)
    stock.set_attn_implementation("pat")  # whose weights are there already
    config.dtype = None  # may be changed before it is needed
    LlamaForCausalLM(config)
    assert config._attn_implementation == "pat"
    assert not later.initialized


def test_what_fails_ahead_fails_in_silence(ahead, later, monkeypatch, capfd):
    failed = []
    monkeypatch.setattr(compilation, "compile_ahead", lambda *args: failed.append(args) or 1 / 0)
    config = copy.deepcopy(pair("Llama")[1].config)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16, attn_implementation="pat")
    later.used.append(0)
    later.initialized[0]()
    later.wait(failed)
    for thread in threading.enumerate():
        if thread.name == "pat_hf":
            thread.join(60)
    assert capfd.readouterr().err == ""


def test_a_launch_waits_for_kernels_of_its_kind_alone(monkeypatch):
    go, built, launched = threading.Event(), [], []

    def build(launches, before):
        launch.wait(before)
        if launches[0].arguments[0].device.index == 0:
            go.wait(60)
        built.append((launches[0].options["N"], launches[0].arguments[0].device.index))

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(options["N"])

    def of(n, index):
        device = torch.device("cuda", index)
        pages = SimpleNamespace(device=device, dtype=torch.float16, is_cuda=True)
        return launch.Launch(Kernel(), (1,), (pages,), {"N": n})

    monkeypatch.setattr(launch, "_build", build)
    monkeypatch.setattr(launch, "_begun", {})
    monkeypatch.setattr(launch, "_built", set())
    launch.begin([of(1, 0)])
    launch.run([of(2, 1)])
    assert built == [(2, 1)]
    assert launched == [2]
    launch.begin([of(1, 1)])
    one = threading.Thread(target=launch.run, args=([of(1, 1)],))
    one.start()
    one.join(0.3)
    assert launched == [2]
    go.set()
    one.join(60)
    assert launched == [2, 1]
    assert built[1:] == [(1, 0), (1, 1), (1, 1)]


@pytest.fixture
def later(monkeypatch):
    """A build of PyTorch for GPUs: what waits for CUDA's initialization, and GPUs that are used."""
    state = SimpleNamespace(initialized=[], used=[], asked=[])
    sample = Memory.sample

    def noted(shapes, dtype, device):
        state.asked.append(device)
        return sample(shapes, dtype, device)

    def wait(done):
        for _ in range(600):
            if done:
                return
            time.sleep(0.1)

    state.wait = wait
    monkeypatch.setattr(Memory, "sample", staticmethod(noted))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_lazy_call", state.initialized.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used = lambda index: index in state.used  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", used, raising=False)
    return state


@pytest.fixture
def ahead(monkeypatch):
    """What is compiled ahead, for models that are taken to be on a GPU."""
    given, sample = [], Memory.sample
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cuda", 0))
    on_cpu = staticmethod(lambda shapes, dtype, _: sample(shapes, dtype, torch.device("cpu")))
    monkeypatch.setattr(Memory, "sample", on_cpu)
    monkeypatch.setattr(compilation, "compile_ahead", lambda *args: given.append(args))
    for once in (compilation._compile_ahead, compilation._compile_later):
        once.cache_clear()
    yield given
    for once in (compilation._compile_ahead, compilation._compile_later):
        once.cache_clear()


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from pat_hf.kernels import forward, launch, ops
    from pat_hf.kernels.store import store

    compiled: list[str] = []
    loaded: list[str] = []
    launched: list[str] = []

    def load(name, *args):
        loaded.append(name)
        return None, None, 0, 0, 1024

    def launcher(source, metadata):
        return lambda *args: launched.append(source.fn.__name__)

    utils = SimpleNamespace(
        load_binary=load,
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
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)

    shapes = [(8, 32, 128)] * 2
    ops.compile_ahead(*Memory.sample(shapes, torch.float16, torch.device("cpu")), 32)
    launch.wait()
    print(*sorted(set(compiled)))
    print(*sorted(loaded))
    compiled.clear()
    whole = torch.randn(5, 2, 8, 32, 128).half()  # pages of K and V side by side
    pages = whole.unbind(1)
    for rows, batch in ((9000, 1), (32, 32), (1, 1)):  # of a prefill, and of decode steps
        q, k, v = (
            torch.randn(batch, rows // batch, heads, 128).half().transpose(1, 2)
            for heads in (32, 8, 8)
        )
        where = torch.zeros(rows, dtype=torch.int64)
        plan = torch.zeros(1, 1, 5, -(-rows // 64) * 64, dtype=torch.int32)
        launch.run([store(*pages, k, v, where, where)])
        forward.forward(q, *pages, plan, scale=1.0)
    forward.forward(q, *pages, plan, scale=1.0, merge=False)
    print(*compiled)
    print(*launched, "")
    times = []
    more = lambda: times.append("once") or []  # noqa: E731
    again = store(*pages, k, v, where, where)
    again.options["num_warps"] = 2
    for _ in range(2):
        launch.run([again], more)
    print(*times)


if __name__ == "__main__":
    main()
