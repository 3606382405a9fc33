"""Files of texts: documents, cutting, and the held-out split."""

import random

import pytest

from lola_vllm.training.texts import (
    SEPARATOR,
    TextsError,
    cut_document,
    is_held_out,
    read_documents,
)


def prose(words: int, seed: int, paragraph: int = 40) -> str:
    """Text of random words, so that no two phrases are alike."""
    rng = random.Random(seed)
    found = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(words)]
    return "\n\n".join(" ".join(found[at : at + paragraph]) for at in range(0, words, paragraph))


def test_cut_document_at_paragraphs_into_equal_pieces():
    document = prose(10_000, 0)
    pieces = cut_document(document)
    assert len(pieces) == 3
    assert "\n\n".join(pieces) == document
    assert all(3200 <= len(piece.split()) <= 3440 for piece in pieces)
    assert cut_document(prose(3900, 0)) == [prose(3900, 0)]
    assert cut_document("one " * 9000) == [("one " * 9000).strip()]  # nowhere to cut
    assert cut_document("  \n\n ") == []


def test_held_out_share_and_stability():
    documents = [f"Document number {number}" for number in range(20_000)]
    held_out = [document for document in documents if is_held_out(document)]
    assert 900 <= len(held_out) <= 1100
    assert all(is_held_out(f"\n {document}\n\n") for document in held_out)
    # A change here would move documents that models were trained on into the measured set.
    assert held_out[:3] == [f"Document number {number}" for number in (6, 22, 34)]


def test_read_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"one\n\ntwo{SEPARATOR}three{SEPARATOR} \n")
    assert read_documents(path) == ["one\n\ntwo", "three"]
    path.write_text(prose(9000, 0))
    assert read_documents(str(path)) == cut_document(prose(9000, 0))
    path.write_text("\n\0\n")
    with pytest.raises(TextsError, match="no text in it"):
        read_documents(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TextsError, match="not UTF-8"):
        read_documents(path)
    with pytest.raises(TextsError, match=r"none\.txt: cannot be read \(No such file"):
        read_documents(tmp_path / "none.txt")
