"""Passages that are begun again: which ones, from which state, and what shares are made of."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.comparison import evaluate
from lola_vllm.evaluation.copying import ASKED, BAND, GIVEN, PASSAGE, CopyPlan, copy_cells
from lola_vllm.evaluation.models import Answers, Prediction, Stop
from lola_vllm.evaluation.results import Record
from lola_vllm.evaluation.settings import REFERENCE, Setting
from lola_vllm.training.texts import SEPARATOR
from tests.support.evaluations import Letters, in_this_process, record_of, rows_of


class Knowing(Letters):
    """It has every passage within `reach`, and no other."""

    special = frozenset([ord("m")])

    def __init__(self, reach: int = 0) -> None:
        super().__init__()
        self.reach = reach
        self.asked: list[tuple[str, list[Stop]]] = []

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
            found.append(Answers(read, None, at))
        return found


@pytest.fixture
def texts(tmp_path) -> Path:
    rng = random.Random(5)
    for name in ("jane_austen", "web_bible", "mine"):
        documents = [
            "\n\n".join(
                "".join(rng.choice("abcdefghijkl nopqr") for _ in range(150)) for _ in range(6)
            )
            + "m"
            for _ in range(200)
        ]
        (tmp_path / f"{name}.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    return tmp_path


def test_passages_lie_at_their_distance_and_no_token_is_asked_twice(texts):
    plan = CopyPlan(str(texts), ["prose"], [1500], [250, 500, 1000], samples=4)
    model = Knowing(10**6)
    rows = rows_of(plan, model)
    files = [row["source"] for row in rows[::3]]  # they take turns
    assert {*files[:2]} == {"jane_austen", "web_bible"} and files[2:] == files[:2]
    assert [row["distance"] for row in rows] == plan.distances * 4 and len(model.asked) == 4
    assert all(row["exact"] == row["tokens"] > 0 for row in rows)
    for text, stops in model.asked:
        assert len(text) == 1500 and [stop.at for stop in stops] == [1116, 1244, 1372, 1500]
        passage_starts = Counter(text[p : p + GIVEN] for p in range(len(text)))
        asked: set[int] = set()
        for stop in stops:
            backs = []
            for question, _ in stop.questions:
                assert question[0] == ord("\n") and len(question) == 1 + PASSAGE
                passage = "".join(map(chr, question[1:]))
                assert passage_starts[passage[:GIVEN]] == 1 and "m" not in passage
                place = text.index(passage)
                backs.append(stop.at - place)
                tokens = set(range(place + GIVEN, place + PASSAGE))
                assert not tokens & asked
                asked |= tokens
            for distance in plan.distances:
                near = [b for b in backs if distance / BAND <= b <= distance * BAND + 1]
                assert 1 <= len(near) <= 4


def test_seeds_ask_other_passages_and_models_the_same(texts):
    plans = [CopyPlan(str(texts), ["prose"], [1500], [250], 1, seed) for seed in (0, 0, 1)]
    found = [rows_of(plan, Knowing(n * 1000))[0] for n, plan in enumerate(plans)]
    assert found[0]["checksum"] == found[1]["checksum"] != found[2]["checksum"]


def test_what_occurs_twice_is_not_asked(tmp_path):
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


def test_what_is_done_is_not_read_again(texts):
    plan = CopyPlan(str(texts), ["prose", "mine"], [900], [250, 500], 2)
    rows, again = rows_of(plan, Knowing()), Knowing()
    assert rows_of(plan, again, plan.done(rows[:6])) == rows[6:]
    assert len(again.asked) == 1 and len(rows) == 8


def test_too_little_text(texts):
    with pytest.raises(EvalError, match="--lengths 900000: no kind of text"):
        rows_of(CopyPlan(str(texts), ["mine"], [900_000]), Knowing())


# --- numbers


def row(index: int, nats: float, exact: int, **others: Any) -> dict[str, Any]:
    found = {"kind": "a", "length": 500, "index": index, "distance": 250, "checksum": 1}
    found |= {"passages": 4, "tokens": 48, "exact": exact, "nats": nats, "seen": True}
    return found | others


def test_shares_are_of_means_and_paired_by_text():
    # The second text has twice the first one's gain, and LoLA a half of each.
    base = [
        row(0, 48.0, 40, floor_exact=10, floor_nats=148.0),
        row(1, 48.0, 44, floor_exact=4, floor_nats=248.0),
    ]
    lola = [row(0, 98.0, 25), row(1, 148.0, 24)]
    cell = copy_cells(record_of(lola), record_of(base))["a", 500, 250]
    assert cell["gain"] == pytest.approx((0.5, 0.5, 0.5))
    assert cell["exact"][0] == pytest.approx(49 / 96) and cell["exact"][1] < cell["exact"][2]
    assert cell["logprob"][0] == pytest.approx(-246 / 96)
    assert (cell["texts"], cell["passages"], cell["floor_exact"]) == (2, 8, None)
    own = copy_cells(record_of(base), None)["a", 500, 250]
    assert own["gain"] is None
    assert own["floor_exact"][0] == pytest.approx(14 / 96)
    assert own["floor_logprob"][0] == pytest.approx(-396 / 96)


def test_no_share_where_the_reference_saw_nothing_or_gains_nothing():
    lola = [row(0, 98.0, 25)]
    for changes in ({"seen": False}, {"floor_nats": 48.0, "floor_exact": 40}):
        base = [row(0, 48.0, 40, **{"floor_exact": 10, "floor_nats": 148.0, **changes})]
        assert copy_cells(record_of(lola), record_of(base))["a", 500, 250]["gain"] is None


def test_table_and_json():
    floor = {"floor_exact": 10, "floor_nats": 148.0}
    base, lola = Record(Setting(REFERENCE, Path("/x/a"))), Record(Setting("lola", Path("b")))
    base.samples = [row(i, 48.0, 40, **floor) for i in range(3)]
    base.samples.append(row(0, 48.0, 40, kind="b", **floor))
    lola.samples = [row(i, 98.0, 25) for i in range(3)] + [row(0, 123.0, 25, kind="b")]
    base.finished = True
    plan = CopyPlan("t")
    table = plan.table([base, lola], base)
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["- not read", "21% (-3.08)"] in lines
    assert ["lola", "52% (-2.04), 0.50x [0.50, 0.50]"] in lines
    assert ["lola", "52% (-2.56), 0.25x [-]"] in lines
    assert "### b, 500 tokens" in table and "3 texts, 12 to 12 passages" in table
    assert plan.numbers(lola, base)["cells"][0]["gain"][0] == pytest.approx(0.5)


def test_models_that_are_equal_within_their_reach_copy_equally(lola, llama, tmp_path, monkeypatch):
    ran = in_this_process(monkeypatch)
    pages = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
    paragraphs = [part for page in pages for part in page.read_text().split("\n\n")]
    (tmp_path / "docs.txt").write_text(SEPARATOR.join(paragraphs), encoding="utf-8")
    plan = CopyPlan(str(tmp_path), [], [300, 500], [250, 450], 1, stops=1)
    all_seen = Setting("all", lola, {"window_size": 512})
    settings = [Setting(REFERENCE, llama), all_seen, Setting("as it is", lola)]
    table = evaluate(plan, settings, tmp_path, batch=3, engine_args={"dtype": "float32"})
    assert ran == ["reference", "all", "as it is"] and "### docs, 500 tokens" in table
    found = json.loads((tmp_path / "copy.json").read_text())["settings"]
    stock, window, shipped = (setting["cells"] for setting in found)
    assert [(c["length"], c["distance"]) for c in stock] == [(300, 250), (500, 250), (500, 450)]
    # The base takes 400 tokens, so that it does not see a passage 450 tokens back.
    assert window[0]["logprob"] == pytest.approx(stock[0]["logprob"], abs=1e-4)
    assert window[0]["exact"] == stock[0]["exact"]
    assert stock[0]["floor_logprob"] != stock[0]["logprob"]
    assert shipped[0]["logprob"] != pytest.approx(stock[0]["logprob"], abs=1e-3)
    assert stock[2]["floor_logprob"] and window[2]["gain"] is None
