"""Libraries' parts by their words."""

import asyncio

from lola_vllm.serving.library import words as words_module
from lola_vllm.serving.library.asking import asked_with, with_passages
from lola_vllm.serving.library.words import KnownPart, LibraryWords

TEXTS = ["The pump starts at noon.", "Netherby lost an ear.", "The pump is painted blue."]


class Texts:
    """Reads the texts of parts, and notes which."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, new: list[KnownPart]) -> list[str]:
        self.asked += [part.session for part in new]
        return [TEXTS[int(part.session)] for part in new]


def parts(*numbers: int) -> list[KnownPart]:
    return [KnownPart(f"{i}.txt", 1, 1, str(i), f"id{i}", 9) for i in numbers]


def find(
    words: LibraryWords, read: Texts, of: list[KnownPart], question: str, library: str = "shelf"
) -> list[int]:
    found = asyncio.run(words.find(None, library, of, question, 3, read))
    return [index for index, _ in found]


def test_texts_are_read_once_and_again_where_documents_change():
    words, read = LibraryWords(), Texts()
    assert find(words, read, parts(0, 1), "What did Netherby lose?") == [1]
    assert find(words, read, parts(0, 1), "When does the pump start?")[0] == 0
    assert read.asked == ["0", "1"]
    assert find(words, read, parts(0, 2), "Which pump is blue?")[0] == 1
    assert read.asked == ["0", "1", "2"]  # and nothing is found of what is gone
    assert find(words, read, parts(0, 2), "Netherby") == []
    words.forget(None, "shelf")
    find(words, read, parts(0), "pump")
    assert read.asked == ["0", "1", "2", "0"]


def test_what_is_held_has_a_bound(monkeypatch):
    monkeypatch.setattr(words_module, "MAX_TOKENS", 18)
    words, read = LibraryWords(), Texts()
    assert find(words, read, parts(0, 1, 2), "pump") == [] and not read.asked
    find(words, read, parts(0, 1), "pump")
    find(words, read, parts(2), "pump", "other")
    find(words, read, parts(0, 1), "pump")
    assert read.asked == ["0", "1", "2", "0", "1"]


def test_passages_stand_before_the_question():
    before = with_passages(
        [{"document": "a.md", "passage": "One."}, {"document": "b.md", "passage": ""},
         {"document": "c.md", "passage": "Three."}]
    )  # fmt: skip
    assert before == "c.md: Three.\n\na.md: One."
    first = {"role": "user", "content": "So."}
    (_, last) = asked_with([first, {"role": "user", "content": "Why?"}], before)
    assert last["content"] == f"{before}\n\nWhy?"
    listed = [{"type": "text", "text": "Why?"}]
    (last,) = asked_with([{"role": "user", "content": listed}], before)
    assert [part["text"] for part in last["content"]] == [before, "Why?"]
    assert asked_with([first], "") == [first]
