"""Training rows: which documents they hold, in which order, and the retrieval prompts."""

import json
import logging
import random
import re
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lola_vllm.training.distill import retrieval_facts
from lola_vllm.training.distill.data import DataError, RowOptions, TrainingRows, training_rows
from lola_vllm.training.distill.retrieval import RetrievalError, retrieval_row
from lola_vllm.training.distill.retrieval_facts import Exchange, HiddenFacts, draw_asked
from lola_vllm.training.distill.retrieval_words import SENTENCES
from lola_vllm.training.texts import SEPARATOR, TextsError, is_held_out

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"


def make_tokenizer(bos: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>" if bos else None
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def documents(name: str, count: int) -> list[str]:
    """Different documents of different lengths, about one in twenty of them held out."""
    return [f"{name}{at}: " + "the wind moves the leaves. " * (1 + at % 7) for at in range(count)]


def write_text(path: Path, texts: list[str]) -> Path:
    path.write_text(SEPARATOR.join(texts))
    return path


def write_jsonl(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n\n" for entry in entries))
    return path


def decoded(rows: TrainingRows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row) for row in rows.tokens]


# --- rows of text


def test_rows_are_the_shuffled_documents_without_held_out_ones(tmp_path, tokenizer):
    texts = documents("d", 200)
    path = write_text(tmp_path / "a.txt", texts)
    rows = training_rows([path], tokenizer, RowOptions(row_length=32, num_rows=60))
    assert rows.tokens.dtype == torch.int32
    assert rows.tokens.shape == rows.answers.shape == (60, 32)
    assert rows.answers.dtype == torch.bool and not rows.answers.any()

    stream = tokenizer.decode(rows.tokens.flatten())
    *whole, _ = stream.split("<eos>")  # the last one is cut off
    kept = [text.strip() for text in texts if not is_held_out(text)]
    assert len(kept) < len(texts)
    assert len(whole) == len(set(whole)) > 20
    assert set(whole) <= set(kept)
    assert whole != kept[: len(whole)]


def test_seed_decides_and_the_path_does_not(tmp_path, tokenizer):
    (tmp_path / "other").mkdir()
    one = write_text(tmp_path / "a.txt", documents("d", 100))
    two = write_text(tmp_path / "other" / "b", documents("d", 100))

    def rows(path: Path, seed: int, fraction: float = 0.5) -> TrainingRows:
        options = RowOptions(row_length=256, num_rows=8, seed=seed, retrieval_fraction=fraction)
        return training_rows([path], tokenizer, options)

    first, again, other = rows(one, 1), rows(two, 1), rows(one, 2)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.answers, again.answers)
    assert all((a != b).any() for a, b in zip(first.tokens, other.tokens, strict=True))


def test_sources_take_turns_until_one_is_used_up(tmp_path, tokenizer, caplog):
    def made_of(word: str, count: int) -> list[str]:
        return [f"{word} " * (40 + at % 7) for at in range(count)]

    directory = tmp_path / "texts"
    directory.mkdir()
    write_text(directory / "a.txt", made_of("aa", 30))
    write_text(directory / "b", made_of("bb", 300))
    (directory / "SOURCES.json").write_text("{}")
    (directory / ".hidden").write_text("hidden " * 100)
    other = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in made_of("cc", 300)])
    options = RowOptions(row_length=128, num_rows=90)
    rows = decoded(training_rows([directory, str(other)], tokenizer, options), tokenizer)
    turns = "".join(row.replace("<eos>", "").strip()[0] for row in rows)
    assert all(len(set(row.replace("<eos>", "").replace(" ", ""))) == 1 for row in rows)
    assert turns.startswith("abcabcabcabc")
    assert turns.rstrip("bc") == "abc" * (turns.count("a") - 1) + "a"
    assert turns.endswith("bcbcbcbcbc") and turns.count("a") < 30
    assert not caplog.records


def test_too_little_text_is_repeated_with_a_warning(tmp_path, tokenizer, caplog):
    texts = [text for text in documents("d", 12) if not is_held_out(text)]
    path = write_text(tmp_path / "a.txt", texts)
    with caplog.at_level(logging.WARNING):
        rows = training_rows([path], tokenizer, RowOptions(row_length=64, num_rows=40))
    *whole, _ = tokenizer.decode(rows.tokens.flatten()).split("<eos>")
    stripped = [text.strip() for text in texts]
    epochs = [whole[at : at + len(texts)] for at in range(0, len(whole), len(texts))]
    assert len(epochs) >= 3
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(stripped)
    assert epochs[0] != epochs[1]
    (record,) = caplog.records
    assert "have text for" in record.getMessage() and "to make 40 rows" in record.getMessage()


# --- chats and data sets


def test_jsonl_chats_go_through_the_template(tmp_path, tokenizer):
    chats = [
        {"messages": [{"role": "user", "content": f"say {at}"}, {"role": "bot", "content": "no"}]}
        for at in range(40)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*chats, {"messages": []}])
    rows = training_rows([path], tokenizer, RowOptions(row_length=64, num_rows=4))
    stream = tokenizer.decode(rows.tokens.flatten())
    parts = stream.split("<eos>")
    # The template ends a chat with the same token, so that no second one follows.
    assert parts[0].startswith("<user>say ") and parts[1] == "<bot>no"
    assert parts[2].startswith("<user>say ") and "" not in parts[:-1]


def refused(sources: list[Any], tokenizer: PreTrainedTokenizerFast, words: str) -> None:
    with pytest.raises((DataError, TextsError), match=words):
        training_rows(sources, tokenizer, RowOptions(row_length=16, num_rows=9))


@pytest.mark.parametrize(
    ("line", "message"),
    [("{no", r"a\.jsonl: no JSON lines"), ('{"text": [5]}', r"a\.jsonl: no JSON lines")],
)
def test_jsonl_errors_name_the_file(tmp_path, tokenizer, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    refused([path], tokenizer, message)


def test_chats_need_a_template_that_takes_them(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    refused([path], make_tokenizer(template=None), r"a\.jsonl, row 0: .* no chat template")
    refuses = make_tokenizer(template="{{ raise_exception('no such role') }}")
    refused([path], refuses, r"a\.jsonl, row 0: .* refuses it \(no such role")


@pytest.fixture
def hub(monkeypatch) -> Callable[[list[dict[str, Any]]], list[tuple[Any, ...]]]:
    """Put a data set where `load_dataset` finds it; returns the list of its calls."""
    import datasets

    def put(entries: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        calls = []

        def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
            calls.append((name, config, split))
            return datasets.Dataset.from_list(entries)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return put


def test_dataset_names(tokenizer, hub):
    options = RowOptions(row_length=32, num_rows=10)
    calls = hub([{"text": text, "id": 1} for text in documents("d", 100)])
    rows = training_rows(["owner/name:config", "name"], tokenizer, options)
    assert calls == [("owner/name", "config", "train"), ("name", None, "train")]
    assert all("the wind" in row for row in decoded(rows, tokenizer))

    hub([{"messages": [{"role": "user", "content": f"say {at}"}]} for at in range(20)])
    assert "<eos><user>say" in decoded(training_rows(["name"], tokenizer, options), tokenizer)[0]


def test_dataset_refusals(tokenizer, hub, monkeypatch):
    import datasets

    hub([{"prompt": "x", "id": 1}])
    refused(["name"], tokenizer, 'neither a "messages" nor a "text" column, but prompt, id')
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_dict({"text": []})
    )
    refused(["name"], tokenizer, "name: empty")

    def offline(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refused(["texts"], tokenizer, r"neither a file .* \(Couldn't reach it\); give a text")
    for name in ("none.txt", "none.jsonl", "no/such/directory", "/tmp/none here"):
        refused([name], tokenizer, f"{name}: no such file")


# --- refusals


def test_sources_without_text(tmp_path, tokenizer):
    refused([], tokenizer, "no source")
    held_out = [text for text in documents("d", 100) if is_held_out(text)]
    path = write_text(tmp_path / "a.txt", held_out)
    refused([path], tokenizer, rf"a\.txt: no text .* {len(held_out)} documents \(one in")
    for name, content, words in (
        ("e.txt", b" \n", r"e\.txt: no text in it"),
        ("e.jsonl", b"\n", r"e\.jsonl: "),
        ("a.pdf", b"x", r"a\.pdf: unknown format '\.pdf'; give text"),
    ):
        (tmp_path / name).write_bytes(content)
        refused([tmp_path / name], tokenizer, words)
    (tmp_path / "d").mkdir()
    refused([tmp_path / "d"], tokenizer, r"no \.txt or \.jsonl files in this directory")
    no_eos = make_tokenizer()
    no_eos.eos_token = None
    refused([tmp_path], no_eos, "no end-of-sequence token")


# --- retrieval prompts


def answer_runs(tokens: list[int], marks: list[bool], tokenizer: Any) -> list[tuple[int, str]]:
    """Where each run of answer tokens begins, and what it says."""
    runs: list[tuple[int, list[int]]] = []
    for at, (token, mark) in enumerate(zip(tokens, marks, strict=True)):
        if mark and (at == 0 or not marks[at - 1]):
            runs.append((at, []))
        if mark:
            runs[-1][1].append(token)
    return [(at, tokenizer.decode(run).strip()) for at, run in runs]


@pytest.mark.parametrize("length", [128, 700])
def test_answers_are_facts_from_further_up(tokenizer, length):
    depths, counts, chats, endings, kinds = [], set(), 0, [], set()
    prose = "Some day soon, they said! " + " ".join(f"Line number {at} ends." for at in range(5000))
    for seed in range(150):
        real_text = (lambda characters: prose[:characters]) if seed % 2 else None
        row = retrieval_row(tokenizer, length, random.Random(seed), real_text)
        assert len(row.tokens) == len(row.answers) <= length
        text = tokenizer.decode(row.tokens)
        runs = answer_runs(row.tokens, row.answers, tokenizer)
        assert runs
        for at, value in runs:
            before = tokenizer.decode(row.tokens[:at])
            assert value in before, (seed, value)
            depths.append(len(tokenizer(before[: before.index(value)]).input_ids) / at)
            kinds.add("digits" if value.isdigit() else "uuid" if value.count("-") == 4 else "words")
            assert not value.isdigit() or 4 <= len(value) <= 10
        counts.add(len(runs))
        chats += text.startswith("<user>")
        endings.append(len(row.tokens) / length)
        # The prompts that models are measured with stay unseen.
        assert "magic" not in text and "grass is green" not in text
    assert kinds == {"digits", "uuid", "words"}
    assert 50 <= chats <= 100
    assert sum(endings) / len(endings) > (0.95 if length > 500 else 0.85)
    if length > 500:
        assert {1, 2, 3, 4} <= counts <= set(range(1, 8))  # four questions, one for four values
        assert min(depths) < 0.1 and max(depths) > 0.8
        assert 0.3 < sum(depths) / len(depths) < 0.6


@pytest.mark.parametrize("fraction", [0.29, 1.0])
def test_share_of_retrieval_rows_is_exact_and_spread(tmp_path, tokenizer, fraction):
    path = write_text(tmp_path / "a.txt", documents("d", 300))
    options = RowOptions(row_length=256, num_rows=100, retrieval_fraction=fraction)
    rows = training_rows([path], tokenizer, options)
    marked = rows.answers.any(dim=1)
    assert marked.sum() == round(100 * fraction)
    assert all(abs(int(marked[:at].sum()) - fraction * at) <= 1 for at in range(100))
    # Behind the last answer comes the end, and then other text up to the end of the row.
    texts = decoded(rows, tokenizer)
    after = [text.rpartition("<eos>")[2] for text, mark in zip(texts, marked, strict=True) if mark]
    assert sum("wind moves" in text for text in after) > 5
    held_out = {text.partition(":")[0] + ":" for text in documents("d", 300) if is_held_out(text)}
    names = {f"d{at}:" for at in range(300) if any(f" d{at}:" in text for text in texts)}
    assert names and not names & held_out


def test_retrieval_refusals(tmp_path):
    slow: Any = types.SimpleNamespace(is_fast=False)
    with pytest.raises(RetrievalError, match=r"need a fast tokenizer \(tokenizer\.json\)"):
        retrieval_row(slow, 256, random.Random(0))
    plain = make_tokenizer(template=None)
    with pytest.raises(RetrievalError, match="no retrieval prompt fits into 8 tokens"):
        retrieval_row(plain, 8, random.Random(0))
    path = write_text(tmp_path / "a.txt", documents("d", 30))
    options = RowOptions(row_length=256, num_rows=20, retrieval_fraction=1.0)
    assert training_rows([path], plain, options).answers.any(dim=1).all()
    for template in ("{{ raise_exception('system first') }}", "{{ messages[0].content }}"):
        with pytest.raises(DataError, match="chat template does not render a plain conversation"):
            training_rows([path], make_tokenizer(template=template), options)


def draw(form: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> HiddenFacts:
    monkeypatch.setattr(retrieval_facts, "FORMS", {form: 1.0})
    return draw_asked(random.Random(seed), is_chat=seed % 2 == 0, few=False)


def values_of(turn: Exchange) -> list[str]:
    return [turn.values[start:end] for start, end in turn.spans]


def last_number(text: str) -> str:
    return "".join(letter if letter.isdigit() else " " for letter in text).split()[-1]


def key_of(statement: str, said: str) -> str:
    """The key of a fact's sentence, which the question names."""
    for template in retrieval_facts._STATEMENTS:
        pattern = re.escape(template)
        for name in ("label", "key", "value"):
            pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>.+)")
        found = re.fullmatch(pattern, statement)
        if found and found["key"] in said:
            return found["key"]
    raise AssertionError(statement)


def test_a_chain_leads_from_its_number_to_each_of_its_names(monkeypatch):
    lengths, others = Counter[int](), 0
    for seed in range(300):
        asked = draw("chain", seed, monkeypatch)
        (turn,) = asked.turns
        names = values_of(turn)
        assert len(set(names)) == len(names)
        first, *further = [next(s for s in asked.statements if name in s) for name in names]
        number = last_number(first)
        assert number in turn.question + turn.answer
        for statement, name, before in zip(further, names[1:], names[:-1], strict=True):
            assert name in statement and before in statement and number not in statement
        places = [asked.statements.index(statement) for statement in (first, *further)]
        assert places == sorted(set(places)), (seed, asked)
        rest = [s for s in asked.statements if s not in (first, *further)]
        assert not any(number in statement for statement in rest)
        assert not any(name in statement for name in names for statement in rest)
        lengths[len(names)] += 1
        others += bool(rest)
    assert set(lengths) == {2, 3, 4, 5} and min(lengths.values()) > 30
    assert 100 < others < 200


def test_several_keys_have_one_answer_in_the_order_of_the_question(monkeypatch):
    counts = Counter[int]()
    for seed in range(200):
        asked = draw("several keys", seed, monkeypatch)
        (turn,) = asked.turns
        said = turn.question + turn.answer
        places = [
            said.index(key_of(next(s for s in asked.statements if value in s), said))
            for value in values_of(turn)
        ]
        assert places == sorted(set(places)), (seed, asked)
        counts[len(places)] += 1
    assert set(counts) == {2, 3, 4} and counts[4] > 20
