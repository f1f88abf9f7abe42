"""Projections of the same hidden states as one product, as a decode step likes it.

A step of few tokens takes as long as its weights take to be read, and one large matrix is read
faster than several small ones: on an H200, q, k and v of an 8B model at 4 instead of 2.5 TB/s.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from pat_hf.support import modules

# As Transformers names the layers that its attention and MLPs feed the same tensor.
_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_lock = threading.Lock()


class Product(NamedTuple):
    """Projections that can be computed together.

    Attributes:
        parent: the module that has them, by `names`.
        linears: those layers.
        weight: theirs, which lie together, [sum of their outputs, inputs]; bias: likewise, if any.
    """

    parent: nn.Module
    names: tuple[str, ...]
    linears: list[nn.Linear]
    weight: torch.Tensor
    bias: torch.Tensor | None


def lay_together(model: nn.Module) -> tuple[list[Product], list[torch.Tensor]]:
    """Moves weights that are used together side by side, each still a parameter of its own.

    Left where they are: those that anything else refers to (a flat buffer of an optimizer, say), or
    that are no plain tensors.

    Returns:
        What lies together now, and weights that are used together and do not. As long as both are
        held, another call leaves them where they are.
    """
    moved, products, left = False, [], []
    with _lock, torch.inference_mode(False), torch.no_grad():
        for parent, names, linears in _siblings(model):
            apart = [x for x in _parameters(linears) if not _lie_together(x)]
            movable = [x for x in apart if all(map(_alone, x))]
            for tensors in movable:
                _move(tensors)
                moved = True
            if len(movable) == len(apart):
                products.append(Product(parent, names, linears, *_whole(linears)))
            else:
                left += [x.data for tensors in _parameters(linears) for x in tensors]
    if moved:
        torch.cuda.empty_cache()  # of where they were
    return products, left


@contextmanager
def joined(products: Sequence[Product]) -> Iterator[None]:
    """For its length, projections whose weights lie together are computed together.

    They are again as they were at its end. A forward must not change its hidden states in place
    between one projection and the next.

    Args:
        products: from `lay_together`, since when no weights were moved.
    """
    try:
        for product in products:
            held = [None]
            for i, name in enumerate(product.names):
                product.parent._modules[name] = _Projection(product, i, held)
        yield
    finally:
        for product in products:
            product.parent._modules.update(zip(product.names, product.linears, strict=True))


class _Projection(nn.Linear):
    """One of several linear layers that are one product, which the first computes for all.

    Args:
        product: of those layers; `index` among them.
        held: shared by them; has the input and the product in between, else `None`.
    """

    def __init__(
        self, product: Product, index: int, held: list[tuple[torch.Tensor, torch.Tensor] | None]
    ):
        linears = product.linears
        # What nn.Module would set up is that layer's, and takes long to.
        vars(self).update(
            vars(linears[index]),
            linear=linears[index],
            thread=threading.get_ident(),
            first=sum(x.out_features for x in linears[:index]),
            last=index == len(linears) - 1,
            whole=(product.weight, product.bias),
            held=held,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # What compiles is the thread that joined them; it can't be asked there.
        if not torch.compiler.is_dynamo_compiling() and threading.get_ident() != self.thread:
            return self.linear(input)
        pair = self.held[0]
        if pair is None or pair[0] is not input:
            pair = input, F.linear(input, *self.whole)
        self.held[0] = None if self.last else pair
        return pair[1].narrow(-1, self.first, self.out_features)


def _siblings(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...], list[nn.Linear]]]:
    """Modules with layers of the same input; their names, and they."""
    for parent in modules(model):
        for names in _NAMES:
            if not all(name in parent._modules for name in names):
                continue
            linears = [parent._modules[name] for name in names]
            # Another thread may have joined them at the moment.
            linears = [x.linear if type(x) is _Projection else x for x in linears]
            if not all(map(_plain, linears)):
                continue
            own = [x._parameters for x in linears]  # which nn.Module is slow to look up
            kinds = {(x["weight"].dtype, x["weight"].device, x["bias"] is None) for x in own}
            if len(kinds) == 1 == len({x.in_features for x in linears}):
                yield parent, names, linears


def _plain(layer: nn.Module | None) -> bool:
    """Whether it is a linear layer and no more: not pruned or parametrized, say."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and layer._parameters.keys() == {"weight", "bias"}
    )


def _parameters(linears: list[nn.Linear]) -> Iterator[list[nn.Parameter]]:
    """Their weights; their biases, if they have any."""
    for name in ("weight", "bias"):
        if linears[0]._parameters[name] is not None:
            yield [x._parameters[name] for x in linears]


def _lie_together(tensors: list[torch.Tensor]) -> bool:
    return all(
        type(a) is type(b) is nn.Parameter  # a quantised weight, say, has no memory
        and a.data_ptr() + a.nbytes == b.data_ptr()
        and a.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in pairwise(tensors)
    )


def _move(tensors: list[torch.Tensor]) -> None:
    """Moves parameters side by side."""
    before = [x.data for x in tensors]
    whole = torch.cat(before)
    for x, part in zip(tensors, whole.split([len(x) for x in tensors]), strict=True):
        x.data = part
    if whole.is_cuda:  # other streams may still be reading them where they were
        torch.cuda.synchronize(whole.device)


def _alone(tensor: torch.Tensor) -> bool:
    """Whether a parameter has its memory for itself."""
    if type(tensor) is not nn.Parameter:
        return False
    storage = tensor.untyped_storage()
    # Two: the parameter's, and this one.
    return storage.nbytes() == tensor.nbytes and torch._C._storage_Use_Count(storage._cdata) == 2


def _whole(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights that lie together, [sum of their outputs, inputs]; biases likewise."""
    size = sum(x.out_features for x in linears)
    weight, *bias = (
        x[0].data.as_strided((size, *x[0].shape[1:]), x[0].stride()) for x in _parameters(linears)
    )
    return weight, bias[0] if bias else None
