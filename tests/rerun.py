"""Decode steps on the CPU as they are on a GPU, but for the capture."""

import weakref

from pat_hf import graphs, layers, rotary
from pat_hf.cache import pat_cache, workspace
from pat_hf.norms import fused


class Rerun(graphs.Graph):
    """A step of a graph's buffers and compiled layers, run again where that would be replayed."""

    made = 0
    pool = None

    def __init__(self, forward, cache, inputs, regime=None, products=(), compiled=False, pool=None):
        Rerun.made += 1
        self._products = products
        self._forward, self._cache, self._compiled = forward, weakref.ref(cache), compiled
        self._given = graphs._given_anew(inputs)
        self._frequencies = rotary.Frequencies(cache.rotaries)
        self._inputs = {k: x for k, x in inputs.items() if k != "past_key_values"}
        self._step = cache.step
        self(inputs, regime)

    def __call__(self, inputs, regime):
        cache = self._cache()
        assert cache.step is self._step
        for name, held in self._given.items():
            held.copy_(inputs[name])
        self._frequencies.load(inputs["position_ids"], regime)
        held = layers.Pages(cache.pool, cache.step)
        changed = {"attention_mask": None, "past_key_values": held}
        whole = layers.compiled_layers(cache.model, held) if self._compiled else fused(cache.norms)
        with graphs.joined(self._products), self._frequencies.fixed(), whole:
            out = self._forward(**self._inputs | self._given | changed)
        graphs._check_output(out, held)
        out.past_key_values = inputs["past_key_values"]
        return out


def as_on_a_gpu(monkeypatch, deferred=False):
    """Steps are captured, by `Rerun`; `deferred` leaves stops to be seen a step late."""
    monkeypatch.setattr(workspace, "_free", weakref.WeakKeyDictionary())
    monkeypatch.setattr(graphs, "Graph", Rerun)
    monkeypatch.setattr(graphs, "_obstacle", lambda model: None)
    monkeypatch.setattr(Rerun, "made", 0)
    if not deferred:
        monkeypatch.setattr(pat_cache.PATCache, "defer_stops", lambda self: False)
