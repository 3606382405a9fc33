"""Where an answer from a library comes from, in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from lola_vllm.memory.sessions.names import check_name

LIBRARIES = "/v1/lola/libraries"
_COLUMNS = 92  # of a passage in a terminal


def library_path(library: str, verb: str = "") -> str:
    """The route of a library.

    Raises:
        SessionNameError: none can have this name.
    """
    return f"{LIBRARIES}/{check_name(library, 'library')}" + (f"/{verb}" if verb else "")


def source_lines(sources: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What each source is, and below it the sentence that is read most, with its
    neighbours."""
    for number, source in enumerate(sources, start=1):
        part = f", part {source['part']} of {source['parts']}" if source["parts"] > 1 else ""
        yield f"[{number}] {source['document']}{part} ({source['share']:.0%})"
        for line in textwrap.wrap(source["passage"], _COLUMNS):
            yield f"    {line}"
