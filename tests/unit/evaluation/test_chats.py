"""Conversations: where something is said, what is asked, and that nothing of it is trained on."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lola_vllm.command import cli
from lola_vllm.evaluation import EvalError, chat_facts, engine
from lola_vllm.evaluation.chat_facts import CHAT_TASKS
from lola_vllm.evaluation.chats import PAUSE_TOKENS, Chat, ChatPlan, Pause
from lola_vllm.evaluation.copy_texts import ASKS, CHAT, Kinds
from lola_vllm.evaluation.curves import distance_cells
from lola_vllm.evaluation.models import Prediction
from lola_vllm.evaluation.reader import Reader, load
from lola_vllm.evaluation.results import Record
from lola_vllm.evaluation.settings import Setting
from lola_vllm.training.distill import retrieval, retrieval_facts
from lola_vllm.training.distill.retrieval import retrieval_row
from lola_vllm.training.texts import SEPARATOR, is_held_out
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import random_prompts

END = "<end>"
TASKS = list(CHAT_TASKS)
DISTANCES = [250, 500, 1000]


class Words:
    """A model whose tokens are words. It knows what was said within `reach` tokens, and no more."""

    has_chat = True
    special: frozenset[int] = frozenset()

    def __init__(self, reach: int = 0) -> None:
        self.tokenizer, self.reach, self.read = self, reach, 0
        self.words: list[str] = []
        self.numbers: dict[str, int] = {}

    def encode(self, text: str, *, special: bool) -> list[int]:
        found = re.findall(rf"{END}|\s*(?:[A-Za-z]+|\d|[^\w\s]|_)|\s+", text)
        for word in found:
            if word not in self.numbers:
                self.numbers[word] = len(self.words)
                self.words.append(word)
        return [self.numbers[word] for word in found]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)

    def conversation(self, messages: list[tuple[str, str]], *, begun: bool) -> str:
        said = "".join(f"{role}: {content}{END}\n" for role, content in messages)
        return f"system: Be kind.{END}\n{said}" + ("assistant: " if begun else "")

    def answers(self, ids: list[int], pauses: Sequence[Pause]) -> list[list[list[Prediction]]]:
        self.read += 1
        found = []
        for at, questions in pauses:
            seen = self.decode(ids[max(0, at - self.reach) : at])
            known = [self.decode(answer).strip() in seen for _, answer in questions]
            sizes = [len(answer) for _, answer in questions]
            found.append([[Prediction(-1.0, k)] * n for k, n in zip(known, sizes, strict=True)])
        return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(5)
    words = ["tree", "house.", "road,", "sees", "a\n\nline", "of", "stones"]
    documents = [" ".join(rng.choices(words, k=600)) for _ in range(300)]
    out = tmp_path_factory.mktemp("texts")
    (out / "python_docs.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    return out


def documents_of(texts: Path) -> list[str]:
    return [d for found in Kinds.read(texts, [CHAT]).files[CHAT].values() for d in found]


def rows_of(plan: ChatPlan, model: Words, done: Any = ()) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    plan.run(model, lambda event: samples.extend(event["samples"]), done)
    return samples


@pytest.mark.parametrize("index", range(4))
def test_what_is_said_lies_at_its_distance_and_is_asked_once(texts: Path, index: int) -> None:
    plan = ChatPlan(TASKS, [3000], DISTANCES, str(texts))
    model = Words()
    chat = plan.chat(model, documents_of(texts), 3000, index)
    text = model.decode(chat.ids)
    assert len(chat.ids) == pytest.approx(3000, abs=20) and not text.endswith(END)
    places = [pause.at for pause in chat.pauses]
    assert places == pytest.approx([3000 - PAUSE_TOKENS * i for i in (3, 2, 1, 0)], abs=20)
    assert [(a.task, a.aim) for a in chat.asked] == [
        (TASKS[(index + i) % 4], distance) for i in (3, 2, 1, 0) for distance in DISTANCES
    ]
    questions = [(pause.at, *question) for pause in chat.pauses for question in pause.questions]
    for asked, (end, question, answer) in zip(chat.asked, questions, strict=True):
        fact = asked.fact
        assert asked.distance == pytest.approx(asked.aim, abs=30)
        since = model.decode(chat.ids[end - asked.distance : end])
        assert since.strip().startswith(fact.answer)
        assert text.count(fact.sentence.strip()) == 1
        asked_so = f"{END}\nuser: {fact.question}{END}\nassistant: {fact.begun}"
        assert model.decode(question) == asked_so and fact.answer not in asked_so
        assert model.decode(answer) == ("" if fact.begun.endswith('"') else " ") + fact.answer
    assert len({asked.fact.question for asked in chat.asked}) == len(chat.asked)


def test_the_rest_is_documentation_that_the_user_asks_to_go_on(texts: Path) -> None:
    model, held = Words(), documents_of(texts)
    chat = ChatPlan(TASKS, [3000], DISTANCES, str(texts)).chat(model, held, 3000, 0)
    turns = model.decode(chat.ids).split(f"{END}\n")[1:]
    said = {f"{a.fact.sentence}" for a in chat.asked}
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        user = user.removeprefix("user: ")
        for sentence in said:
            user = user.replace(sentence, "").strip()
        assert user in ASKS
        assert any(assistant.removeprefix("assistant: ") in document for document in held) or (
            "\n\n" in assistant
        )
    assert all(is_held_out(document) for document in held)


def test_seed_and_index_decide_and_tasks_ask_last_in_turn(texts: Path) -> None:
    held = documents_of(texts)

    def chat(index: int, seed: int = 0) -> Chat:
        plan = ChatPlan(TASKS, [2000], [250, 500], str(texts), seed=seed)
        return plan.chat(Words(), held, 2000, index)

    assert chat(0) == chat(0)
    assert len({tuple(chat(*other).ids) for other in ((0, 0), (1, 0), (0, 1))}) == 3
    assert Counter(chat(index).asked[-1].task for index in range(8)) == dict.fromkeys(TASKS, 2)


def test_answers_count_by_distance_and_what_is_done_is_not_read_again(texts: Path) -> None:
    plan = ChatPlan(["chat-name", "chat-code"], [1200, 2500], DISTANCES, str(texts), samples=3)
    rows = rows_of(plan, Words(reach=600))
    cells = {key: cell.exact for key, cell in distance_cells(rows).items()}
    assert cells == {
        (task, length, distance): 3 if distance < 600 else 0
        for length in (1200, 2500)
        for task in plan.tasks
        for distance in (DISTANCES if length == 2500 else DISTANCES[:2])
    }
    assert sum(map(plan.cost, rows)) == pytest.approx(plan.tokens, rel=0.01)
    again = Words(reach=600)
    first = [row for row in rows if (row["length"], row["index"]) != (2500, 1)]
    assert rows_of(plan, again, plan.done(first)) == [r for r in rows if r not in first]
    assert again.read == 1


def test_too_little_text(texts: Path) -> None:
    with pytest.raises(EvalError, match="--lengths: the held-out documentation"):
        rows_of(ChatPlan(TASKS, [900_000], [250], str(texts), samples=1), Words())


# --- held out from training


LISTS = [value for value in vars(chat_facts).values() if isinstance(value, tuple)]


def runs(text: str, size: int = 4) -> set[tuple[str, ...]]:
    """Runs of `size` words, letter case aside."""
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_no_sentence_names_a_label_of_training() -> None:
    """`test_held_out_words.py` compares the words of names and values."""
    assert len(LISTS) == 8
    for words in LISTS:
        assert len(words) == len(set(words)) >= 6
    labels = {label for labels in retrieval_facts.LABELS.values() for label in labels}
    rng = random.Random(1)
    for task in CHAT_TASKS.values():
        for form in task.forms:
            fact = form(rng)
            said = f"{fact.sentence} {fact.question} {fact.begun}".lower()
            assert not [label for label in labels if re.search(rf"\b{label.lower()}\b", said)]


def test_no_wording_is_one_of_training_and_calibration(texts: Path, tmp_path: Path) -> None:
    """Both draw `retrieval_row`."""
    tokenizer = AutoTokenizer.from_pretrained(make_speaking(tmp_path / "model"))
    rng = random.Random(2)
    templates = [
        template
        for module in (retrieval, retrieval_facts)
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, tuple)
        for template in value
    ]
    assert len(templates) > 50
    # Of a completion, the question and what begins the answer.
    trained = [part if isinstance(part, str) else " ".join(part) for part in templates]
    trained += [tokenizer.decode(retrieval_row(tokenizer, 700, rng).tokens) for _ in range(60)]
    known = set().union(*map(runs, trained))
    assert len(known) > 500
    for task in CHAT_TASKS.values():
        for form in task.forms:
            for _ in range(20):
                fact = form(rng)
                parts = (fact.sentence, fact.question, fact.begun)
                assert not set().union(*map(runs, parts)) & known


# --- tiny models


@pytest.fixture(scope="module")
def lola(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_speaking(tmp_path_factory.mktemp("chats") / "lola")


@pytest.fixture(scope="module")
def llama(lola: Path) -> Path:
    out = lola.parent / "llama"
    make_base(out, "llama")
    for file in [*lola.glob("tokenizer*"), *lola.glob("*.jinja")]:
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize("kind", ["lola", "llama"])
def test_every_question_is_asked_from_the_state_of_its_pause(
    kind: str, request: pytest.FixtureRequest
) -> None:
    setting = Setting("a", request.getfixturevalue(kind))
    ids, *parts = [[i % 300 for i in part] for part in random_prompts([120, 7, 3, 9, 1], seed=4)]
    questions = [(parts[0], parts[1]), (parts[2], parts[3])]
    pauses = [Pause(80, questions), Pause(120, questions[::-1])]
    found = Reader(setting, 0, "float32").answers(ids, pauses)
    whole = load(setting, "float32")
    for (at, asked), answers in zip(pauses, found, strict=True):
        for (question, answer), predictions in zip(asked, answers, strict=True):
            with torch.no_grad():
                row = torch.tensor([ids[:at] + question + answer])
                logits = whole(row, use_cache=False).logits[0, -len(answer) - 1 : -1].float()
            wanted = logits.log_softmax(-1)[range(len(answer)), answer]
            assert [p.logprob for p in predictions] == pytest.approx(wanted.tolist(), abs=1e-4)
            first = logits.argmax(-1) == torch.tensor(answer)
            assert [p.first for p in predictions] == first.tolist()


def test_the_command_compares_settings(
    lola: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process; that settings run in one of their own is tested with the other tasks."""

    def here(plan: Any, record: Record, batch: int, engine_args: Any, emit: Any) -> None:
        job = engine.make_job(plan, record, batch, engine_args)
        engine._run(json.loads(json.dumps(job)), emit)

    monkeypatch.setattr(engine, "run_setting", here)
    pages = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
    paragraphs = [part for page in pages for part in page.read_text().split("\n\n")]
    (tmp_path / "perl_docs.txt").write_text(SEPARATOR.join(paragraphs), encoding="utf-8")
    out = tmp_path / "out"
    argv = ["eval", "recall", "--model", str(lola), "--tasks", "chat-fact,chat-code", "--texts"]
    argv += [str(tmp_path), "--out", str(out), "--engine-args", '{"dtype": "float32"}']
    argv += ["--lengths", "700,1000", "--distances", "250,600", "--samples", "1"]
    assert cli.main([*argv, "--lola-config", "as it is={}"]) == 0
    window = ["--lola-config", 'all={"window_size": 1200}', "--resume"]
    assert cli.main([*argv, "--lola-config", "as it is={}", *window]) == 0
    found = json.loads((out / "chat.json").read_text())["settings"]
    assert [row["name"] for row in found] == ["as it is", "all"]
    for row in found:
        keys = {(cell["task"], cell["length"], cell["distance"]) for cell in row["cells"]}
        both = ((700, 250), (1000, 250), (1000, 600))
        assert keys == {(task, *cell) for task in ("chat-fact", "chat-code") for cell in both}
    asked = [[row["question"] for row in setting["samples"]] for setting in found]
    assert asked[0] == asked[1]
    summary = json.loads((out / "chat.summary.json").read_text())
    assert summary["made_by"] == "lola-vllm eval recall" and "samples" not in summary["settings"][0]
    assert "### chat-code, 1,000 tokens" in (out / "chat.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distances", "200"], "--distances 200: must be at least 250 more than 0"),
        (["--distances", "300,500"], "--distances 500: must be at least 250 more than 300"),
        (["--lengths", "500"], "holds none of the --distances 250, 500, 1000, 2000, 4000"),
        (["--tasks", "chat-fact,niah-1"], "--tasks niah-1: the tasks of conversations are"),
        (["--model", "http://localhost"], "a server reads a text anew for every question"),
        (["--engine-args", '{"seed": 1}'], "--engine-args: seed is of vLLM's engine"),
        (["--samples", "0"], "--samples 0: must be at least 1"),
    ],
)
def test_command_line_errors(
    lola: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    argv = ["eval", "recall", "--model", str(lola), "--tasks", "chat-fact", "--texts", str(texts)]
    argv += ["--lengths", "2000", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, *options]) == 2
    assert message in capsys.readouterr().err


def test_conversations_need_text(lola: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "recall", "--model", str(lola), "--tasks", "chat-fact"]) == 2
    assert "--tasks chat-fact: needs real text; give --texts" in capsys.readouterr().err
