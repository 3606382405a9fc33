"""Training rows: texts, chats and synthetic retrieval prompts as token ids of one length."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lola_vllm.training.distill.retrieval import MIN_LENGTH, RetrievalError, retrieval_row
from lola_vllm.training.texts import is_held_out, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_SUFFIXES = ("", ".txt")
_CHAT_SUFFIXES = (".jsonl",)
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """A source of training data cannot be used, or an option is out of range."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What training rows to make.

    Attributes:
        row_length: tokens of a row.
        num_rows: how many rows.
        seed: of the order of documents and of the retrieval prompts.
        retrieval_fraction: share of rows that are synthetic retrieval prompts, from 0 to 1.

    Raises:
        DataError: a value out of range.
    """

    row_length: int
    num_rows: int
    seed: int = 0
    retrieval_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise DataError(f"num_rows = {self.num_rows}: must be at least 1")
        if not 0 <= self.retrieval_fraction <= 1:
            raise DataError(f"retrieval_fraction = {self.retrieval_fraction}: must be from 0 to 1")
        least = MIN_LENGTH if self.retrieval_fraction else 2
        if self.row_length < least:
            also = " for retrieval prompts" if self.retrieval_fraction else ""
            raise DataError(f"row_length = {self.row_length}: must be at least {least}{also}")


class TrainingRows(NamedTuple):
    """Training rows.

    Attributes:
        tokens: int32 [num_rows, row_length], token ids.
        answers: bool [num_rows, row_length], true for the tokens that spell the answers of
            synthetic retrieval prompts.
    """

    tokens: Tensor
    answers: Tensor


@dataclass(frozen=True)
class _Source:
    """Documents by number. A document is its text, or None if it is not to be trained on."""

    name: str
    count: int
    document: Callable[[int], str | None]
    is_chat: Callable[[int], bool]


def training_rows(
    sources: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, options: RowOptions
) -> TrainingRows:
    """Turn sources into rows of token ids.

    Documents of a source are shuffled, joined with the end-of-sequence token and cut into rows.
    Rows are taken from the sources interleaved until one is used up. Documents that
    `texts.is_held_out` keeps for measuring are left out. If all sources together are too
    small, they are repeated in another order, with a warning. Retrieval prompts are spread evenly
    among the rows.

    Args:
        sources: each a text file (`.txt` or no suffix), a `.jsonl` file whose lines have "messages"
            or "text", a directory of such files (each of which takes its own turns), or the name
            of a Hugging Face data set, `name` or `name:config`, with a "messages" or "text" column.
        tokenizer: the model's; chats go through its chat template.
        options: number and length of rows, seed, and the share of retrieval prompts.

    Returns:
        The rows; the same ones for the same arguments.

    Raises:
        DataError: a source that does not exist, is empty, or is of an unknown format; a tokenizer
            without what the data need.
        TextsError: a text file that is not UTF-8, or has nothing in it.
    """
    if not sources:
        raise DataError("no source of training data given")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token to put between documents")
    opened = [part for source in sources for part in _open(source, tokenizer)]
    streams = [_Stream(part, tokenizer, options, at) for at, part in enumerate(opened)]
    texts = _take_turns(streams, options)
    tokens = torch.empty(options.num_rows, options.row_length, dtype=torch.int32)
    answers = torch.zeros(options.num_rows, options.row_length, dtype=torch.bool)
    fraction = options.retrieval_fraction
    for at in range(options.num_rows):
        # A small addition, because the product may be below a whole number by a rounding error.
        if int((at + 1) * fraction + 1e-6) > int(at * fraction + 1e-6):
            rng = random.Random(f"{options.seed} retrieval {at}")
            ids, marks = _retrieval(opened, tokenizer, options.row_length, rng)
            answers[at] = torch.tensor(marks)
        else:
            ids = next(texts)
        tokens[at] = torch.tensor(ids, dtype=torch.int32)
    return TrainingRows(tokens, answers)


# --- rows of text


class _Stream:
    """The rows of one source, epoch by epoch."""

    def __init__(
        self,
        source: _Source,
        tokenizer: PreTrainedTokenizerBase,
        options: RowOptions,
        number: int,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._length = options.row_length
        # By number, not by name, so that the rows do not depend on the path.
        self._rng = random.Random(f"{options.seed} source {number}")
        # If the model expects a first token, every row has it, because attention is drawn to it.
        self._start = start_tokens(tokenizer)
        self._rest: list[int] = []  # tokens left over from the last row

    def epoch(self) -> Iterator[list[int]]:
        """The rows of every document once; the tokens left over begin the next epoch.

        Raises:
            DataError: no document has any text.
        """
        order = list(range(self._source.count))
        self._rng.shuffle(order)
        found = False
        body = self._length - len(self._start)
        for number in order:
            document = self._source.document(number)
            if document is None:
                continue
            found = True
            ids = _token_ids(self._tokenizer, document)
            if not ids or ids[-1] != self._tokenizer.eos_token_id:
                ids.append(self._tokenizer.eos_token_id)
            self._rest += ids
            for at in range(0, len(self._rest) - body + 1, body):
                yield self._start + self._rest[at : at + body]
            self._rest = self._rest[len(self._rest) // body * body :]
        if not found:
            raise DataError(
                f"{self._source.name}: no text to train on in its {self._source.count} documents "
                "(one in twenty is held out for measuring)"
            )


def _take_turns(streams: Sequence[_Stream], options: RowOptions) -> Iterator[list[int]]:
    """Rows without end, one from each source, interleaved, while it lasts."""
    rows, warned = 0, False
    while True:
        epochs = [stream.epoch() for stream in streams]
        while epochs:
            for epoch in list(epochs):
                row = next(epoch, None)
                if row is None:
                    epochs.remove(epoch)
                else:
                    rows += 1
                    yield row
        if not warned:
            warned = True
            logger.warning(
                "the sources have text for %d rows of %d tokens only: repeating it in another "
                "order to make %d rows; add sources, or ask for fewer rows",
                *(rows, options.row_length, options.num_rows),
            )


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text."""
    ids = list(tokenizer("a")["input_ids"])
    return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose: a document may be longer than the model's context, and is cut
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# --- rows of retrieval prompts


def _retrieval(
    sources: Sequence[_Source],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rng: random.Random,
) -> tuple[list[int], list[bool]]:
    real_text = _text_drawer(sources, rng)
    try:
        ids, marks = retrieval_row(tokenizer, length, rng, real_text)
        if len(ids) < length and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        while len(ids) < length:
            if real_text is None:
                more = retrieval_row(tokenizer, length, rng).tokens
            else:
                more = _token_ids(tokenizer, real_text(8 * (length - len(ids))))
            ids += more[: length - len(ids)]
    except RetrievalError as error:
        raise DataError(str(error)) from error
    return ids, marks + [False] * (length - len(marks))


def _text_drawer(sources: Sequence[_Source], rng: random.Random) -> Callable[[int], str] | None:
    """A function that draws so many characters of text; None if there are only chats."""

    def draw() -> str | None:
        source = rng.choice(sources)
        number = rng.randrange(source.count)
        return None if source.is_chat(number) else source.document(number)

    # Most documents are neither held out nor chats, or nearly all are.
    if all(draw() is None for _ in range(100)):
        return None

    def real_text(characters: int) -> str:
        text = ""
        while len(text) < characters:
            document = draw()
            if document is None:
                continue
            # From a random place, because every haystack would otherwise start with a title.
            skip = rng.randrange(max(1, len(document) - characters + 1))
            begin = document.find(" ", skip) + 1 if skip else 0
            text += document[begin : begin + characters] + "\n\n"
        return text

    return real_text


# --- sources


def _open(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[_Source]:
    path = Path(source)
    if path.is_dir():
        suffixes = _TEXT_SUFFIXES + _CHAT_SUFFIXES
        files = [
            file
            for file in sorted(path.iterdir())
            if file.is_file() and file.suffix in suffixes and not file.name.startswith(".")
        ]
        if not files:
            raise DataError(f"{path}: no .txt or .jsonl files in this directory")
        return [_open_file(file, tokenizer) for file in files]
    if path.exists():
        return [_open_file(path, tokenizer)]
    return [_open_dataset(str(source), tokenizer)]


def _open_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> _Source:
    if path.suffix in _CHAT_SUFFIXES:
        return _open_jsonl(path, tokenizer)
    if path.suffix not in _TEXT_SUFFIXES:
        raise DataError(
            f"{path}: unknown format {path.suffix!r}; give text (.txt), or JSON lines (.jsonl) "
            'with "messages" or "text"'
        )
    documents = read_documents(path)
    return _Source(
        str(path), len(documents), lambda at: _for_training(documents[at]), lambda at: False
    )


def _for_training(text: str) -> str | None:
    return None if not text.strip() or is_held_out(text) else text


def _open_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase) -> _Source:
    try:
        return _of_dataset(str(path), tokenizer, "json", data_files=str(path))
    except _UnreadableError as error:
        raise DataError(f"{path}: no JSON lines of one form ({error})") from error


def _open_dataset(name: str, tokenizer: PreTrainedTokenizerBase) -> _Source:
    if not _DATASET.fullmatch(name) or Path(name).suffix in (".txt", *_CHAT_SUFFIXES):
        raise DataError(f"{name}: no such file or directory")
    dataset_name, _, config = name.partition(":")
    try:
        return _of_dataset(name, tokenizer, dataset_name, config or None)
    except _UnreadableError as error:
        raise DataError(
            f"{name}: neither a file here nor a data set that could be loaded ({error}); give a "
            "text file, a .jsonl file, a directory, or NAME or NAME:CONFIG of a data set"
        ) from error


class _UnreadableError(Exception):
    """What `datasets` says of a source that it cannot read."""


def _of_dataset(
    name: str, tokenizer: PreTrainedTokenizerBase, *args: Any, **options: Any
) -> _Source:
    try:
        import datasets

        dataset = datasets.load_dataset(*args, **options, split="train")
    except ImportError as error:
        raise DataError(f"{name}: needs `pip install 'lola-vllm[distill]'` ({error})") from error
    except Exception as error:  # many libraries may raise: hub, file formats, network
        raise _UnreadableError(str(error).strip().partition("\n")[0]) from error
    columns = list(dataset.column_names)
    if "messages" not in columns and "text" not in columns:
        raise DataError(
            f'{name}: has neither a "messages" nor a "text" column, but {", ".join(columns)}'
        )
    if len(dataset) == 0:
        raise DataError(f"{name}: empty")
    return _Source(
        name,
        len(dataset),
        lambda at: _entry_text(dataset[at], tokenizer, f"{name}, row {at}"),
        lambda at: dataset[at].get("messages") is not None,
    )


def _entry_text(
    entry: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> str | None:
    messages = entry.get("messages")
    if messages is not None:
        if tokenizer.chat_template is None:
            raise DataError(
                f'{where}: has "messages", but the tokenizer has no chat template; give "text", or '
                "a tokenizer with a template"
            )
        try:
            return (
                str(tokenizer.apply_chat_template(messages, tokenize=False)) if messages else None
            )
        except Exception as error:  # raised by Jinja or by the template itself
            raise DataError(f"{where}: the chat template refuses it ({error})") from error
    return _for_training(entry.get("text") or "")
