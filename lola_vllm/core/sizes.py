"""Sizes of sparse caches: one for all layers, or by layer, or by KV head of a layer."""

from __future__ import annotations

from typing import Any

Sizes = int | tuple[int | tuple[int, ...], ...]


def read_sizes(value: Any) -> Sizes:
    """Sizes as `LolaConfig.sparse_cache_size` has them; lists become tuples."""

    def is_size(x: Any) -> bool:
        return type(x) is int and x >= 0

    if is_size(value):
        return int(value)
    layers: list[int | tuple[int, ...]] = []
    for layer in value if isinstance(value, (list, tuple)) else ():
        heads = isinstance(layer, (list, tuple)) and len(layer) > 0 and all(map(is_size, layer))
        if not (heads or is_size(layer)):
            layers = []
            break
        layers.append(tuple(layer) if heads else layer)
    if not layers:
        raise ValueError(
            "must be an integer of at least 0, or a list with one for each layer, or with a list "
            "of one for each KV head of a layer"
        )
    return tuple(layers)


def of_layer(sizes: Sizes, index: int) -> int | tuple[int, ...]:
    """The number of a layer, or those of its KV heads where they differ."""
    size = sizes if isinstance(sizes, int) else sizes[index]
    return size if isinstance(size, int) or len(set(size)) > 1 else size[0]
