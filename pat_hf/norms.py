"""RMS norms as the one kernel that PyTorch has for them, where Transformers' own take eight.

For forwards that are not compiled. In 16 bits it rounds once, most of Transformers' twice.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from pat_hf.support import is_compiled, modules, surely


class _Local(threading.local):
    fused = False


_local = _Local()  # other threads' forwards are left alone
_lock = threading.RLock()
_held: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def rms_norms(model: nn.Module) -> list[nn.Module]:
    """The modules that are root mean square norms times a weight, and no more.

    None, if the user has anything compiled: to change what is would have it compiled again.
    """
    found = list(modules(model))
    if any(map(is_compiled, found)):
        return []
    return [
        module
        for module in found
        if "variance_epsilon" in vars(module)
        and module._parameters.keys() == {"weight"}
        and type(module.weight) is nn.Parameter
        and module.weight.ndim == 1
        and _is_plain(type(module).forward)
    ]


@contextmanager
def fused(norms: Sequence[nn.Module]) -> Iterator[None]:
    """For its length, in this thread, each of `norms` is one kernel, unless it has a forward of its
    own.

    Args:
        norms: from `rms_norms`.
    """
    block, before = object(), _local.fused
    try:
        with _lock:
            for norm in norms:
                if norm in _held or "forward" not in vars(norm):
                    _held.setdefault(norm, set()).add(block)
                    norm.forward = functools.partial(_forward, norm)
        _local.fused = True
        yield
    finally:
        surely(lambda: _restore(norms, block, before))


def _restore(norms: Sequence[nn.Module], block: object, before: bool) -> None:
    _local.fused = before
    with _lock:
        for norm in norms:
            blocks = _held.get(norm, set())
            blocks.discard(block)
            if not blocks and norm in _held:
                vars(norm).pop("forward", None)
                del _held[norm]


def _forward(norm: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    # What is compiled at the moment is another thread's.
    mine = not torch.compiler.is_dynamo_compiling() and _local.fused
    if (
        mine
        and not (args or kwargs)
        and x.dtype == norm.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    ):
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, x, *args, **kwargs)


@functools.cache
def _is_plain(forward: Callable[..., torch.Tensor]) -> bool:
    """Whether a class's forward computes what PyTorch does, going by an example."""
    norm = nn.Module()
    norm.weight = nn.Parameter(torch.linspace(-1, 2, 8, dtype=torch.float32, device="cpu"))
    norm.variance_epsilon = 0.5
    x = torch.linspace(-3, 4, 16, dtype=torch.float32, device="cpu").view(2, 8)
    expected = F.rms_norm(x, (8,), norm.weight, 0.5)
    try:
        return torch.allclose(forward(norm, x), expected)
    except Exception:  # there is more to it
        return False
