"""When a model's attention kernels are compiled: while its weights are loaded."""

from __future__ import annotations

import functools
import threading
import time
from contextlib import suppress
from typing import Any

import torch
from transformers import PretrainedConfig

from pat_hf.cache.memory import Memory
from pat_hf.cache.page_pool import PAGE_SIZE
from pat_hf.kernels.ops import compile_ahead
from pat_hf.kernels.plan import Heads
from pat_hf.support import heads_of, latent, windowed


def compile_for(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    page_size: int = PAGE_SIZE,
) -> None:
    """Has what a model's layers run compiled, once in a process, beside what the caller does.

    Kernels for windows, and for latent attention, are compiled when they are called for.

    Args:
        config: of the text decoder.
        dtype: of its keys and values.
        device: theirs; `None`, where that can't be told yet: the first GPU that PyTorch uses.
        page_size: of the cache.
    """
    if not (windowed(config) or latent(config)):
        softcap = getattr(config, "attn_logit_softcapping", None)
        kind = heads_of(config, dtype), page_size, dtype, softcap
        if device is None:
            _compile_later(*kind)
        else:
            _compile_ahead(*kind, device)


@functools.cache
def _compile_later(*kind: Any) -> None:
    def look() -> None:
        with suppress(Exception):  # which whoever launches these kernels is going to meet
            gpus = range(torch.cuda.device_count())
            while not (used := [x for x in gpus if torch._C._cuda_hasPrimaryContext(x)]):
                time.sleep(0.01)
            _compile_ahead(*kind, torch.device("cuda", used[0]))

    # To have CUDA initialized here would keep it from processes that are forked.
    begin = threading.Thread(target=look, name="pat_hf", daemon=True).start
    if torch.cuda.is_initialized():
        begin()
    else:
        torch.cuda._lazy_call(begin)


@functools.cache
def _compile_ahead(
    heads: Heads, page_size: int, dtype: torch.dtype, softcap: float | None, device: torch.device
) -> None:
    shapes = [(heads.kv, page_size, dim) for dim in (heads.key_dim, heads.value_dim)]
    compile_ahead(*Memory.sample(shapes, dtype, device), heads.query, softcap)
