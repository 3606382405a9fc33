"""Perplexity: windows of text, and one long text in blocks with its curves and their trend."""

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Prediction
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.results import Record
from lola_vllm.evaluation.settings import Setting
from lola_vllm.evaluation.stream import StreamPlan, curves
from lola_vllm.training.texts import SEPARATOR
from tests.support.evaluations import Letters, held_out, record_of, rows_of


class Reading(Letters):
    """In windows each token is half as likely as the last; of a stream its place alone counts."""

    batch = 3

    def __init__(self, prefix: str = "") -> None:
        super().__init__(prefix)
        self.seen: list[str] = []
        self.asked: list[tuple[str, list[int]]] = []

    def predictions(self, windows: list[list[int]]) -> list[list[Prediction]]:
        assert len(windows) <= self.batch
        self.seen += map(self.decode, windows)
        return [[Prediction(-float(i), i % 2 == 0) for i in range(1, len(w))] for w in windows]

    def read_blocks(
        self, prefix: list[int], ids: list[int], block: int, context: int, wanted: Collection[int]
    ) -> Iterator[tuple[int, list[Prediction]]]:
        assert self.decode(prefix) == self.prefix and len(ids) % block == 0
        self.asked.append((self.decode(ids), list(wanted)))
        for index in wanted:
            places = range(index * block, (index + 1) * block)
            yield index, [Prediction(-0.01 * p, True) for p in places if p or prefix]


@pytest.fixture
def texts(tmp_path) -> Path:
    """Held out of the second kind is less than of the first, and of the third no window."""
    for kind, count in (("first", 300), ("second", 100), ("tiny", 20)):
        documents = [f"{kind} {i}: " + "äb" * 60 for i in range(count)]
        if kind == "tiny":
            documents = [d[:20] for d in documents]
        (tmp_path / f"{kind}.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    return tmp_path


def test_windows_are_disjoint_pieces_of_held_out_text(texts):
    plan, model = PerplexityPlan(str(texts), windows=10, window_length=50), Reading()
    samples = rows_of(plan, model)
    assert [s["kind"] for s in samples] == ["first"] * 10 + ["second"] * 10
    for sample, seen in zip(samples, model.seen, strict=True):
        at = 50 * sample["index"]
        assert seen == "".join(held_out(texts, sample["kind"]))[at : at + 50]
        # Nothing predicts the first token.
        assert sample["tokens"] == 49
        assert sample["bytes"] == len(seen[1:].encode("utf-8"))
        assert sample["nats"] == sum(range(1, 50))
    numbers = [s["index"] for s in samples[:10]]
    assert numbers == sorted(set(numbers)) and numbers != list(range(10))


def test_what_opens_a_text_opens_every_window_and_is_not_counted(texts):
    model = Reading(prefix="^")
    samples = rows_of(PerplexityPlan(str(texts), windows=4, window_length=50), model)
    assert all(len(seen) == 50 and seen[0] == "^" for seen in model.seen)
    assert all(s["tokens"] == 49 and s["nats"] == sum(range(1, 50)) for s in samples)
    text = "".join(held_out(texts, "first"))
    assert model.seen[0][1:] == text[49 * samples[0]["index"] :][:49]


def test_the_seed_chooses_and_what_is_done_is_not_read_again(texts):
    plans = [PerplexityPlan(str(texts), 5, 50, seed) for seed in (1, 1, 2)]
    first, same, other = (rows_of(plan, Reading()) for plan in plans)
    assert first == same != other
    done = plans[0].done(first[:7])
    assert rows_of(plans[0], Reading(), done) == first[7:]


def test_text_too_short_for_a_window(texts):
    plan = PerplexityPlan(str(texts), windows=2, window_length=100_000)
    with pytest.raises(EvalError, match="--window-length 100000: no kind of text"):
        rows_of(plan, Reading())


def test_one_block_of_so_many_is_measured_and_the_stream_ends_with_one(texts):
    plan, all_blocks = (StreamPlan(str(texts), 1050, n, 100, 50) for n in (3, 1))
    model = Reading()
    samples, whole = rows_of(plan, model), rows_of(all_blocks, Reading())
    assert model.asked[0][1] == [2, 5, 8] and len(model.asked[0][0]) == 900
    assert model.asked[1][1] == [2, 5] and len(model.asked[1][0]) == 600
    assert [s["index"] for s in samples] == [2, 5, 8, 2, 5]
    found = {(s["kind"], s["index"]): s for s in whole}
    assert all(s["nats"] == found[s["kind"], s["index"]]["nats"] for s in samples)
    assert all(s["checksum"] == found[s["kind"], s["index"]]["checksum"] for s in samples)
    again = Reading()
    rows_of(plan, again, plan.done(samples[:1]))
    assert again.asked[0][1] == [5, 8]


def test_a_stream_is_whole_blocks_of_documents_one_after_the_other(texts):
    plan, model = StreamPlan(str(texts), 1000, 1, 100, 50), Reading()
    samples = rows_of(plan, model)
    documents = held_out(texts, "first")
    assert model.asked[0] == ("".join(documents)[:1000], list(range(10)))
    # The second kind has less than a whole stream, the third no two blocks.
    length = len("".join(held_out(texts, "second"))) // 100 * 100
    assert 200 <= length < 1000
    assert [len(text) for text, _ in model.asked] == [1000, length]
    first = [s for s in samples if s["kind"] == "first"]
    assert [s["stop"] for s in first] == [100 * (i + 1) for i in range(10)]
    assert [s["tokens"] for s in first] == [99] + [100] * 9  # nothing predicts the first token
    assert first[1]["nats"] == pytest.approx(sum(0.01 * p for p in range(100, 200)))
    assert first[1]["bytes"] == len("".join(documents)[100:200].encode("utf-8"))


def test_what_opens_a_text_opens_the_stream_alone(texts):
    model = Reading(prefix="^")
    samples = rows_of(StreamPlan(str(texts), 300, 1, 100, 50), model)
    assert [s["tokens"] for s in samples[:3]] == [100] * 3
    assert not any("^" in text for text, _ in model.asked)


def test_what_is_done_is_not_measured_again(texts):
    plan = StreamPlan(str(texts), 1000, 1, 100, 50)
    samples = rows_of(plan, Reading())
    model = Reading()
    assert rows_of(plan, model, plan.done(samples[:4])) == samples[4:]
    assert model.asked[0][1] == [4, 5, 6, 7, 8, 9]
    assert len(model.asked[0][0]) == 1000  # a state must see all of it


def test_too_little_text(texts):
    with pytest.raises(
        EvalError, match=r"--stream 1000000: no kind of text .* the 180000 held-out"
    ):
        rows_of(StreamPlan(str(texts), 10**6, 1, 90_000, 50), Reading())


def rows(kind: str, levels: list[float], **changes: Any) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "index": i, "stop": 100 * (i + 1), "tokens": 100, "bytes": 400,
         "nats": 100 * level, "checksum": i, **changes}
        for i, level in enumerate(levels)
    ]  # fmt: skip


def test_a_curve_and_its_trend_are_of_the_ratio_where_there_is_a_reference():
    hard = [2.0, 4.0, 3.0, 1.0, 5.0, 2.0, 2.0, 3.0]  # of the text
    extra = [0.1 * math.log2(100 * i + 50) for i in range(8)]  # of the length
    ours = rows("a", [x + y for x, y in zip(hard, extra, strict=True)])
    curve = curves(record_of(ours), record_of(rows("a", hard)))["a"]
    assert [point["ratio"] for point in curve["points"]] == pytest.approx([*map(math.exp, extra)])
    change = sum(extra[-2:]) / 2 - sum(extra[:2]) / 2
    assert curve["change"] == (pytest.approx(math.exp(change)), None, None)  # too few blocks
    alone = curves(record_of(ours), None)["a"]
    assert alone["points"][0] == {
        "stop": 100, "tokens": 100, "perplexity": pytest.approx(math.exp(2 + extra[0])),
        "ratio": None,
    }  # fmt: skip
    assert alone["change"][0] == pytest.approx(math.exp(2.5 - 3 + change))


def test_the_trend_of_a_flat_curve_has_an_interval_around_1():
    rng = np.random.default_rng(0)
    levels = (3 + 0.1 * rng.standard_normal(64)).tolist()
    change, low, high = curves(record_of(rows("a", levels)), None)["a"]["change"]
    assert low < change < high and low < 1 < high
    steep = rows("a", [x + i / 64 for i, x in enumerate(levels)])
    assert curves(record_of(steep), None)["a"]["change"][1] > 1


def test_one_block_is_no_curve():
    assert curves(record_of(rows("a", [1.0])), None) == {}


def test_table_and_json():
    plan = StreamPlan("t", 1600, 1, 100, 50)
    base, lola = Record(Setting("base", Path("/somewhere/a"))), Record(Setting("lola", Path("b")))
    base.samples, lola.samples = rows("a", [1.0] * 16), rows("a", [1.5] * 16)
    base.finished = True
    table = plan.table([base, lola], base)
    head = [cell.strip() for cell in table.splitlines()[2].split("|")[2:-1]]
    assert head == [
        *(f"{n:,}" for n in range(200, 1601, 200)),
        "last quarter / first",
    ]
    assert table.count("4.5, 1.649x") == 8 and "1.000x [1.000, 1.000]" in table
    assert "sees the 50 tokens before each block" in table
    found = plan.numbers(lola, base)["streams"]["a"]["points"]
    assert found[15]["ratio"] == pytest.approx(math.exp(0.5))
