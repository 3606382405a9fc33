"""Passages that are begun again: which ones, from which state, and what shares are made of."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_vllm.command import cli
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.copy_texts import AGAIN, ASKS, Kinds
from lola_vllm.evaluation.copying import (
    ASKED,
    BAND,
    FLOOR,
    GIVEN,
    PASSAGE,
    CopyPlan,
    copy_cells,
)
from lola_vllm.evaluation.models import Answers, Prediction, Stop
from lola_vllm.evaluation.reader import Reader, Run, load
from lola_vllm.evaluation.results import Record
from lola_vllm.evaluation.settings import Setting
from lola_vllm.training.texts import SEPARATOR, is_held_out
from tests.support.evaluations import Letters, in_this_process, record_of, rows_of
from tests.support.families import make_base
from tools.support.tiny import random_prompts

END = "\x03"


class Knowing(Letters):
    """It has every passage within `reach`, and no other."""

    special = frozenset([ord(END)])

    def __init__(self, reach: int, floor: bool = False) -> None:
        super().__init__()
        self.reach, self.floor = reach, floor
        self.asked: list[tuple[str, list[Stop]]] = []

    def conversation(self, messages: list[tuple[str, str]], *, begun: bool) -> str:
        said = "".join(f"{role}:{content}{END}" for role, content in messages)
        return said + ("assistant:" if begun else "")

    def ask(self, ids: list[int], stops: Sequence[Stop], floor: int) -> list[Answers]:
        text = self.decode(ids)
        self.asked.append((text, list(stops)))
        found = []
        for at, questions in stops:
            assert {size for _, size in questions} == {ASKED}
            read = []
            for question, _ in questions:
                place = text.index(self.decode(question[-PASSAGE:]))
                known = at - place <= self.reach
                read.append([Prediction(-1.0 if known else -3.0, known)] * ASKED)
            floor = [[Prediction(-5.0, False)] * ASKED for _ in questions] if self.floor else None
            found.append(Answers(read, floor, at))
        return found


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rng = random.Random(5)
    for name in ("jane_austen", "python_docs", "mine"):
        documents = [
            "\n\n".join(
                "".join(rng.choice("abcdefghijkl mnopqr") for _ in range(150)) for _ in range(6)
            )
            for _ in range(200)
        ]
        (tmp_path / f"{name}.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    return tmp_path


def test_passages_lie_at_their_distance_and_no_token_is_asked_twice(texts: Path) -> None:
    plan = CopyPlan(str(texts), ["prose"], [1500], [250, 500, 1000], samples=2)
    model = Knowing(10**6)
    rows = rows_of(plan, model)
    assert [row["source"] for row in rows] == ["jane_austen"] * 2 and len(model.asked) == 2
    for text, stops in model.asked:
        assert len(text) == 1500 and [stop.at for stop in stops] == [1116, 1244, 1372, 1500]
        passage_starts = Counter(text[p : p + GIVEN] for p in range(len(text)))
        asked: set[int] = set()
        for stop in stops:
            backs = []
            for question, _ in stop.questions:
                assert question[0] == ord("\n") and len(question) == 1 + PASSAGE
                passage = "".join(map(chr, question[1:]))
                assert passage_starts[passage[:GIVEN]] == 1
                place = text.index(passage)
                backs.append(stop.at - place)
                tokens = set(range(place + GIVEN, place + PASSAGE))
                assert not tokens & asked
                asked |= tokens
            for distance in plan.distances:
                near = [b for b in backs if distance / BAND <= b <= distance * BAND + 1]
                assert 2 <= len(near) <= 4
    for row in rows:
        assert [cell["distance"] for cell in row["cells"]] == [250, 500, 1000]
        assert all(cell["exact"] == cell["tokens"] > 0 for cell in row["cells"])


def test_seeds_ask_other_passages_and_models_the_same(texts: Path) -> None:
    plans = [CopyPlan(str(texts), ["prose"], [1500], [250], 1, seed=seed) for seed in (0, 0, 1)]
    found = [rows_of(plan, Knowing(n * 1000))[0] for n, plan in enumerate(plans)]
    assert found[0]["checksum"] == found[1]["checksum"] != found[2]["checksum"]


def test_what_occurs_twice_is_not_asked(tmp_path: Path) -> None:
    rng = random.Random(1)
    line = "".join(rng.choice("abcdefghijkl") for _ in range(40))
    fresh = ["".join(rng.choice("abcdefghijkl") for _ in range(40)) for _ in range(20_000)]
    documents = [f"{line} {other}" for other in fresh]
    (tmp_path / "t.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    model = Knowing(10**6)
    rows_of(CopyPlan(str(tmp_path), [], [3000], [500, 2000], 2, passages=9), model)
    questions = [q for _, stops in model.asked for stop in stops for q, _ in stop.questions]
    givens = ["".join(map(chr, question[1 : 1 + GIVEN])) for question in questions]
    assert len(givens) > 20 and not any(given in line for given in givens)


def test_kinds_take_their_files_in_turn_and_chats_are_made_of_documentation(texts: Path) -> None:
    model = Knowing(0)
    (texts / "web_bible.txt").write_text((texts / "jane_austen.txt").read_text() + " x")
    kinds = Kinds.read(texts, [])
    assert set(kinds.files) == {"prose", "documentation", "mine", "chat"}
    prose = list(kinds.texts(model, "prose", 400, 4, 0))
    assert [t.source for t in prose[:2]] in (
        ["jane_austen", "web_bible"],
        ["web_bible", "jane_austen"],
    )
    assert [t.source for t in prose[2:]] == [t.source for t in prose[:2]]
    held = [d.strip() for d in (texts / "python_docs.txt").read_text().split(SEPARATOR)]
    said = "".join(d for d in held if is_held_out(d))
    chats = list(kinds.texts(model, "chat", 1200, 3, 0))
    assert len(chats) == 3 and len({chat.ids[100] for chat in chats}) > 1
    for chat in chats:
        assert len(chat.ids) == 1200
        turns = model.decode(chat.ids).split(END)[:-1]
        assert all(turn.removeprefix("user:") in ASKS for turn in turns[::2])
        assert all(turn.removeprefix("assistant:").split("\n\n")[0] in said for turn in turns[1::2])
        assert model.decode(chat.bridge) == f"{END}user:{AGAIN}{END}assistant:"
    plan = CopyPlan(str(texts), ["chat"], [1200], [300], 3)
    rows_of(plan, model)
    questions = [q for _, stops in model.asked for stop in stops for q, _ in stop.questions]
    assert questions and not any(END in model.decode(q[-PASSAGE:]) for q in questions)
    assert set(Kinds.read(texts, [], has_chat=False).files) == {"prose", "documentation", "mine"}
    assert set(Kinds.read(texts, ["python_docs"]).files) == {"python_docs"}
    with pytest.raises(EvalError, match=r"--kinds code: .* has prose, .* in the files jane_austen"):
        Kinds.read(texts, ["code"])


def test_what_is_done_is_not_read_again(texts: Path) -> None:
    plan = CopyPlan(str(texts), ["prose", "mine"], [800], [250], 2)
    rows = rows_of(plan, Knowing(0))
    again = Knowing(0)
    assert rows_of(plan, again, plan.done(rows[:3])) == rows[3:]
    assert len(again.asked) == len(rows) - 3 == 1
    assert sum(map(plan.cost, rows)) == plan.tokens


def test_too_little_text(texts: Path) -> None:
    with pytest.raises(EvalError, match="--lengths 900000: no kind of text"):
        rows_of(CopyPlan(str(texts), ["mine"], [900_000]), Knowing(0))


# --- numbers


def sample(index: int, nats: float, exact: int, **others: Any) -> dict[str, Any]:
    cell = {"distance": 250, "passages": 4, "tokens": 48, "exact": exact, "nats": nats}
    cell |= {"seen": True, **others}
    return {
        "kind": "a",
        "length": 500,
        "index": index,
        "source": "f",
        "checksum": 1,
        "cells": [cell],
    }


def test_shares_are_of_means_and_paired_by_text() -> None:
    # The second text has twice the first one's gain, and LoLA a half of each.
    base = [
        sample(0, 48.0, 40, floor_exact=10, floor_nats=148.0),
        sample(1, 48.0, 44, floor_exact=4, floor_nats=248.0),
    ]
    lola = [sample(0, 98.0, 25), sample(1, 148.0, 24)]
    cell = copy_cells(record_of(lola), record_of(base))["a", 500, 250]
    assert cell["gain"] == pytest.approx((0.5, 0.5, 0.5))
    assert cell["exact"][0] == pytest.approx(49 / 96) and cell["exact"][1] < cell["exact"][2]
    assert cell["logprob"][0] == pytest.approx(-246 / 96)
    assert (cell["texts"], cell["passages"], cell["floor_exact"]) == (2, 8, None)
    own = copy_cells(record_of(base), None)["a", 500, 250]
    assert own["gain"] is None
    assert own["floor_exact"][0] == pytest.approx(14 / 96)
    assert own["floor_logprob"][0] == pytest.approx(-396 / 96)


def test_no_share_where_the_reference_saw_nothing_or_gains_nothing() -> None:
    lola = [sample(0, 98.0, 25)]
    for changes in ({"seen": False}, {"floor_nats": 48.0, "floor_exact": 40}):
        base = [sample(0, 48.0, 40, **{"floor_exact": 10, "floor_nats": 148.0, **changes})]
        assert copy_cells(record_of(lola), record_of(base))["a", 500, 250]["gain"] is None
    other = [{**base[0], "checksum": 2}]
    with pytest.raises(EvalError, match="other tokens"):
        copy_cells(record_of(lola), record_of(other))


def test_table_and_json() -> None:
    base, lola = Record(Setting("reference", Path("/x/a"))), Record(Setting("lola", Path("b")))
    base.samples = [
        sample(i, 48.0 + i, 40, floor_exact=10, floor_nats=148.0 + i) for i in range(3)
    ] + [{**sample(0, 48.0, 40, floor_exact=10, floor_nats=148.0), "kind": "b"}]
    lola.samples = [sample(i, 98.0 + i, 25) for i in range(3)]
    lola.samples.append({**sample(0, 123.0, 25), "kind": "b"})
    base.finished = True
    plan = CopyPlan("t")
    table = plan.table([base, lola], base)
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["- not read", "21% (-3.10)"] in lines
    assert ["lola", "52% (-2.06), 0.50x [0.50, 0.50]"] in lines
    assert ["lola", "52% (-2.56), 0.25x [-]"] in lines
    assert "### b, 500 tokens" in table and "3 texts, 12 to 12 passages" in table
    assert plan.numbers(lola, base)["cells"][0]["gain"][0] == pytest.approx(0.5)


# --- tiny models


def expected(model: Any, seen: list[int], question: list[int]) -> list[float]:
    """Log-probabilities of a question's last tokens, computed at once without a cache."""
    row = torch.tensor([seen + question])
    with torch.no_grad():
        logits = model(row, use_cache=False).logits[0, -ASKED - 1 : -1]
    logprobs = logits.float().log_softmax(-1).gather(1, row[0, -ASKED:, None])
    return logprobs[:, 0].tolist()


def check(answers: list[list[Prediction]], wanted: list[list[float]]) -> None:
    found = [[value.logprob for value in answer] for answer in answers]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def stops_of(*places: int) -> tuple[list[Stop], list[list[int]]]:
    questions = random_prompts([PASSAGE + 1] * 5, seed=9)
    return [Stop(at, [(ids, ASKED) for ids in questions]) for at in places], questions


def test_a_softmax_model_sees_its_last_positions_and_the_floor_200(llama: Path) -> None:
    (ids,) = random_prompts([500])
    stops, questions = stops_of(480, 500)
    reader = Reader(Setting("a", llama), 0, "float32", batch=3)
    found = reader.ask(ids, stops, FLOOR)
    whole = load(Setting("a", llama), "float32")
    begin = 500 - (400 - PASSAGE - 1)
    for answers, stop in zip(found, stops, strict=True):
        assert answers.reach == stop.at - begin and answers.floor is not None
        check(answers.read, [expected(whole, ids[begin : stop.at], q) for q in questions])
        seen = ids[stop.at - 200 : stop.at]
        check(answers.floor, [expected(whole, seen, q) for q in questions])


def test_questions_of_a_model_with_a_sliding_window(tmp_path: Path) -> None:
    model = make_base(tmp_path, "mistral", sliding_window=30).eval()
    (ids,) = random_prompts([60])
    _, questions = stops_of()
    ids, questions = [i % 300 for i in ids], [[i % 300 for i in q] for q in questions]
    run = Run(model)
    run.read(ids)
    found = run.ask([(question, ASKED) for question in questions], 5)
    check(found, [expected(model, ids, question) for question in questions])


# --- the command


def test_the_command_compares_settings_and_goes_on(
    lola: Path,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process; that settings run in one of their own is tested with the other tasks."""
    jobs = in_this_process(monkeypatch)
    pages = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
    paragraphs = [part for page in pages for part in page.read_text().split("\n\n")]
    (tmp_path / "perl_docs.txt").write_text(SEPARATOR.join(paragraphs), encoding="utf-8")
    argv = ["eval", "copy", "--model", str(lola), "--reference", str(llama), "--texts"]
    argv += [str(tmp_path), "--out", str(tmp_path / "out"), "--engine-args", '{"dtype": "float32"}']
    argv += ["--lengths", "300,500", "--distances", "250,450", "--stops", "1", "--samples", "1"]
    argv += ["--kinds", "chat"]
    argv += ["--lola-config", 'all={"window_size": 512}']
    assert cli.main(argv) == 0
    models = f"{llama.name}, {lola.name} on the CPU in float32, each loaded before its bar moves"
    texts = "up to 1 texts of each kind and length (300, 500 tokens) for each of 2 settings"
    assert capsys.readouterr().err.startswith(f"{models}: {texts}, about 0 minutes")
    assert cli.main([*argv, "--lola-config", "as it is={}", "--resume"]) == 0
    ran = [job["setting"]["name"] for job in jobs]  # what was asked before is not asked again
    assert ran == ["reference", "all", "as it is"]
    found = json.loads((tmp_path / "out" / "copy.json").read_text())["settings"]
    for row in found:
        keys = [(cell["kind"], cell["length"], cell["distance"]) for cell in row["cells"]]
        assert keys == [("chat", *both) for both in ((300, 250), (500, 250), (500, 450))]
    stock, window, shipped = (row["cells"] for row in found)
    # The base takes 400 tokens, so that it does not see a passage 450 tokens back.
    assert window[0]["logprob"] == pytest.approx(stock[0]["logprob"], abs=1e-4)
    assert window[0]["exact"] == stock[0]["exact"]
    assert stock[0]["floor_logprob"] != stock[0]["logprob"]
    assert shipped[0]["logprob"] != pytest.approx(stock[0]["logprob"], abs=1e-3)
    assert stock[2]["floor_logprob"] and window[2]["gain"] is None
    summary = json.loads((tmp_path / "out" / "copy.summary.json").read_text())
    assert summary["made_by"] == "lola-vllm eval copy" and "samples" not in summary["settings"][0]
    assert "### chat, 500 tokens" in (tmp_path / "out" / "copy.md").read_text()
