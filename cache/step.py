"""One forward on a PATCache: its plan, and where it stores what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pat_hf.kernels.plan import Plan, check_blocks


class KVLength(int):
    """A length that carries its cache: all that Transformers hands to a mask function.

    Args:
        cache: something with the `begin` of a `PATCache`.
    """

    def __new__(cls, value: int, cache: Any) -> KVLength:
        self = super().__new__(cls, value)
        self.cache = cache
        return self


class Step:
    """What the layers need in one forward: plans, and where the new tokens go.

    Its tensors keep their addresses when another plan is loaded, so that graphs may hold them.

    Args:
        device: where the plan goes.
        batch, length: shape of the forward's input.
        capacities: (C, W) of the plans to come, one for each kind of layer.
    """

    def __init__(
        self,
        device: torch.device,
        batch: int,
        length: int,
        capacities: Sequence[tuple[int, int]],
    ):
        self.shape = (batch, length)
        # Tensors made in inference mode could not be advanced outside of it.
        with torch.inference_mode(False):
            self.tensors = [
                torch.empty((1, 1, *capacity), dtype=torch.int32, device=device)
                for capacity in capacities
            ]
            targets = torch.empty((2, batch * length), dtype=torch.int64, device=device)
        self._targets = {device: targets}
        self.columns, self.real, self.grown = 0, None, {}
        self.asked: set[bool] = set()  # what the mask function was called for, windows or none
        self.written: set[int] = set()  # layers that have stored their K and V

    @property
    def packed(self) -> bool:
        """Whether the forward is of tree nodes; it lengthens no request."""
        return self.columns == 0

    def plan(self, windowed: bool) -> torch.Tensor:
        """The plan of layers with windows, or without; models may ask for one that none has."""
        return self.tensors[-windowed]

    def fits(self, plans: Sequence[Plan]) -> bool:
        """Whether there is room for these plans."""
        pairs = zip(plans, self.tensors, strict=True)
        return all(plan.fits(tensor.shape[2:]) for plan, tensor in pairs)

    def load(
        self,
        plans: Sequence[Plan],
        pages: np.ndarray,
        slots: np.ndarray,
        columns: int,
        real: np.ndarray | None = None,
        grown: dict[int, int] | None = None,
    ) -> Step:
        """Makes this the step of a forward.

        Args:
            plans: of its query rows, for each kind of layer; they fit.
            pages, slots: int64 [batch * length], where each token is stored.
            columns: by how much the forward lengthens every request, padding included.
            real: bool [batch, columns], padding `False`; `None` where there is none.
            grown: requests that the step lengthens, and by how many tokens.
        """
        self.columns, self.real, self.grown = columns, real, grown or {}
        self.asked = set()
        self.written = set()
        self._shapes, self._heads = plans[0].tables.shapes, plans[0].heads
        for plan, tensor in zip(plans, self.tensors, strict=True):
            source = plan.elements(tensor.shape[2:])
            held = tensor.view(-1)[: len(source)]
            held.copy_(staged(source, tensor.device), non_blocking=True)
        for targets in self._targets.values():
            source = staged(torch.from_numpy(np.stack([pages, slots])), targets.device)
            targets.copy_(source, non_blocking=True)
        return self

    def check(self, keys: torch.Tensor) -> None:
        """Makes sure that the step is planned for a layer that stores such keys.

        Raises:
            OtherBlocks: if it isn't.
        """
        heads = self._heads._replace(itemsize=keys.element_size())
        check_blocks(self._shapes, heads, keys.device)

    def targets(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and slots, on a layer's device."""
        if device not in self._targets:
            with torch.inference_mode(False):
                self._targets[device] = next(iter(self._targets.values())).to(device)
        return tuple(self._targets[device])

    def advance(self) -> None:
        """Moves every request one token on, inside the pages that it has."""
        for tensor in self.tensors:
            Plan.positions(tensor).add_(1)
        for targets in self._targets.values():
            targets[1].add_(1)
        self.asked.clear()
        self.written.clear()


def staged(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """For copies to a device: to a GPU, they need not wait for what is queued there."""
    if device.type != "cuda":
        return source
    held = torch.empty_like(source, pin_memory=True)
    # Not `source.pin_memory()`, which took up to 4 ms for what NumPy copies in 0.3.
    np.copyto(held.numpy(), source.numpy())
    return held
