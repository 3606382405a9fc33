"""Values of a key of `lola_config` that can differ: one for all layers, by layer, or by KV head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Sizes = int | tuple[int | tuple[int, ...], ...]
Flags = bool | tuple[bool | tuple[bool, ...], ...]
T = TypeVar("T", int, bool)


def read_sizes(value: Any) -> Sizes:
    """Sizes as `LolaConfig.sparse_cache_size` has them; lists become tuples."""
    return _read(value, lambda x: type(x) is int and x >= 0, "an integer of at least 0")


def read_flags(value: Any) -> Flags:
    """Flags as `LolaConfig.hidden_state` has them; lists become tuples."""
    return _read(value, lambda x: type(x) is bool, "true or false")


def _read(value: Any, fits: Callable[[Any], bool], what: str) -> Any:
    if fits(value):
        return value
    layers: list[Any] = []
    for layer in value if isinstance(value, (list, tuple)) else ():
        heads = isinstance(layer, (list, tuple)) and len(layer) > 0 and all(map(fits, layer))
        if not (heads or fits(layer)):
            layers = []
            break
        layers.append(tuple(layer) if heads else layer)
    if not layers:
        raise ValueError(
            f"must be {what}, or a list with one for each layer, or with a list of one for each "
            "KV head of a layer"
        )
    return tuple(layers)


def of_layer(values: T | tuple[T | tuple[T, ...], ...], index: int) -> T | tuple[T, ...]:
    """The value of a layer, or those of its KV heads where they differ."""
    value = values[index] if isinstance(values, tuple) else values
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
