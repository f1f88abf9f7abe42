"""Rotary embeddings whose frequencies follow the longest sequence of a batch.

Transformers recomputes those of longrope (Phi-3, Phi-4) and of dynamic NTK scaling by the positions
of each forward (`dynamic_rope_update`): beyond a length, equal tokens have other keys in a batch of
another length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pat_hf.support import hooked, modules


def scaled(model: nn.Module) -> list[nn.Module]:
    """The model's rotary embeddings of that kind; most models have none."""
    return [x for x in modules(model) if is_scaled(x)]


def is_scaled(module: nn.Module) -> bool:
    """Whether it is a rotary embedding of that kind."""
    return "rope_type" in vars(module) and any(map(_follows, _kinds(module).values()))


def on_the_host(module: nn.Module) -> bool:
    """Whether it waits for the device to choose a scale by the positions, as Phi-MoE's does."""
    return is_scaled(module) and "long_mscale" in module.config.rope_parameters


def regime(rotaries: Sequence[nn.Module], length: int, remembered: bool = True) -> str | None:
    """What tells keys apart of equal tokens in batches of different lengths.

    Args:
        rotaries: from `scaled`.
        length: tokens of the batch's longest sequence.
        remembered: whether a longer one before counts, by which dynamic ones still go.

    Returns:
        `None` for batches that aren't longer than what the model was trained for.
    """
    found = []
    for module in rotaries:
        for layers, kind in _kinds(module).items():
            if kind == "longrope":
                parameters = module.config.rope_parameters
                parameters = parameters if layers is None else parameters[layers]
                found.append(int(length > parameters["original_max_position_embeddings"]))
            elif _follows(kind):
                usual = module.original_max_seq_len
                held = getattr(module, f"{layers}_max_seq_len_cached", module.max_seq_len_cached)
                # It shrinks only to where it began.
                longest = max(length, int(held)) if remembered else length
                found.append(longest if longest > usual <= length else 0)
    return str(found) if any(found) else None


@contextmanager
def of_length(rotaries: Sequence[nn.Module], length: int) -> Iterator[None]:
    """For its length, this thread's forwards compute as in a batch with `length` tokens at most."""

    def lengthen(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        last = given.new_full((*given.shape[:-1], 1), length - 1)
        changed = torch.cat([given, last], -1)
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": changed}
        return (args[0], changed, *args[2:]), kwargs

    def shorten(out: Any) -> Any:
        return tuple(x[..., :-1, :] for x in out) if isinstance(out, tuple) else out[..., :-1, :]

    with ExitStack() as stack:
        for module in rotaries:
            stack.enter_context(hooked(module, lengthen, shorten))
        yield


class Frequencies:
    """The frequencies of `rotaries` at addresses that a captured forward can hold.

    Attributes:
        regime: which they are; "" for none yet.
    """

    def __init__(self, rotaries: Sequence[nn.Module]):
        self.regime: str | None = ""
        self._rotaries = rotaries
        with torch.inference_mode(False):  # as a graph's inputs
            self._held = [
                {n: module._buffers[n].clone() for n in _tables(module)} for module in rotaries
            ]

    def load(self, position_ids: torch.Tensor, regime: str | None) -> None:
        """Has them recomputed for a forward at `position_ids`, if they are of another regime.

        The rotary embeddings look at the positions on the host, which waits for the device.
        """
        if regime == self.regime:
            return
        for module, held in zip(self._rotaries, self._held, strict=True):
            x = torch.empty(0, device=position_ids.device)
            for layers in _kinds(module):
                module(x, position_ids, *([] if layers is None else [layers]))
            for name, table in held.items():
                table.copy_(module._buffers[name])
        self.regime = regime

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """For its length, forwards read what is held and recompute nothing."""
        before = [(module.rope_type, dict(module._buffers)) for module in self._rotaries]
        try:
            for module, held in zip(self._rotaries, self._held, strict=True):
                kinds = dict.fromkeys(_kinds(module), "default")
                module.rope_type = kinds.get(None, kinds)
                module._buffers.update(held)
            yield
        finally:
            for module, (kind, buffers) in zip(self._rotaries, before, strict=True):
                module.rope_type = kind
                module._buffers.update(buffers)


def _kinds(module: nn.Module) -> dict[str | None, Any]:
    """The rope types of a module, by the type of layers they are for if they differ."""
    kind = vars(module).get("rope_type")
    return kind if isinstance(kind, dict) else {None: kind}


def _follows(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


def _tables(module: nn.Module) -> list[str]:
    return [x for x in module._buffers if x.endswith("inv_freq") and "original" not in x]
