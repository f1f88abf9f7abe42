"""Decode steps as CUDA graphs: captured once, replayed by the caches of the model that follow."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from pat_hf import rotary
from pat_hf.cache.page_pool import PagePool
from pat_hf.cache.pat_cache import PATCache
from pat_hf.cache.workspace import Workspace
from pat_hf.layers import Pages, capturing, compiled_layers
from pat_hf.norms import fused
from pat_hf.projections import Product, joined, lay_together
from pat_hf.support import has_hooks, latent, modules

logger = logging.get_logger(__name__)

Forward = Callable[..., ModelOutput]
# Steps that about win back what a mode costs to begin with: 0.1 s or more, and 30 s.
_CAPTURE, _COMPILE = 4, 8192
_INPUTS = {"input_ids", "position_ids", "attention_mask", "past_key_values"}


class Graph:
    """A decode step of a batch, captured.

    Args:
        forward: the model's.
        cache: its pages, and the plan and targets of its step, are captured by address.
        inputs: of the step; `input_ids` and `position_ids` are given anew with every replay.
        regime: of rotary frequencies, likewise.
        products: of its model's layers, see `joined`.
        compiled: whether decoder layers go through torch.compile.
        pool: of PyTorch's allocator, to share with other graphs; `None` for one of its own.
    """

    def __init__(
        self,
        forward: Forward,
        cache: PATCache,
        inputs: dict[str, Any],
        regime: str | None = None,
        products: Sequence[Product] = (),
        compiled: bool = False,
        pool: tuple[int, int] | None = None,
    ):
        self._given = _given_anew(inputs)
        self._frequencies = rotary.Frequencies(cache.rotaries)
        self._frequencies.load(inputs["position_ids"], regime)
        device = inputs["input_ids"].device
        step, current = cache.step, torch.cuda.current_stream(device)
        held = Pages(cache.pool, step)
        inputs = inputs | self._given | {"attention_mask": None, "past_key_values": held}
        layers = compiled_layers(cache.model, held) if compiled else fused(cache.norms)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
        try:
            with capturing, joined(products), self._frequencies.fixed(), layers, _cublaslt():
                with torch.cuda.stream(stream):  # where PyTorch stays if a capture fails
                    # Compiles kernels; what it stores, the first replay stores again.
                    _check_output(forward(**inputs), held)
                    self._graph = torch.cuda.CUDAGraph()
                    graph = torch.cuda.graph(self._graph, pool, stream, "thread_local")
                    with _uncollected(), graph:
                        out = forward(**inputs)
        except BaseException:
            # PyTorch leaves it capturing, and refuses random numbers from then on.
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            current.wait_stream(stream)  # it may still be reading what is freed then
        self.pool = self._graph.pool()
        self._kind, self._out = type(out), {k: x for k, x in out.items() if x is not held}

    def __call__(self, inputs: dict[str, Any], regime: str | None) -> ModelOutput:
        for name, held in self._given.items():
            held.copy_(inputs[name])
        self._frequencies.load(inputs["position_ids"], regime)
        self._graph.replay()
        # The next replay overwrites what this one computes. Transformers' own loops copy the
        # logits, and no more, as soon as they have them.
        cache = inputs["past_key_values"]
        as_they_are = {"logits"} if cache.known_loop else ()
        out = {name: x if name in as_they_are else x.clone() for name, x in self._out.items()}
        return self._kind(**out | {"past_key_values": cache})


def _given_anew(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of the inputs that each replay has of its own."""
    with torch.inference_mode(False):  # tensors made in it can't be written to outside of it
        return {name: inputs[name].clone() for name in ("input_ids", "position_ids")}


def _check_output(out: ModelOutput, held: Pages) -> None:
    """Refuses what isn't a tensor, or is a `Sum`: it would be the first replay's for good."""
    others = [k for k, x in out.items() if type(x) is not torch.Tensor and x is not held]
    if others:
        raise TypeError(f"its output has {', '.join(others)}")


@contextmanager
def _cublaslt() -> Iterator[None]:
    """For its length, cuBLASLt chooses matrix products: it splits fewer of a step's into sums."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@contextmanager
def _uncollected() -> Iterator[None]:
    """For its length, no garbage is collected.

    If there were a PATCache in it, its pages would be unmapped, for which the device is waited for,
    and that ends a capture.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Decoder:
    """How the decode steps of a `generate()` are run.

    Args:
        model: at rest: what its graphs depend on is looked up here, once a call.
        mode: what the cache was asked for, see `PATCache`.
        compile: whether "auto" may compile.

    Attributes:
        steps: how many there may be.
        mode: "eager", "captured" or "compiled".
        reason: why, for people.
        deferred: whether stops are seen a step late.
    """

    def __init__(self, model: PreTrainedModel, mode: str, steps: int, compile: bool = True):
        self.steps = steps
        self.deferred = False
        self.device = model.device
        self._offset = 0  # into the random numbers, after the last step
        self._ahead: int | None = None  # of the columns, the furthest position
        if mode == "eager":
            self.mode, self.reason = mode, "as asked for"
        elif obstacle := _obstacle(model):
            self.mode, self.reason = "eager", obstacle
            if mode != "auto":
                logger.warning_once(f"pat_hf decodes without CUDA graphs: {obstacle}.")
        elif mode == "auto" and steps < _CAPTURE:
            self.mode, self.reason = "eager", f"{steps} steps don't pay for a capture"
        elif mode == "auto":
            self.mode = "compiled" if compile and steps >= _COMPILE else "captured"
            self.reason = f"up to {steps:,} steps"
        else:
            self.mode, self.reason = mode, "as asked for"
        self._state, self._products, self._left = None, [], []
        if self.mode != "eager":
            # Held for as long as the call: one in another thread must not move what this one reads.
            self._products, self._left = lay_together(model)
            self._state = _state(model)

    def end_step(self, undone: bool) -> None:
        """Keeps the random numbers as they would be without the step that a late stop undoes."""
        generator = torch.cuda.default_generators[self.device.index]
        if undone:
            generator.set_offset(self._offset)
        self._offset = generator.get_offset()

    def __str__(self) -> str:
        what = {"captured": "CUDA graph", "compiled": "compiled, CUDA graph"}
        return f"{what.get(self.mode, self.mode)} ({self.reason})"

    def prepare(self, workspace: Workspace, pool: PagePool) -> None:
        """Tells a pool what its layers were like in the last call, if the model is as it was."""
        state = (self._state, pool.page_size)
        known = self.mode == "compiled" and workspace.state == state
        pool.expect(workspace.memory.layers if known else {})
        workspace.state = state

    def prefill(
        self, forward: Forward, cache: PATCache, inputs: dict[str, Any]
    ) -> ModelOutput | None:
        """A packed forward, compiled; `None` if it isn't to be, or layers aren't known yet."""
        alone = cache.step.shape[1] == 1  # would be compiled as a case apart
        if self.mode != "compiled" or alone or len(cache.pool.numbers) < len(cache):
            return None
        held = Pages(cache.pool, cache.step)
        try:
            with compiled_layers(cache.model, held, packed=True), joined(self._products):
                return forward(**inputs | {"attention_mask": None, "past_key_values": held})
        except Exception as error:
            self._step_down(error)
            return None

    def step(
        self, workspace: Workspace, forward: Forward, cache: PATCache, inputs: dict[str, Any]
    ) -> ModelOutput | None:
        """The step's output; `None` if it can't be captured."""
        constants = {name: x for name, x in inputs.items() if name not in _INPUTS and x is not None}
        others = [k for k, x in constants.items() if not isinstance(x, (bool, int, float, str))]
        if others:
            self.mode, self.reason = "eager", f"steps are given {', '.join(others)}"
            return None
        shape, regime = inputs["input_ids"].shape, self._regime(cache, inputs["position_ids"])
        while self.mode != "eager":
            key = (
                self._state,
                self.mode,
                inputs["position_ids"].shape,
                tuple(sorted(constants.items())),
                cache.dtype,
                cache.pool.page_size,
                cache.pool.memory.moves,
                cache.step,
            )
            # One for a batch: what an older one was captured for is over.
            known, graph = workspace.graphs.pop(shape, (None, None))
            if known == key:
                workspace.graphs[shape] = key, graph
                return graph(inputs, regime)
            del graph
            workspace.make_room(shape, self._state)
            try:
                compiled = self.mode == "compiled"
                graph = Graph(
                    forward, cache, inputs, regime, self._products, compiled, workspace.pool
                )
                workspace.graphs[shape], workspace.pool = (key, graph), graph.pool
            except Exception as error:
                workspace.pool = None  # PyTorch takes a failed capture to go on in it
                self._step_down(error)
        return None

    def _regime(self, cache: PATCache, position_ids: torch.Tensor) -> str | None:
        """That of the rotary frequencies of a step, the positions being looked at once a call."""
        if not cache.rotaries:
            return None
        if self._ahead is None or not cache.known_loop:
            self._ahead = int(position_ids.max()) - cache.get_seq_length()
        return rotary.regime(cache.rotaries, cache.get_seq_length() + self._ahead + 1)

    def _step_down(self, error: Exception) -> None:
        """From compiled to captured, from captured to eager."""
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        self.reason = f"{self.mode} steps failed: {cause}"
        self.mode = "captured" if self.mode == "compiled" else "eager"
        logger.warning_once(f"pat_hf: {self.reason}")


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why steps of `model` can't be captured, if so."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its layers are on several devices"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if latent(model.config.get_text_config(decoder=True)):
        return "all pages, as many as there are, are expanded in each step (latent attention)"
    for module in modules(model):
        reason = None
        if getattr(vars(module).get("_hf_hook"), "offload", False):
            reason = "is offloaded"
        if rotary.on_the_host(module):
            reason = "looks at the positions on the host"
        if has_hooks(module):
            reason = "has forward hooks, which a replay would not run"
        if reason is not None:
            name = next(name for name, x in model.named_modules() if x is module)
            return f"{name or 'the model'} {reason}"
    return None


def _state(model: PreTrainedModel) -> Hashable:
    """What a captured step takes for granted: where weights lie, and how modules are switched."""
    state: list[Hashable] = [str(model.get_experts_implementation())]
    for module in modules(model):
        state.append(module.training)
        # Buffers of some rotary embeddings are replaced by themselves: graphs hold copies.
        buffers = () if rotary.is_scaled(module) else module._buffers.values()
        state += [_addresses(x) for x in (*module._parameters.values(), *buffers)]
        if hasattr(type(module), "merged"):  # PEFT's layers
            switches = (module.active_adapters, module.merged, module.disable_adapters)
            state.append(str((*switches, vars(module).get("scaling"))))
    return hash(tuple(state))


def _addresses(x: torch.Tensor | None) -> Hashable:
    if x is None:
        return None
    if type(x) in (nn.Parameter, torch.Tensor):  # told apart fast
        return x.data_ptr()
    if is_traceable_wrapper_subclass(x):  # a quantised weight, say, and its scales
        return tuple(_addresses(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.data_ptr()
