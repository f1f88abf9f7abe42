"""A file of stored prompts: their tokens, K and V, and which model they are of."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pat_hf import adapters
from pat_hf.cache.page_pool import PagePool
from pat_hf.cache.prefix_tree import Node, PrefixTree

_FORMAT = "pat_hf prompts, 3"
# What of a config K and V don't depend on.
_ASIDE = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache",
}  # fmt: skip
_SAMPLE = 64  # values of every weight that the checksum sees, from its begin and from its end


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What two models must have in common for one to read the other's K and V.

    The weights' checksum is of every weight's shape and a few values. Adapters are left out, as
    are weights whose values aren't in memory.
    """
    config = model.config.get_text_config(decoder=True)
    weights, added = hashlib.sha256(), adapters.weights(model)
    kept = model.state_dict(keep_vars=True)
    buffers = [(name, x) for name, x in model.named_buffers() if name in kept]  # quantized weights
    for name, tensor in (*model.named_parameters(), *buffers):
        parts = [x for x in name.split(".") if x not in adapters.WRAPPERS]
        if added.intersection(parts):
            continue
        weights.update(f"{'.'.join(parts)} {list(tensor.shape)}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().flatten()
            ends = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).cpu().contiguous()
            weights.update(ends.view(torch.uint8).numpy().tobytes())
    about = {name: x for name, x in config.to_diff_dict().items() if name not in _ASIDE}
    about |= {"architecture": type(model).__name__, "dtype": str(model.dtype)}
    about |= {"weights": weights.hexdigest()}
    return json.loads(json.dumps(about, default=str))


def write(path: str | Path, tree: PrefixTree, pool: PagePool, about: dict[str, Any]) -> None:
    """Writes all nodes of known ids that no adapter computed, whole or not at all.

    Args:
        about: the model's `fingerprint`.

    Raises:
        OSError: if it can't be written.
    """
    rows: dict[Node, int] = {}
    for node in tree:
        above = node.parent in rows or node.parent is tree.roots.get(None)
        if above and node.pages is not None and len(node.tokens) == node.length:
            rows[node] = len(rows)
    nodes = list(rows)
    page, slot = _places(nodes, pool)
    empty = np.empty(0, np.int64)
    tensors = {
        "tokens": torch.from_numpy(np.concatenate([empty, *(node.tokens for node in nodes)])),
        "parent": torch.tensor([rows.get(node.parent, -1) for node in nodes], dtype=torch.int64),
        "length": torch.tensor([node.length for node in nodes], dtype=torch.int64),
        "used": torch.tensor([node.used for node in nodes], dtype=torch.int64),
        "ended": torch.tensor([node.ended for node in nodes], dtype=torch.int64),
    }
    for index, layer in pool.layers.items():
        for name, pages in zip(("keys", "values"), layer, strict=True):
            place = (x.to(pages.device) for x in (page, slot))
            tensors[f"{name}.{index}"] = _gather(pages, *place).cpu()
    model = json.dumps(about)
    metadata = {"format": _FORMAT, "model": model, "checksum": _checksum(model, tensors)}
    part = f"{path}.part"
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}.") from error
    finally:
        Path(part).unlink(missing_ok=True)


def read(path: str | Path, tree: PrefixTree, pool: PagePool, model: PreTrainedModel) -> None:
    """Puts what `write` wrote into an empty tree and pool, each layer where the model's is.

    Raises:
        ValueError: if the file is no such file, or damaged, or of another model.
        PoolExhausted: if the pool's limit doesn't allow it.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut off or no safetensors file ({error}). Save the cache anew."
        ) from None
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"{path} was not written by PATCache.save of this version: its format is "
            f"{about.get('format')!r} and {_FORMAT!r} is expected."
        )
    if about.get("checksum") != _checksum(about.get("model", ""), tensors):
        raise ValueError(
            f"{path} is damaged: it holds something else than was written. Save the cache anew."
        )
    _compare(path, json.loads(about["model"]), fingerprint(model))
    tokens, parent, length, used, ended = (
        tensors.pop(name).numpy() for name in ("tokens", "parent", "length", "used", "ended")
    )
    nodes: list[Node] = []
    for above, count, clock, end in zip(parent, length, used, ended, strict=True):
        node = tree.grow(nodes[above] if above >= 0 else None, tokens[:count])
        node.used, node.ended = int(clock), bool(end)
        nodes.append(node)
        tokens = tokens[count:]
        tree.clock = max(tree.clock, node.used)
    pool.extend([(node, 0) for node in nodes])
    page, slot = _places(nodes, pool)
    devices = _devices(model)
    for name in [name for name in tensors if name.startswith("keys.")]:
        index = int(name.removeprefix("keys."))
        device = devices.get(index, model.device)
        keys, values = (
            tensors[f"{kind}.{index}"].to(device).transpose(0, 1)[None]
            for kind in ("keys", "values")
        )
        pool.write(index, keys, values, page.to(device), slot.to(device))


def _checksum(model: str, tensors: dict[str, torch.Tensor]) -> str:
    checksum = hashlib.sha256(model.encode())
    for name, tensor in sorted(tensors.items()):
        checksum.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():  # PyTorch can't view nothing as bytes
            checksum.update(tensor.flatten().view(torch.uint8).numpy())
    return checksum.hexdigest()


def _compare(path: str | Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    # Not what another version of Transformers added to the config.
    differ = [name for name in ours if name in theirs and theirs[name] != ours[name]]
    if not differ:
        return
    if differ == ["weights"]:
        what = "the weights are others"
    else:
        shown = [name for name in differ if name != "weights"]
        what = "; ".join(f"{name} is {theirs[name]!r}, not {ours[name]!r}" for name in shown)
    raise ValueError(
        f"{path} holds keys and values of another model: in the file, {what}. "
        "Load it with the model that it was saved for."
    )


def _places(nodes: list[Node], pool: PagePool) -> torch.Tensor:
    """Page and slot of every token, int64 [2, tokens]."""
    places = [pool.places(node.pages, np.arange(node.length)) for node in nodes]
    return torch.from_numpy(np.concatenate([np.empty((2, 0), np.int64), *places], 1))


def _gather(pages: torch.Tensor, page: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """K or V of tokens, [tokens, kv heads, dim]."""
    return pages[page, :, slot].contiguous()


def _devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where each layer's weights are."""
    devices = {}
    for name, tensor in model.named_parameters():
        if (layer := re.search(r"\.(\d+)\.", name)) and not tensor.is_meta:
            devices.setdefault(int(layer[1]), tensor.device)
    return devices
