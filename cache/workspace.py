"""What a cache leaves behind for the next one of the same model: addresses, buffers, graphs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from pat_hf.cache.memory import Memory
from pat_hf.cache.step import Step

if TYPE_CHECKING:
    from pat_hf.graphs import Graph

_KEPT = 8  # graphs of other batch sizes that are kept; each holds its logits


class Workspace:
    """What one cache at a time has of a model's device, kept for the next one.

    Attributes:
        memory: where pages lie; empty while no cache holds the workspace.
        state: of the model, and the size of pages, when the memory was last used.
        steps: by device and batch, the buffers that decode steps are planned in.
        graphs: captured decode steps by the shape of their input, and what else they depend on,
            the model's state first; the last used are the last.
        pool: of PyTorch's allocator, for what the graphs compute: one is replayed at a time.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self.state: Hashable = None
        self.steps: dict[tuple[torch.device, int], Step] = {}
        self.graphs: dict[torch.Size, tuple[tuple[Hashable, ...], Graph]] = {}
        self.pool: tuple[int, int] | None = None

    def make_room(self, shape: torch.Size, state: Hashable) -> None:
        """Drops graphs of another state of the model, and the oldest, for one of `shape`."""
        kept = [x for x, (key, _) in self.graphs.items() if key[0] == state][1 - _KEPT :]
        self.graphs = {x: self.graphs[x] for x in kept}
        batches = {shape[0], *(x[0] for x in kept)}
        self.steps = {where: step for where, step in self.steps.items() if where[1] in batches}

    def forget(self) -> None:
        """Drops all graphs, and the buffers that they were captured over."""
        self.graphs.clear()
        self.steps.clear()
        self.pool = None


_free: weakref.WeakKeyDictionary[PreTrainedModel, list[Workspace]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def lease(model: PreTrainedModel, holder: object) -> Workspace:
    """A workspace of `model` for as long as `holder` lives; its memory is given back then."""
    with _lock:
        free = _free.setdefault(model, [])
        workspace = free.pop() if free else Workspace()

    def give_back() -> None:
        workspace.memory.release()
        with _lock:
            free.append(workspace)

    weakref.finalize(holder, give_back).atexit = False
    return workspace
