"""Whether a model in a long conversation still knows what was said so many tokens ago.

A conversation is held-out documentation in the model's chat template: the assistant says it, and
the user asks it to go on. In passing the user says something (`facts.py`), and asks for it at
the end. Every question is asked from the same state, so no question changes the next one.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.facts import CHAT_FORMS, Fact
from lola_vllm.evaluation.held_out import read_kinds
from lola_vllm.evaluation.models import Prediction, Stop, Tokenizer
from lola_vllm.evaluation.recall import RecallRows
from lola_vllm.evaluation.results import Row

if TYPE_CHECKING:
    from lola_vllm.evaluation.reader import Reader

# What the user of a conversation says: nothing that the documents contain, and nothing to recall.
ASKS = ("Please go on.", "What else is there to know?", "Tell me more.", "And then?", "Next?")
PAUSE_TOKENS = 60  # from where one task asks to where the next does
SPACE = 250  # tokens: the least distance, and the least difference of two
TURN_TOKENS = 120  # of an answer, where nothing else ends it
LEAST_TOKENS = 8  # of an answer
ROOM = 160  # tokens for a question with its answer, and what a conversation is longer than planned
LENGTHS = [2000, 7000]
DISTANCES = [250, 500, 1000, 2000, 4000]


@dataclass(frozen=True)
class ChatPlan(RecallRows):
    """The conversations that every setting reads.

    A cell is a task, a length and a distance.

    Attributes:
        tasks: of `CHAT_FORMS`. lengths: tokens of a conversation. distances: tokens from what was
            said to the end of the conversation; one is asked for those that it holds.
        texts: as `read_held_out` takes them, with documentation. samples: conversations of each
            length. seed: of all choices.
    """

    name: ClassVar[str] = "chat"
    keys: ClassVar[tuple[str, ...]] = ("length", "index")
    read_in_pieces: ClassVar[bool] = True

    tasks: list[str]
    lengths: list[int]
    distances: list[int]
    texts: str | None
    samples: int = 50
    seed: int = 0

    @property
    def max_length(self) -> int:
        return max(self.lengths) + ROOM

    def distances_in(self, length: int) -> list[int]:
        """The distances that conversations of `length` tokens are asked for."""
        before = PAUSE_TOKENS * len(self.tasks) + SPACE
        return [distance for distance in sorted(self.distances) if distance + before <= length]

    def check(self) -> None:
        others = [task for task in self.tasks if task not in CHAT_FORMS]
        if others:
            raise EvalError(
                f"--tasks {', '.join(others)}: the tasks of conversations are "
                f"{', '.join(CHAT_FORMS)}, which share their text; give others a call of their own"
            )
        if self.texts is None:
            raise EvalError(f"--tasks {self.tasks[0]}: needs real text; give --texts")
        distances = [0, *sorted(self.distances)]
        for before, distance in itertools.pairwise(distances):
            if distance - before < SPACE:
                raise EvalError(
                    f"--distances {distance}: must be at least {SPACE} more than {before}, as what "
                    "users say would else stand side by side"
                )
        for length in self.lengths:
            if not self.distances_in(length):
                least = distances[1] + PAUSE_TOKENS * len(self.tasks) + SPACE
                raise EvalError(
                    f"--lengths {length}: holds none of the --distances "
                    f"{', '.join(map(str, self.distances))}; a conversation for {distances[1]} has "
                    f"at least {least} tokens"
                )

    def run(self, model: Reader, done: Collection[tuple[Any, ...]] = ()) -> Iterator[list[Row]]:
        """Let `model` read all conversations, short ones first; see `Plan`."""
        files = read_kinds(Path(str(self.texts)), ["documentation"])["documentation"]
        documents = [document for of_file in files.values() for document in of_file]
        for length in sorted(self.lengths):
            for index in range(self.samples):
                if (length, index) in done:
                    continue
                chat = self.chat(model.tokenizer, documents, length, index)
                answers = model.ask(chat.ids, chat.pauses)
                flat = [answer for of_pause in answers for answer in of_pause.read]
                yield [
                    _row(asked, answer, length, index, len(chat.ids))
                    for asked, answer in zip(chat.asked, flat, strict=True)
                ]

    def chat(self, tokenizer: Tokenizer, documents: list[str], length: int, index: int) -> Chat:
        """A conversation, the same for every model of a tokenizer.

        Args:
            tokenizer: the model's. documents: that the assistant says. length: tokens, as near as
                whole words come. index: of the conversation among those of its length.

        Raises:
            EvalError: too few documents.
        """
        rng = random.Random(f"{self.seed}/chat/{length}/{index}")
        distances = self.distances_in(length)
        # Each task asks last in as many conversations as the others.
        tasks = [self.tasks[(index + i) % len(self.tasks)] for i in range(len(self.tasks))]
        facts = {task: _draw(task, len(distances), rng) for task in tasks}
        marks: list[tuple[int, Fact | None]] = []
        for number, task in enumerate(tasks):
            end = length - PAUSE_TOKENS * number
            marks.append((end, None))
            marks += [(end - d, fact) for d, fact in zip(distances, facts[task], strict=True)]
        talk = _Talk(tokenizer, _words(tokenizer, documents, rng), rng)
        ends = []
        for place, fact in sorted(marks, key=lambda mark: mark[0]):
            if fact is None:
                talk.go_on(place)
                ends.append(len(talk.messages))
            else:
                talk.say(fact.sentence, place)
        text = tokenizer.conversation(talk.messages, begun=False)
        said = _ends(text, talk.messages)
        ids: list[int] = []
        pauses, asked, at = [], [], 0
        for task, count in zip(reversed(tasks), ends, strict=True):
            end = said[count - 1]
            ids += tokenizer.encode(text[at:end], special=False)
            at = end
            pauses.append(Stop(len(ids), [_question(tokenizer, fact) for fact in facts[task]]))
            for distance, fact in zip(distances, facts[task], strict=True):
                start = text.index(fact.sentence) + fact.sentence.rindex(fact.answer)
                back = len(tokenizer.encode(text[start:end], special=False))
                asked.append(Asked(task, distance, back, fact))
        return Chat(ids, pauses, asked)


class Asked(NamedTuple):
    """A question of a conversation.

    Attributes:
        task: its name. aim: the distance that was asked for. distance: tokens from the answer in
            what was said to the end of the conversation. fact: what was said.
    """

    task: str
    aim: int
    distance: int
    fact: Fact


class Chat(NamedTuple):
    """A conversation.

    Attributes:
        ids: up to its last pause. pauses: where the assistant has answered.
        asked: at all pauses, in their order.
    """

    ids: list[int]
    pauses: list[Stop]
    asked: list[Asked]


def _draw(task: str, count: int, rng: random.Random) -> list[Fact]:
    """`count` facts of different questions; the forms of the task take turns."""
    forms = list(CHAT_FORMS[task])
    rng.shuffle(forms)
    found: dict[str, Fact] = {}
    while len(found) < count:
        fact = forms[len(found) % len(forms)].draw(rng)
        found.setdefault(fact.question, fact)
    return list(found.values())


class _Talk:
    """A conversation that grows, and the tokens that it has.

    Args:
        tokenizer: counts. words: that the assistant says. rng: chooses what the user asks.
    """

    def __init__(
        self, tokenizer: Tokenizer, words: Iterator[tuple[str, int]], rng: random.Random
    ) -> None:
        self.messages: list[tuple[str, str]] = []
        self._tokenizer, self._words, self._rng = tokenizer, words, rng
        turn = [("user", ASKS[0]), ("assistant", ASKS[0])]
        one, two = (self._count(tokenizer.conversation(turn * n, begun=False)) for n in (1, 2))
        self._frame = two - one - 2 * self._count(ASKS[0])  # what the template writes around a turn
        self._at = one - (two - one)
        self._said = ""  # by the user, whose turn it is

    def say(self, sentence: str, place: int) -> None:
        """Go on, and let the user say `sentence` up to `place`, in tokens."""
        self._fill(place - self._count(sentence))
        self._said = f"{self._said} {sentence}".strip(" ")

    def go_on(self, place: int) -> None:
        """Go on up to `place`, which is the end of an answer."""
        self._fill(place)
        if self._said or not self.messages:
            self._turn(LEAST_TOKENS)

    def _fill(self, place: int) -> None:
        least = self._frame + self._count(ASKS[0]) + LEAST_TOKENS
        while (free := place - self._at - self._count(self._said)) >= least:
            self._turn(free if free < TURN_TOKENS + 2 * least else TURN_TOKENS + least)

    def _turn(self, tokens: int) -> None:
        """A turn of so many tokens, without what the user says in passing."""
        ask = self._rng.choice(ASKS)
        user = f"{self._said} {ask}".lstrip(" ") if self._said[-1:] != "\n" else self._said + ask
        tokens -= self._frame + self._count(ask)
        words, found = "", 0
        while found < max(tokens, LEAST_TOKENS):
            word, size = next(self._words)
            words, found = words + word, found + size
        words = words.strip()
        self.messages += [("user", user), ("assistant", words)]
        self._at += self._frame + self._count(user) + self._count(words)
        self._said = ""

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, special=False)) if text else 0


def _words(
    tokenizer: Tokenizer, documents: list[str], rng: random.Random
) -> Iterator[tuple[str, int]]:
    """Words of documents with the white space before them, from a random document on.

    Yields:
        A word and its tokens.

    Raises:
        EvalError: all were said.
    """
    first = rng.randrange(len(documents))
    for document in [*documents[first:], *documents[:first]]:
        for word in re.findall(r"\s*\S+", f"\n\n{document}"):
            yield word, len(tokenizer.encode(word, special=False))
    raise EvalError(
        "--lengths: the held-out documentation at --texts has not so many tokens; ask for shorter "
        "conversations or give more text"
    )


def _ends(text: str, messages: list[tuple[str, str]]) -> list[int]:
    """Where in a conversation's text the content of each message ends."""
    found, at = [], 0
    for _, content in messages:
        at = text.index(content, at) + len(content)
        found.append(at)
    return found


def _question(tokenizer: Tokenizer, fact: Fact) -> tuple[list[int], int]:
    """A question of a `Stop`: from the end of an answer to where the next one is begun."""
    mark = "Well"
    talk = [("user", ASKS[0]), ("assistant", mark), ("user", fact.question)]
    text = tokenizer.conversation(talk, begun=True)
    opened = tokenizer.encode(text.partition(mark)[2], special=False)
    space = "" if fact.begun.endswith('"') else " "
    begun = tokenizer.encode(fact.begun, special=False)
    whole = tokenizer.encode(fact.begun + space + fact.answer, special=False)
    # A tokenizer may join the end of what is begun with what follows.
    given = next((i for i, id in enumerate(begun) if whole[i] != id), len(begun))
    return opened + whole, len(whole) - given


def _row(asked: Asked, answer: list[Prediction], length: int, index: int, tokens: int) -> Row:
    """A question's line in the results."""
    first = [token.first for token in answer]
    return {
        "task": asked.task,
        "length": length,
        "aim": asked.aim,
        "index": index,
        "distance": asked.distance,
        "prompt_tokens": tokens,
        "question": asked.fact.question,
        "expected": [asked.fact.answer],
        "logprob": sum(token.logprob for token in answer),
        "exact": all(first),
        "match": float(all(first)),
    }
