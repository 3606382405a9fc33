"""Conversations: where something is said, what is asked, and that nothing of it is trained on."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lola_vllm.evaluation import EvalError, facts, tasks
from lola_vllm.evaluation.chats import ASKS, PAUSE_TOKENS, Chat, ChatPlan
from lola_vllm.evaluation.facts import CHAT_FORMS
from lola_vllm.evaluation.held_out import read_held_out
from lola_vllm.evaluation.models import Answers, Prediction, Stop
from lola_vllm.evaluation.recall import recall_cells
from lola_vllm.training.distill import retrieval, retrieval_facts, retrieval_words
from lola_vllm.training.distill.retrieval import retrieval_row
from lola_vllm.training.texts import SEPARATOR, is_held_out
from tests.support.evaluations import Words, record_of, rows_of
from tools.support.speaking import make_speaking

END = "<end>"
TASKS = list(CHAT_FORMS)
DISTANCES = [250, 500, 1000]


class Talking(Words):
    """It knows what was said within `reach` tokens, and no more."""

    def __init__(self, reach: int = 0) -> None:
        super().__init__()
        self.tokenizer, self.reach, self.read = self, reach, 0

    def conversation(self, messages: list[tuple[str, str]], *, begun: bool) -> str:
        said = "".join(f"{role}: {content}{END}\n" for role, content in messages)
        return f"system: Be kind.{END}\n{said}" + ("assistant: " if begun else "")

    def ask(self, ids: list[int], stops: Sequence[Stop]) -> list[Answers]:
        self.read += 1
        found = []
        for at, questions in stops:
            seen = self.decode(ids[max(0, at - self.reach) : at])
            read = [
                [Prediction(-1.0, self.decode(question[-size:]).strip() in seen)] * size
                for question, size in questions
            ]
            found.append(Answers(read, None, at))
        return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = random.Random(5)
    words = ["tree", "house.", "road,", "sees", "a\n\nline", "of", "stones"]
    documents = [" ".join(rng.choices(words, k=600)) for _ in range(300)]
    out = tmp_path_factory.mktemp("texts")
    (out / "python_docs.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    return out


def documents_of(texts: Path) -> list[str]:
    return read_held_out(texts)["python_docs"]


@pytest.mark.parametrize("index", range(4))
def test_what_is_said_lies_at_its_distance_and_is_asked_once(texts, index):
    plan = ChatPlan(TASKS, [3000], DISTANCES, str(texts))
    model = Talking()
    chat = plan.chat(model, documents_of(texts), 3000, index)
    text = model.decode(chat.ids)
    assert len(chat.ids) == pytest.approx(3000, abs=20) and not text.endswith(END)
    places = [pause.at for pause in chat.pauses]
    assert places == pytest.approx([3000 - PAUSE_TOKENS * i for i in (3, 2, 1, 0)], abs=20)
    assert [(a.task, a.aim) for a in chat.asked] == [
        (TASKS[(index + i) % 4], distance) for i in (3, 2, 1, 0) for distance in DISTANCES
    ]
    questions = [(pause.at, *question) for pause in chat.pauses for question in pause.questions]
    for asked, (end, whole, size) in zip(chat.asked, questions, strict=True):
        fact, question, answer = asked.fact, whole[:-size], whole[-size:]
        assert asked.distance == pytest.approx(asked.aim, abs=30)
        since = model.decode(chat.ids[end - asked.distance : end])
        assert since.strip().startswith(fact.answer)
        assert text.count(fact.sentence.strip()) == 1
        asked_so = f"{END}\nuser: {fact.question}{END}\nassistant: {fact.begun}"
        assert model.decode(question) == asked_so and fact.answer not in asked_so
        assert model.decode(answer) == ("" if fact.begun.endswith('"') else " ") + fact.answer
    assert len({asked.fact.question for asked in chat.asked}) == len(chat.asked)


def test_the_rest_is_documentation_that_the_user_asks_to_go_on(texts):
    model, held = Talking(), documents_of(texts)
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


def test_seed_and_index_decide_and_tasks_ask_last_in_turn(texts):
    held = documents_of(texts)

    def chat(index: int, seed: int = 0) -> Chat:
        plan = ChatPlan(TASKS, [2000], [250, 500], str(texts), seed=seed)
        return plan.chat(Talking(), held, 2000, index)

    assert chat(0) == chat(0)
    assert len({tuple(chat(*other).ids) for other in ((0, 0), (1, 0), (0, 1))}) == 3
    assert Counter(chat(index).asked[-1].task for index in range(8)) == dict.fromkeys(TASKS, 2)


def test_answers_count_by_distance_and_what_is_done_is_not_read_again(texts):
    plan = ChatPlan(["chat-name", "chat-code"], [1200, 2500], DISTANCES, str(texts), samples=3)
    rows = rows_of(plan, Talking(reach=600))
    cells = {key: cell["exact"] for key, cell in recall_cells(rows).items()}
    assert cells == {
        (task, length, distance): 3 if distance < 600 else 0
        for length in (1200, 2500)
        for task in plan.tasks
        for distance in (DISTANCES if length == 2500 else DISTANCES[:2])
    }
    record = record_of(rows)
    assert "### chat-code" in plan.table([record], None)
    assert {cell["task"] for cell in plan.numbers(record, None)["cells"]} == {*plan.tasks}
    again = Talking(reach=600)
    first = [row for row in rows if (row["length"], row["index"]) != (2500, 1)]
    assert rows_of(plan, again, plan.done(first)) == [r for r in rows if r not in first]
    assert again.read == 1


def test_too_little_text(texts):
    with pytest.raises(EvalError, match="--lengths: the held-out documentation"):
        rows_of(ChatPlan(TASKS, [900_000], [250], str(texts), samples=1), Talking())


# --- held out from training


def runs(text: str, size: int = 4) -> set[tuple[str, ...]]:
    """Runs of `size` words, letter case aside."""
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_no_sentence_names_a_label_of_training():
    for words in facts.VALUES.values():
        assert len(words) == len(set(words)) >= 5
    labels = {label for labels in retrieval_facts.LABELS.values() for label in labels}
    rng = random.Random(1)
    for forms in CHAT_FORMS.values():
        for form in forms:
            fact = form.draw(rng)
            said = f"{fact.sentence} {fact.question} {fact.begun}".lower()
            assert not [label for label in labels if re.search(rf"\b{label.lower()}\b", said)]


def test_no_wording_is_one_of_training_and_calibration(texts, tmp_path):
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
    for forms in CHAT_FORMS.values():
        for form in forms:
            for _ in range(20):
                fact = form.draw(rng)
                parts = (fact.sentence, fact.question, fact.begun)
                assert not set().union(*map(runs, parts)) & known


def test_no_key_name_or_value_is_a_word_of_training():
    """As they are listed, and as keys are drawn: `retrieval_words.py` has others."""
    lists = (retrieval_words.ADJECTIVES, retrieval_words.NOUNS, retrieval_words.FIRST_NAMES)
    trained = {word.lower() for words in (*lists, retrieval_words.LAST_NAMES) for word in words}
    asked = [tasks.ADJECTIVES, tasks.NOUNS, *facts.VALUES.values()]
    words = {word.lower() for each in asked for word in each}
    assert len(words) > 300 and not words & trained
    rng = random.Random(3)
    keys = {tasks.draw_key(rng) for _ in range(2000)}
    assert len(keys) > 1500
    assert not {part for key in keys for part in re.findall("[a-z]+", key)} & trained
