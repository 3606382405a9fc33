"""The texts that `eval copy` lets models read: of several kinds, of given lengths, held out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import LocalTokenizer, prefix_of
from lola_vllm.evaluation.settings import read_held_out
from lola_vllm.training.texts import kind_of

CHAT, DOCUMENTATION = "chat", "documentation"
# What the user of a conversation says: nothing that the documents contain, and nothing to recall.
ASKS = ("Please go on.", "What else is there to know?", "Tell me more.", "And then?", "Next?")
AGAIN = "Please say that again, word for word."
TURN_WORDS = 80  # of an answer, at least, where its document has so many


class Text(NamedTuple):
    """What is read before passages of it are asked for.

    Attributes:
        kind: of text. source: file that it comes from. number: among those of its kind.
        ids: `prefix` and exactly as many tokens as its length says.
        prefix: number of leading ids that no document contains.
        bridge: tokens between the text and a passage that is begun again.
    """

    kind: str
    source: str
    number: int
    ids: list[int]
    prefix: int
    bridge: list[int]


@dataclass(frozen=True)
class Kinds:
    """Held-out documents by kind and file.

    Attributes:
        files: by kind of text, and of each file's name its documents.
    """

    files: dict[str, dict[str, list[str]]]

    @classmethod
    def read(cls, texts: Path, wanted: list[str], has_chat: bool = True) -> Kinds:
        """The documents at `texts`.

        Args:
            texts: a file or a directory, as `read_held_out` takes it.
            wanted: kinds or names of files; none: all kinds that there are.
            has_chat: whether conversations can be made, which come from documentation.

        Raises:
            EvalError: a kind that there is not, or nothing held out.
        """
        documents = read_held_out(texts)
        found: dict[str, dict[str, list[str]]] = {}
        for name, of_file in documents.items():
            found.setdefault(kind_of(name), {})[name] = of_file
        if has_chat and DOCUMENTATION in found:
            found[CHAT] = found[DOCUMENTATION]
        for kind in wanted:
            if kind in found:
                continue
            if kind not in documents:
                chat = " and a model with a chat template" if kind == CHAT else ""
                needs = f"{kind} needs {DOCUMENTATION}{chat}; " if kind == CHAT else ""
                raise EvalError(
                    f"--kinds {kind}: --texts {texts} has {', '.join(found)} in the files "
                    f"{', '.join(documents)}; {needs}give other texts"
                )
            found[kind] = {kind: documents[kind]}
        return cls({kind: found[kind] for kind in wanted or found})

    def texts(
        self, tokenizer: LocalTokenizer, kind: str, length: int, samples: int, seed: int
    ) -> Iterator[Text]:
        """Up to `samples` texts of `length` tokens that share none, the same for every model.

        Files of a kind take turns. A text is held-out documents one after the other, an empty line
        between them, and may begin and end amid a document.
        """
        rng = random.Random(f"{seed}/{kind}/{length}")
        if kind == CHAT:
            yield from self._chats(tokenizer, length, samples, rng)
            return
        prefix = prefix_of(tokenizer)
        bridge = tokenizer.encode("\n", special=False)
        of_file = []
        for name, documents in self.files[kind].items():
            ids = tokenizer.encode("\n\n".join(documents) + "\n\n", special=False)
            pieces = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
            rng.shuffle(pieces)
            of_file.append([(name, piece) for piece in pieces])
        rng.shuffle(of_file)
        for index, (name, piece) in enumerate(_in_turn(of_file)[:samples]):
            yield Text(kind, name, index, prefix + piece, len(prefix), bridge)

    def _chats(
        self, tokenizer: LocalTokenizer, length: int, samples: int, rng: random.Random
    ) -> Iterator[Text]:
        documents = [(n, d) for n, found in self.files[CHAT].items() for d in found]
        rng.shuffle(documents)
        index, bridge = 0, answer_to(tokenizer, AGAIN)
        messages: list[tuple[str, str]] = []
        source = ""
        for name, document in documents:
            source = source or name
            for turn in _turns(document):
                messages += [("user", rng.choice(ASKS)), ("assistant", turn)]
            text = tokenizer.conversation(messages, begun=False)
            ids = tokenizer.encode(text, special=False)
            if len(ids) >= length:
                yield Text(CHAT, source, index, ids[:length], 0, bridge)
                messages, source, index = [], "", index + 1
                if index == samples:
                    return


def _turns(document: str) -> Iterator[str]:
    """A document's paragraphs, some together where they are short."""
    turn: list[str] = []
    for paragraph in document.split("\n\n"):
        turn.append(paragraph)
        if sum(len(part.split()) for part in turn) >= TURN_WORDS:
            yield "\n\n".join(turn)
            turn = []
    if turn:
        yield "\n\n".join(turn)


def answer_to(tokenizer: LocalTokenizer, request: str) -> list[int]:
    """Tokens from where an answer is cut, a request after it, to where the next answer begins."""
    mark = "Well"
    talk = [("user", ASKS[0]), ("assistant", mark), ("user", request)]
    text = tokenizer.conversation(talk, begun=True)
    return tokenizer.encode(text.partition(mark)[2], special=False)


def _in_turn(parts: list[list[tuple[str, list[int]]]]) -> list[tuple[str, list[int]]]:
    """The first of each part, the second of each, and so on."""
    most = max(map(len, parts), default=0)
    return [part[i] for i in range(most) for part in parts if i < len(part)]
