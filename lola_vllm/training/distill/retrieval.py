"""Synthetic retrieval prompts: facts hidden in a long text, then questions with their answers.

Ordinary text seldom asks for a detail from a thousand tokens ago. These prompts do so at every
depth and in many wordings. They do not use the sentences that long-context benchmarks such as RULER
hide, so that these benchmarks still measure recall and not training. `retrieval_facts.py` has what
is hidden and asked for.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lola_vllm.training.distill.retrieval_facts import Exchange, draw_asked
from lola_vllm.training.distill.retrieval_words import SENTENCES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_LENGTH = 128  # tokens that always have room for one fact and one question
_TRIES = 50
_INTRODUCTIONS = (
    "",
    "",
    "Read the text below. Some details in it matter later.\n\n",
    "A few facts are hidden in this text. Keep them in mind; there will be questions.\n\n",
    "Below is a long text. Answer the questions at its end from what it says.\n\n",
    "Memorize every {label} in the following text.\n\n",
    "Text:\n",
)


class RetrievalError(ValueError):
    """The tokenizer or its chat template cannot make retrieval prompts."""


class RetrievalRow(NamedTuple):
    """Token ids of a prompt with its answers, and which tokens spell the answered values."""

    tokens: list[int]
    answers: list[bool]


class _AnsweredText(NamedTuple):
    """A prompt, and where in it the answered values are, as (start, end) in characters."""

    text: str
    answers: list[tuple[int, int]]
    is_chat: bool


def retrieval_row(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rng: random.Random,
    real_text: Callable[[int], str] | None = None,
) -> RetrievalRow:
    """Make one prompt that nearly fills a row.

    Args:
        tokenizer: a fast one, for the positions of its tokens; half of the prompts are chats if it
            has a chat template.
        length: at most so many tokens, at least `MIN_LENGTH`.
        rng: the only source of randomness; equal states give equal rows.
        real_text: returns about the given number of characters of ordinary text, to hide facts in.
            Without it all haystacks are simple sentences.

    Returns:
        Between one and `length` tokens, seldom many fewer. The last answer is near the end.

    Raises:
        RetrievalError: no fast tokenizer, a chat template that fails, or a tokenizer that spends
            so many tokens on a short text that no prompt fits.
    """
    if not tokenizer.is_fast:
        raise RetrievalError(
            f"{type(tokenizer).__name__} does not tell where its tokens are; retrieval prompts "
            "need a fast tokenizer (tokenizer.json), or set retrieval_fraction to 0"
        )
    for attempt in range(_TRIES):
        frame = _draw_frame(tokenizer, rng, few=length < 2 * MIN_LENGTH or attempt > 0)
        row = _fit(tokenizer, length, frame, _haystack(rng, length, real_text), rng)
        if row is not None:
            return row
    raise RetrievalError(f"no retrieval prompt fits into {length} tokens; use longer rows")


# --- haystacks


def _haystack(rng: random.Random, length: int, real_text: Callable[[int], str] | None) -> list[str]:
    """Sentences with the white space behind them, more than `length` tokens of them."""
    kind = rng.choice(("real", "real", "loop", "shuffled") if real_text else ("loop", "shuffled"))
    if kind == "real" and real_text is not None:
        text = real_text(8 * length)
        return re.findall(r"\S.*?(?:[.!?][\"'\u201d\u2019)]*\s+|\n\s*\n|$)", text, flags=re.DOTALL)
    space = rng.choice((" ", " ", "\n"))
    # A sentence has at least four tokens, whatever the tokenizer.
    if kind == "loop":
        loop = rng.sample(SENTENCES, rng.randint(3, 6))
        return [sentence + space for sentence in loop * (length // 4 // len(loop) + 1)]
    return [rng.choice(SENTENCES) + space for _ in range(length // 4 + 1)]


# --- prompts


class _Frame(NamedTuple):
    """A prompt without its haystack: how it begins, facts as sentences, and what comes after."""

    finish: Callable[[str], _AnsweredText]
    statements: list[str]


def _draw_frame(tokenizer: PreTrainedTokenizerBase, rng: random.Random, few: bool) -> _Frame:
    is_chat = tokenizer.chat_template is not None and rng.random() < 0.5
    label, statements, turns = draw_asked(rng, is_chat=is_chat, few=few)
    introduction = rng.choice(_INTRODUCTIONS).format(label=label)
    if is_chat:
        return _Frame(lambda text: _chat(tokenizer, introduction + text, turns), statements)
    gap = rng.choice(("\n", "\n\n"))
    return _Frame(lambda text: _plain(introduction + text, turns, gap), statements)


def _plain(text: str, turns: list[Exchange], gap: str) -> _AnsweredText:
    text, spans = text.rstrip() + "\n\n", []
    for question, lead, values, parts in turns:
        text += question + lead
        spans += [(len(text) + start, len(text) + end) for start, end in parts]
        text += values + gap
    return _AnsweredText(text.rstrip(), spans, False)


def _chat(tokenizer: PreTrainedTokenizerBase, text: str, turns: list[Exchange]) -> _AnsweredText:
    messages = []
    for at, (question, answer, values, _) in enumerate(turns):
        asked = question if at else f"{text.strip()}\n\n{question}"
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer.format(value=values)})
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
        spans, at = [], 0
        for question, answer, values, parts in turns:
            at = rendered.index(answer.format(value=values), rendered.index(question, at))
            at += answer.index("{value}")
            spans += [(at + start, at + end) for start, end in parts]
    except Exception as error:  # raised by Jinja or by the template itself
        raise RetrievalError(
            f"the chat template does not render a plain conversation ({error}); "
            "set retrieval_fraction to 0"
        ) from error
    return _AnsweredText(rendered, spans, True)


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    frame: _Frame,
    haystack: list[str],
    rng: random.Random,
) -> RetrievalRow | None:
    """As much of the haystack as fits, with facts at random depths; None if nothing fits."""
    depths = sorted(rng.random() for _ in frame.statements)
    ends = _sentence_ends(tokenizer, haystack)
    room = length - len(_encode(tokenizer, frame.finish(" ".join(frame.statements)))[0])
    while room >= 0:
        count = bisect_right(ends, room)
        sentences = haystack[:count]
        # From the back, so that an insertion does not move the next one's place.
        for depth, statement in sorted(zip(depths, frame.statements, strict=True), reverse=True):
            at = round(depth * count)
            space = "\n" if at and sentences[at - 1].endswith("\n") else " "
            sentences.insert(at, statement + space)
        prompt = frame.finish("".join(sentences))
        tokens, offsets = _encode(tokenizer, prompt)
        if len(tokens) <= length:
            marks = [
                any(start < last and end > first for first, last in prompt.answers)
                for start, end in offsets
            ]
            return RetrievalRow(tokens, marks)
        if count == 0:
            return None
        # Tokens differ a little where sentences meet facts.
        room = min(room - (len(tokens) - length), ends[count - 1] - 1)
    return None


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: _AnsweredText
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their places; a chat template writes its special tokens itself."""
    encoding = tokenizer(
        prompt.text,
        add_special_tokens=not prompt.is_chat,
        return_offsets_mapping=True,
        verbose=False,
    )
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _sentence_ends(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[int]:
    """How many tokens the first one, two, three ... sentences have together."""
    text = _AnsweredText("".join(sentences), [], True)
    starts = [start for start, _ in _encode(tokenizer, text)[1]]
    ends, characters = [], 0
    for sentence in sentences:
        characters += len(sentence)
        ends.append(bisect_right(starts, characters - 1))
    return ends
