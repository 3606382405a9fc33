"""Triton's interpreter without work that it repeats: a third of its time or less.

For each call of a device function it looks through `triton.language` for what to replace by its
own. What a launch replaced is still replaced in the functions that the kernel calls, and what it
did not reach, `triton.language.core`, stays replaced after the first call of a function that uses
it. And of each value it makes the type and the shape anew, of which there are few.
"""

from __future__ import annotations

import math
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

_seen: set[int] = set()  # globals of modules whose functions were called
_blocks: dict[Any, Any] = {}  # block types, by element type and shape
_plain = InterpretedFunction.__call__
_make_block = core.block_type.__init__
_equal = core.tuple.__eq__
_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[Any, Any] = {}


def install() -> None:
    """Search once for each module, and make each type once."""
    InterpretedFunction.__call__ = _call  # type: ignore[method-assign]
    core.block_type.__init__ = _block
    core.tensor.__init__ = _tensor
    core.tuple.__eq__ = lambda self, other: self is other or _equal(self, other)
    interpreter._get_np_dtype = _get_np_dtype
    interpreter.TensorHandle.__post_init__ = lambda self: None  # checks the interpreter itself


def _call(self: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module in _seen:
        return self.rewrite()(*args, **kwargs)
    _seen.add(module)
    return _plain(self, *args, **kwargs)


def _block(self: Any, element_ty: Any, shape: Any) -> None:
    if isinstance(element_ty, core.pointer_type):  # which has no hash
        return _make_block(self, element_ty, shape)
    key = (element_ty, *(d.value if isinstance(d, core.constexpr) else d for d in shape))
    if key not in _blocks:
        _make_block(self, element_ty, shape)
        _blocks[key] = self
    self.__dict__ = _blocks[key].__dict__


def _tensor(self: Any, handle: Any, type: Any) -> None:
    known = type.__dict__.get("of_tensors")
    if known is None:
        shape = type.shape if type.is_block() else ()
        shape = core.tuple([core.constexpr(d) for d in shape])
        known = core.constexpr(math.prod(d.value for d in shape)), shape
        type.of_tensors = known
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = known


def _get_np_dtype(tt_dtype: Any) -> Any:
    element = tt_dtype.element_ty if isinstance(tt_dtype, tl.block_type) else tt_dtype
    if isinstance(element, core.pointer_type):
        return _np_dtype(element)
    if element not in _np_dtypes:
        _np_dtypes[element] = _np_dtype(element)
    return _np_dtypes[element]
