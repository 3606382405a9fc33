"""RULER's tasks of aggregation (arXiv 2404.06654): words that a text has most often.

The sentences are word for word as published. RULER draws the words of a list from a package of
English words; here they are those of the held-out prose.
"""

from __future__ import annotations

import math
import random
import string

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.question import Draft, Prose, Question, RealText

COMMON_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_ANSWER = "Answer: The top 10 words that appear most often in the list are:"
COMMON_WORDS = 10
# Of a common word and of another one, in the list and in the solved example, whose words are so
# many. Prompts below 4,096 tokens have the short form.
SHORT_FORM = (6, 1), (3, 1), 20
LONG_FORM = (30, 3), (10, 3), 40
LONG_FROM = 4096
COMMON_ROOM = 120  # RULER's

FREQUENT_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
FREQUENT_ANSWER = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
LETTERS = 6  # of a coded word
TOKENS_PER_CODE = 50  # of the prompt, for a word of the vocabulary
NOISE_WORD = "..."  # the most frequent, which is not asked for
FREQUENT_ROOM = 50  # RULER's
# Words of a text in which the third is more frequent than the fourth, by the rounded counts.
LEAST_FREQUENT = 60


def draw_common_words(
    rng: random.Random, depth: float, length: int, text: RealText | None
) -> Draft:
    """Draw a list in which ten words stand more often than the others; see `Draw`.

    A unit is a word of the list's vocabulary. `depth` has no meaning here.
    """
    assert isinstance(text, Prose)
    words = text.words()
    (common, other), example_times, example_size = LONG_FORM if length >= LONG_FROM else SHORT_FORM
    seed = rng.random()
    example = common_example(random.Random(rng.random()), words, example_times, example_size)

    def draft(units: int) -> Question:
        chosen, listed = common_list(random.Random(seed), words, common, other, units)
        return common_question(listed, chosen, example=example)

    return draft


def common_list(
    rng: random.Random, words: list[str], common: int, other: int, size: int
) -> tuple[list[str], list[str]]:
    """The ten common words, and all words of a list in its order.

    Args:
        words: to draw from. common, other: times that a common word and another one stand there.
        size: different words.

    Raises:
        EvalError: there are not so many words.
    """
    if size > len(words):
        raise EvalError(
            f"--tasks cwe: a list of {size} different words, and the held-out prose has "
            f"{len(words)}; give more --texts, or ask for shorter prompts"
        )
    drawn = rng.sample(words, size)
    chosen = drawn[:COMMON_WORDS]
    listed = chosen * common + drawn[COMMON_WORDS:] * other
    rng.shuffle(listed)
    return chosen, listed


def numbered(words: list[str]) -> str:
    """ "1. one 2. two", as lists and answers have it."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def common_question(listed: list[str], common: list[str], *, example: str = "") -> Question:
    """The question for the most common words of a list, after a solved `example`."""
    return Question(
        text=example + COMMON_PROMPT.format(context=numbered(listed)),
        answer_prefix=COMMON_ANSWER,
        expected=tuple(common),
        depth=0.0,
    )


def common_example(rng: random.Random, words: list[str], times: tuple[int, int], size: int) -> str:
    """A question with its answer and the line's end after it."""
    chosen, listed = common_list(rng, words, *times, size)
    question = common_question(listed, chosen)
    return f"{question.text} {question.answer_prefix}{numbered(chosen)}\n"


def draw_frequent_words(
    rng: random.Random, depth: float, length: int, text: RealText | None
) -> Draft:
    """Draw a text of coded words whose frequencies fall as 1 / rank squared; see `Draw`.

    A unit is a word of the text. `depth` has no meaning here.
    """
    size = max(8, length // TOKENS_PER_CODE)
    codes: list[str] = []
    while len(codes) < size:
        code = "".join(rng.choices(string.ascii_lowercase, k=LETTERS))
        if code not in codes:
            codes.append(code)
    vocabulary = [NOISE_WORD, *codes[1:]]
    seed = rng.random()

    def draft(units: int) -> Question:
        text = coded_text(vocabulary, units)
        random.Random(seed).shuffle(text)
        return frequent_question(text, vocabulary)

    return draft


def coded_text(vocabulary: list[str], size: int) -> list[str]:
    """Words of a text in the order of their rank, each `size / (zeta(2) rank^2)` times, rounded
    down."""
    zeta = math.pi**2 / 6
    return [
        word
        for rank, word in enumerate(vocabulary, 1)
        for _ in range(int(size * rank**-2.0 / zeta))
    ]


def frequent_question(text: list[str], vocabulary: list[str]) -> Question:
    """The question for the second to the fourth word of a vocabulary in the order of ranks."""
    return Question(
        text=FREQUENT_PROMPT.format(context=" ".join(text)),
        answer_prefix=FREQUENT_ANSWER,
        expected=tuple(vocabulary[1:4]),
        depth=0.0,
    )
