"""Answers that come word by word: how they are asked for, printed, and said to have ended."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from lola_vllm.command.client.terminal import print

_COLUMNS = 92  # of a passage in a terminal
# Of the body of every request for an answer. vLLM ends an answer whose last tokens are 32 to 128
# tokens four times over. A shorter loop is one of 32 or more as well; a row of dashes or zeros is
# too short to be taken for a loop.
STREAM: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "repetition_detection": {"min_pattern_size": 32, "max_pattern_size": 128, "min_count": 4},
}


@dataclass
class Answer:
    """What a stream has told besides words.

    Attributes:
        ended: vLLM's reason. usage: tokens of the prompt and of the answer. told: what the store
            says of it. sources: of a library's answer. first: seconds to the first word.
    """

    ended: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    first: float = 0.0

    def cut(self, most: int) -> str | None:
        """Why it has not come to its end, where it has not.

        Args:
            most: tokens that were asked for.
        """
        tokens = self.usage.get("completion_tokens", 0)
        if self.ended == "repetition":
            return f"ended at {tokens:,} tokens: the answer repeats itself"
        if self.ended == "length" and tokens < most:
            return f"cut at {tokens:,} tokens: the server's --max-model-len is used up"
        if self.ended == "length":
            return f"cut at {tokens:,} tokens; --max-tokens N allows more"
        return None


def print_answer(
    events: Generator[dict[str, Any]],
    show: Callable[[Sequence[dict[str, Any]]], None],
) -> Answer:
    """Print an answer as it comes.

    Args:
        events: of the stream, which is closed. show: called with the sources of a library's answer
            before its first word.
    """
    answer, began, words = Answer(), time.monotonic(), False
    with closing(events):
        for event in events:
            if not answer.sources and (sources := event.get("sources")):
                answer.sources = sources
                show(sources)
            for choice in event["choices"]:
                delta = choice["delta"]
                said = (delta.get("reasoning") or "") + (delta.get("content") or "")
                if said and not words:
                    words, answer.first = True, time.monotonic() - began
                print(said, end="", flush=True)
                answer.ended = choice.get("finish_reason") or answer.ended
            answer.usage = event.get("usage") or answer.usage
            answer.told = (event.get("kv_transfer_params") or {}).get("lola") or answer.told
    print()
    return answer


def source_lines(sources: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What each source is, and below it the sentence that is read most, with its
    neighbours."""
    for number, source in enumerate(sources, start=1):
        part = f", part {source['part']} of {source['parts']}" if source["parts"] > 1 else ""
        yield f"[{number}] {source['document']}{part} ({source['share']:.0%})"
        for line in textwrap.wrap(source["passage"], _COLUMNS):
            yield f"    {line}"
