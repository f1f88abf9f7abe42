"""Decoder layers as graphs have them: the pages that they write to, and how they are compiled."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pat_hf import rotary
from pat_hf.cache.page_pool import PagePool
from pat_hf.cache.step import KVLength, Step
from pat_hf.kernels.ops import store
from pat_hf.support import captures_outputs, is_compiled, modules

capturing = threading.RLock()  # one at a time: what it sets up is the process's


class Pages(Cache):
    """A PATCache as layers see it in a forward that is planned: tensors, and nothing to count.

    Args:
        pool: of pages of K and V.
        step: says where the new tokens go.
    """

    is_compileable = True
    is_initialized = True

    def __init__(self, pool: PagePool, step: Step):
        super().__init__(layers=[])
        self.numbers = sorted(pool.numbers)
        self._layers: dict[int, LayerPages] = {}
        self._pool, self._step = pool, step

    def __len__(self) -> int:
        return len(self.numbers)  # a model may ask whether it was given a cache by its truth

    def layer(self, number: int) -> LayerPages:
        """A layer's pages, and where its new tokens go."""
        if number not in self._layers:
            # Memory takes the host a while, in which the device computes the layers before.
            pages = self._pool.layer(number)
            self._layers[number] = LayerPages(*pages, *self._step.targets(pages.keys.device))
        return self._layers[number]

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * (self.numbers[-1] + 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return KVLength(query_length, self), 0

    def begin(
        self, batch: int, length: int, mask: Any, device: torch.device, windowed: bool
    ) -> torch.Tensor:
        return self._step.plan(windowed)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(layer_idx).update(key_states, value_states)


class LayerPages:
    """One layer of `Pages`, for its decoder layer alone: alike ones share what is compiled."""

    def __init__(self, *tensors: torch.Tensor):
        self.tensors = tensors

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values, pages, slots = self.tensors
        store(keys, values, key_states.to(keys.dtype), value_states.to(values.dtype), pages, slots)
        return keys, values


class Sum(torch.Tensor):
    """x + y, not added up before something takes it for a tensor.

    That is what a compiled layer gives: the next one makes one kernel of the sum and its norm.

    Args:
        x, y: of one shape and dtype.
    """

    def __new__(cls, x: torch.Tensor, y: torch.Tensor) -> Sum:
        # Without memory, so that nothing can take it for what it is not.
        self = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device
        )
        self.parts = x, y
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map_only(Sum, Sum.total, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # for callers from C++

    def total(self) -> torch.Tensor:
        """The sum, a plain tensor; the same one every time, as it may be written to."""
        self.parts = (sum(self.parts[1:], self.parts[0]),)
        return self.parts[0]


@contextmanager
def compiled_layers(model: PreTrainedModel, held: Pages, packed: bool = False) -> Iterator[None]:
    """For its length, the decoder layers of `model` run compiled on `held`, each on its own pages,
    and so do rotary embeddings and the last norm.

    Other threads' forwards go by the layers as they are; those that are to be compiled wait.

    Args:
        packed: whether forwards are of tree nodes, many tokens each, and not of a decode step.

    Raises:
        TypeError: if the layers can't be told, or don't store one K and V each.
    """
    # Every batch and kind of layer counts as a recompilation; equal sizes are a coincidence; what
    # is done to q, to k and to v can be one kernel, whose parts have tiles of their own where they
    # are small; pages and slots are in bounds.
    options = (
        torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024),
        torch.fx.experimental._config.patch(use_duck_shape=False),
        torch._inductor.config.patch(
            combo_kernels=True,
            combo_kernel_per_subkernel_blocks=not packed,
            assert_indirect_indexing=False,
        ),
    )
    with capturing:
        found = list(modules(model))
        layers, leaves = _layers(found)
        if not layers or any("forward" in vars(layer) for layer in layers):
            raise TypeError("its decoder layers can't be told or have forwards of their own")
        numbers = [
            next(x.layer_idx for x in modules(layer) if "layer_idx" in vars(x)) for layer in layers
        ]
        if sorted(numbers) != held.numbers:
            raise TypeError("some decoder layers store no K and V of their own, or several")
        hooks = [
            (module._forward_hooks, number, hook)
            for module in found
            for number, hook in module._forward_hooks.items()
            if captures_outputs(hook)
        ]
        try:
            for registered, number, hook in hooks:
                registered[number] = _unless_compiled(hook)
            for number, layer in zip(numbers, layers, strict=True):
                layer.forward = functools.partial(_run_layer, layer, held, number)
            for leaf in leaves:
                leaf.forward = functools.partial(_run_leaf, leaf, threading.get_ident())
            with ExitStack() as stack:
                for option in options:
                    stack.enter_context(option)
                yield
        finally:
            for module in (*layers, *leaves):
                vars(module).pop("forward", None)
            for registered, number, hook in hooks:
                registered[number] = hook


def _unless_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook without what torch.compile can't trace, in what is compiled.

    No output is missed for it: graphs take none that hooks collect.
    """

    def outside(*args: Any) -> Any:
        return None if torch.compiler.is_compiling() else hook(*args)

    return outside


def _layers(found: Sequence[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The decoder layers; what is to be compiled beside them, in the modules that have them."""
    layers = [module for module in found if isinstance(module, GradientCheckpointingLayer)]
    among = set(layers)
    parents = [
        module
        for module in found
        if any(
            isinstance(x, nn.ModuleList) and not among.isdisjoint(x)
            for x in module._modules.values()
        )
    ]
    leaves = [x for parent in parents for x in parent._modules.values() if x is not None]
    return layers, [x for x in leaves if not (x._modules or _as_it_is(x))]


def _as_it_is(leaf: nn.Module) -> bool:
    """Whether it is one kernel already, looks at the positions on the host, or is its user's."""
    theirs = "forward" in vars(leaf) or is_compiled(leaf)
    plain = isinstance(leaf, (nn.Embedding, nn.Linear, nn.Dropout))
    return theirs or plain or rotary.is_scaled(leaf)


def _run_layer(layer: nn.Module, whole: Pages, number: int, *args: Any, **kwargs: Any) -> Any:
    if not any(x is whole for x in (*args, *kwargs.values())):
        return type(layer).forward(layer, *args, **kwargs)
    own = whole.layer(number)
    hidden, *args = (own if x is whole else x for x in args)
    kwargs = {name: own if x is whole else x for name, x in kwargs.items()}
    parts = _parts(hidden)
    if len(parts) == 1:  # would be compiled as a case apart
        parts = (*parts, torch.zeros_like(parts[0]))
    keys, values, *targets = own.tensors
    for tensor in (keys, values, *(targets if parts[0].shape[1] > 1 else ())):
        _mark_dynamic(tensor, 0)
    _mark_length(parts, args, kwargs)
    out, rest = _compile()(layer, parts, args, kwargs, True)
    return out if rest is None else Sum(out, rest)


def _run_leaf(leaf: nn.Module, thread: int, *args: Any, **kwargs: Any) -> Any:
    if threading.get_ident() != thread or not args:
        return type(leaf).forward(leaf, *args, **kwargs)
    hidden, *args = args
    parts = _parts(hidden)
    _mark_length(parts, args, kwargs)
    return _compile()(leaf, parts, args, kwargs, False)[0]


def _parts(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return hidden.parts if isinstance(hidden, Sum) else (hidden,)


def _mark_dynamic(tensor: torch.Tensor, *dims: int) -> None:
    torch._dynamo.maybe_mark_dynamic(tensor, list(dims))


def _mark_length(parts: Sequence[torch.Tensor], args: Sequence[Any], kwargs: dict) -> None:
    """Marks what differs between the packed forwards, or the plans, of a batch."""
    for x in filter(torch.is_tensor, tree_leaves((parts, args, kwargs))):
        if x.dtype == torch.int32 and x.ndim == 4:  # the plan
            _mark_dynamic(x, 2, 3)
        elif parts[0].shape[1] > 1 and x.shape[:2] == parts[0].shape[:2]:
            _mark_dynamic(x, 1)


def _forward(
    module: nn.Module,
    parts: tuple[torch.Tensor, ...],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    split: bool,
) -> tuple[Any, torch.Tensor | None]:
    """A module's output for the sum of `parts`; with `split`, two that it is the sum of."""
    out = type(module).forward(module, sum(parts[1:], parts[0]), *args, **kwargs)
    return out, torch.zeros_like(out) if split and torch.is_tensor(out) else None


def _without_last_sum(graph: fx.GraphModule) -> fx.GraphModule:
    """A traced `_forward` that returns two summands in place of their sum and zeros.

    Only where nothing follows the sum: it might write to it, or to them.
    """
    output = graph.graph.output_node()
    match output.args[0]:
        case (
            fx.Node(target=operator.add, args=(fx.Node() as x, fx.Node() as y)) as total,
            fx.Node(target=torch.zeros_like) as zeros,
        ) if total.next is zeros and zeros.next is output and _kind(x) == _kind(y) == _kind(total):
            output.args = ((x, y),)
            graph.graph.erase_node(zeros)
            graph.graph.erase_node(total)
            graph.recompile()
    return graph


def _kind(node: fx.Node) -> Hashable:
    value = node.meta["example_value"]
    return (value.shape, value.dtype) if torch.is_tensor(value) else type(value)


def _inductor(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx  # takes its time to import

    return compile_fx(_without_last_sum(graph), inputs)


@functools.cache
def _compile() -> Callable[..., Any]:
    return torch.compile(_forward, backend=_inductor, fullgraph=True, dynamic=False)
