"""Key tables: how tensors named by PyTorch map to leaves of the parameter tree, in both directions.

A table is a list of `Rule`s. Targets are '/'-joined paths; a path part `layers[3]` addresses index 3 of a stacked
(scanned) leaf, and `layers[3]/lora_B[1]` index (3, 1). Conversion is total: every rule must find its source, and every
stacked leaf must be filled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from crab_jax.io.errors import InputError

_STACKED = re.compile(r"^(.*)\[(\d+)\]$")

# Axis permutations from PyTorch's layouts to those of the parameter tree; the inverses are computed.
_LAYOUTS: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "linear": (1, 0),  # (out, in) -> (in, out)
    "conv2d": (2, 3, 1, 0),  # (O, I, kH, kW) -> (kH, kW, I, O)
    "conv1d": (2, 1, 0),  # (O, I, k) -> (k, I, O)
    # ConvTranspose2d (I, O, kH, kW) -> (kH, kW, O, I), for nn.ConvTranspose(transpose_kernel=True)
    "conv_transpose2d": (2, 3, 1, 0),
}


class Rule(NamedTuple):
    """One tensor: PyTorch key, path in the parameter tree, and the layout change between them."""

    source: str
    target: str
    layout: str = "same"


def split_target(target: str) -> tuple[str, tuple[int, ...]]:
    """Split a target: 'llama/layers[3]/q/lora_B[1]' -> ('llama/layers/q/lora_B', (3, 1))."""
    index, parts = [], []
    for part in target.split("/"):
        match = _STACKED.match(part)
        if match:
            part = match.group(1)
            index.append(int(match.group(2)))
        parts.append(part)
    return "/".join(parts), tuple(index)


def permute(array: np.ndarray, layout: str, inverse: bool = False) -> np.ndarray:
    """Return a view of `array` in the parameter tree's axis order, or in PyTorch's when `inverse`."""
    axes = _LAYOUTS[layout]
    if axes is None:
        return array
    return np.transpose(array, np.argsort(axes) if inverse else axes)


def to_params(rules: Iterable[Rule], tensors: Mapping[str, np.ndarray], where: str = "checkpoint") -> dict[str, Any]:
    """Return a nested parameter dict from PyTorch tensors, in the dtypes of the tensors.

    Raises InputError for missing source keys and for layers of unequal shapes or dtypes, ValueError for a table that
    leaves a hole in a stack.
    """
    rules = list(rules)
    missing = [r.source for r in rules if r.source not in tensors]
    if missing:
        raise InputError(
            where,
            missing[0],
            f"{len(missing)} expected keys are missing, e.g. {missing[:5]}",
            "give the file that holds them, or the config that matches this file",
        )
    targets = [split_target(rule.target) for rule in rules]
    indices: dict[str, list[tuple[int, ...]]] = {}
    for path, index in targets:
        indices.setdefault(path, []).append(index)
    flat: dict[str, np.ndarray] = {}
    for rule, (path, index) in zip(rules, targets, strict=True):
        value = permute(np.asarray(tensors[rule.source]), rule.layout)
        if path not in flat:  # filled in place, so that a large stack is never held twice
            sizes = tuple(max(column) + 1 for column in zip(*indices[path], strict=True))
            if len(set(indices[path])) != math.prod(sizes) or len(indices[path]) != math.prod(sizes):
                raise ValueError(f"key table: {path} is not filled exactly once")
            flat[path] = np.empty(sizes + value.shape, value.dtype)
        if (value.shape, value.dtype) != (flat[path].shape[len(index) :], flat[path].dtype):
            raise InputError(
                where,
                rule.source,
                f"{value.dtype}{value.shape} in our layout, its siblings are "
                f"{flat[path].dtype}{flat[path].shape[len(index) :]}",
                "give files of one model",
            )
        flat[path][index] = value
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return nested


def from_params(rules: Iterable[Rule], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return PyTorch-named tensors from a nested parameter dict: the inverse of `to_params`."""
    tensors = {}
    for rule in rules:
        path, index = split_target(rule.target)
        leaf: Any = params
        for part in path.split("/"):
            leaf = leaf[part]
        tensors[rule.source] = np.asarray(permute(np.asarray(leaf)[index], rule.layout, inverse=True), order="C")
    return tensors


def unread(rules: Iterable[Rule], tensors: Iterable[str], ignored: Iterable[str] = ()) -> list[str]:
    """Return the source names that no rule reads and no regular expression in `ignored` (full match) covers."""
    read = {rule.source for rule in rules}
    patterns = [re.compile(pattern) for pattern in ignored]
    return [name for name in tensors if name not in read and not any(p.fullmatch(name) for p in patterns)]
