"""What the tests of shipped models share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def gguf_read_once() -> Iterator[None]:
    """transformers reads all of a GGUF file three times, and makes a table of names for each of its
    weights: most of the time of a build. Here it does both once."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield
