"""Scoring, confidence intervals, summaries and tables of `lola-vllm eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.perplexity import PerplexityPlan, readings
from lola_vllm.evaluation.recall import judge, recall_cells, recall_numbers, recall_table
from lola_vllm.evaluation.results import Record, exp_mean, share, wilson, write
from lola_vllm.evaluation.settings import SequenceMemory, Setting
from tests.support.evaluations import record_of

UUID = "438584a2-6a23-48b8-a21e-b6c15e265f5a"


@pytest.mark.parametrize(
    ("expected", "answer", "exact", "match", "share"),
    [
        (["1234567"], " 1234567.", True, 1, 1),
        (["1234567"], "", False, 0, 0),
        (["1234567"], "no number", False, 0, 0),
        (["1234567"], " 1234568, or so", False, 0, 6 / 7),
        (["1234567"], " 123", False, 0, 3 / 7),
        (["1234567"], " 2345671", False, 0, 0),  # right digits in wrong places
        (["1234567"], " 7, then 1234569", False, 0, 6 / 7),  # the best number counts
        (["1234567"], "12345671234567", True, 1, 1),  # RULER's rule: it occurs
        ([UUID], f" {UUID.upper()}\nand", True, 1, 1),
        ([UUID], " 438584a2-6a23", False, 0, 13 / 36),
        (["ABCDE", "FGHIJ"], "abcde FGHIX", False, 0.5, 0.5),
        (["ABCDE", "FGHIJ"], "FGHIJ ABCDE", True, 1, 1),
    ],
)
def test_judge(expected: list[str], answer: str, exact: bool, match: float, share: float) -> None:
    score = judge(expected, answer)
    assert score == {"exact": exact, "match": match, "share": pytest.approx(share)}


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # computed with scipy.stats.binomtest(...).proportion_ci(method="wilson")
        (0, 50, 0.0, 0.07134759913335872),
        (50, 50, 0.9286524008666412, 1.0),
        (49, 50, 0.8950455641036218, 0.9964607407283538),
        (31, 50, 0.4815044693099298, 0.7413721068980641),
        (1, 1, 0.20654931437723745, 1.0),
    ],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_count(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, trials)


def test_exp_mean_is_perplexity_with_an_interval_that_covers() -> None:
    rng = np.random.default_rng(1)
    tokens = np.full(64, 100.0)
    truth, hits = 3.0, 0
    for _ in range(100):
        nats = 100 * rng.normal(truth, 0.3, size=64)
        value, low, high = exp_mean(nats, tokens)
        assert value == pytest.approx(math.exp(nats.mean() / 100))
        assert low < value < high
        hits += low <= math.exp(truth) <= high
    assert 85 <= hits <= 100


def test_exp_mean_weighs_windows_by_their_tokens() -> None:
    value, *_ = exp_mean(np.array([10.0, 30.0]), np.array([10.0, 10.0]))
    assert value == pytest.approx(math.exp(2))
    value, *_ = exp_mean(np.array([10.0, 60.0]), np.array([10.0, 30.0]))
    assert value == pytest.approx(math.exp(70 / 40))


def sample(exact: bool, **changes: Any) -> dict[str, Any]:
    share = 1.0 if exact else 0.5
    row = {"task": "niah-1", "length": 512, "depth": 0.1, "exact": exact, "match": float(exact)}
    return {**row, "share": share, **changes}


def test_cells() -> None:
    samples = [sample(True), sample(False), sample(True), sample(True)]
    cell = recall_cells(samples)["niah-1", 512, 0]
    assert (cell["samples"], cell["exact"], cell["rate"], cell["match"]) == (4, 3, 0.75, 0.75)
    assert cell["share"] == pytest.approx(0.875)
    assert (cell["low"], cell["high"]) == wilson(3, 4)
    cells = recall_cells([sample(True), sample(False, length=1024), sample(True, task="vt", aim=9)])
    assert list(cells) == [("niah-1", 512, 0), ("niah-1", 1024, 0), ("vt", 512, 9)]


def window(kind: str, index: int, nats: float, checksum: int = 7) -> dict[str, Any]:
    return {
        "kind": kind,
        "index": index,
        "tokens": 10,
        "bytes": 40,
        "nats": nats,
        "checksum": checksum,
    }


def test_readings_are_paired_with_the_reference_by_window() -> None:
    reference = [window("a", 0, 20), window("a", 1, 40), window("b", 0, 30)]
    ours = [window("b", 0, 31), window("a", 1, 41), window("a", 0, 21)]  # in another order
    found = readings(record_of(ours), record_of(reference))
    assert list(found) == ["b", "a", "all"]
    # Every window is worse by the same: the pairing leaves no doubt, the texts differ a lot.
    for reading in found.values():
        assert reading["ratio"] == pytest.approx((math.exp(0.1),) * 3)
    assert found["a"]["perplexity"][0] == pytest.approx(math.exp(62 / 20))
    assert found["a"]["perplexity"][1] < found["a"]["perplexity"][2]
    assert found["all"]["bits_per_byte"] == pytest.approx(93 / math.log(2) / 120)
    for other in (None, record_of(reference, finished=False)):
        assert readings(record_of(ours), other)["a"]["ratio"] is None


def test_another_tokenizers_windows_do_not_compare() -> None:
    for other in ([window("a", 0, 20, checksum=8)], [window("a", 1, 20)]):
        with pytest.raises(EvalError, match="other tokens"):
            readings(record_of([window("a", 0, 20)]), record_of(other))


def records() -> list[Record]:
    plain = Record(
        Setting("base", Path("/somewhere/base")), memory=SequenceMemory(1024, None, None)
    )
    lola = Record(Setting("small", Path("/somewhere/lola"), {"window_size": 8}))
    lola.memory = SequenceMemory(1024, 2**18, {"window_size": 8, "update_interval": 2})
    plain.finished = True
    plain.samples = [sample(True, length=n) for n in (512, 1024) for _ in range(4)]
    lola.samples = [sample(i > 0) for i in range(4)]
    return [plain, lola]


def test_recall_table_and_json() -> None:
    table = recall_table(records())
    assert "### niah-1" in table
    assert "| base " in table and "100% [51%, 100%]" in table
    assert "75% [30%, 95%] parts 88%" in table
    assert "| small   | 0.2, 2.0x | 0.2, 4.0x |" in table  # 256 KiB beside 0.5 and 1 MiB
    assert "| base    | 0.5, 1.0x | 1.0, 1.0x |" in table
    rows = [{**record.to_json(), **recall_numbers(record)} for record in records()]
    assert "somewhere" not in json.dumps(rows)  # results may be published
    assert rows[1]["model"] == "lola"
    (cell,) = rows[1]["cells"]
    assert cell["bytes_per_sequence"] == 2**18 and cell["full_kv_over_bytes"] == 2.0
    assert [c["bytes_per_sequence"] for c in rows[0]["cells"]] == [2**19, 2**20]


def test_perplexity_table_compares_with_the_reference_alone() -> None:
    base, lola = records()
    base.samples, lola.samples = ([window("a", i, n) for i in (0, 1)] for n in (20, 21))
    table = PerplexityPlan("t").table([base, lola], base)
    (row,) = [line for line in table.splitlines() if line.startswith("| a")]
    assert row.count("x [") == 1 and "1.105x [1.105, 1.105]" in row
    base.finished = False  # not all of its windows are there
    assert "x [" not in PerplexityPlan("t").table([base, lola], base)


def recalled(nats: float, first: int, exact: int) -> dict[str, float]:
    """What a window says again: 5 tokens of repeated n-grams, 4 last words."""
    return {
        "repeated": 5,
        "repeated_nats": nats,
        "repeated_first": first,
        "cloze": 4,
        "cloze_exact": exact,
    }


def test_what_is_said_again_is_compared_with_the_reference() -> None:
    base, lola = records()
    base.samples = [{**window("a", i, 20), **recalled(2, 4, 4 - 2 * i)} for i in (0, 1)]
    lola.samples = [{**window("a", i, 21), **recalled(3, 3, 2 - i)} for i in (0, 1)]
    repeats = readings(lola, base)["a"]["repeats"]
    assert (repeats["words"], repeats["tokens"], repeats["first"]) == (8, 10, 0.6)
    assert (repeats["cloze"][0], repeats["cloze_ratio"][0]) == (3 / 8, 0.5)
    assert repeats["perplexity"][0] == pytest.approx(math.exp(3 / 5))
    assert repeats["ratio"] == pytest.approx([math.exp(1 / 5)] * 3)
    table = PerplexityPlan("t").table([base, lola], base)
    (row,) = [line for line in table.splitlines() if line.startswith("| a: cloze")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "8", "75.0%", "37.5%, 0.50x [0.50, 0.50]",
    ]  # fmt: skip
    assert "1.82, 1.221x [1.221, 1.221]" in table


def test_one_window_has_no_interval() -> None:
    """Resampled, it is always itself, which would look like a result without any doubt."""
    base, lola = records()
    base.samples = [{**window("a", 0, 20), **recalled(2, 4, 4)}]
    lola.samples = [{**window("a", 0, 21), **recalled(3, 3, 2)}]
    table = PerplexityPlan("t").table([base, lola], base)
    assert table.count("x [-]") == 3 and table.count("[") == 3
    assert "1.105x [-]" in table and "0.50x [-]" in table and "1.221x [-]" in table


def test_windows_of_an_older_file_say_nothing_of_repeats() -> None:
    assert readings(record_of([window("a", 0, 20)]), None)["a"]["repeats"] is None


def test_share_of_sums_and_its_interval() -> None:
    part, whole = np.array([1.0, 0.0, 3.0]), np.array([2.0, 2.0, 4.0])
    value, low, high = share(part, whole)
    assert value == 0.5 and 0 <= low < 0.5 < high <= 0.75
    assert all(map(math.isnan, share(part, 0 * whole)))


def test_a_share_of_what_resamples_lack_has_no_upper_bound() -> None:
    value, low, high = share(np.array([1.0, 1.0]), np.array([0.0, 1.0]))
    assert (value, low, high) == (2.0, 1.0, math.inf)


def test_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write(path, {"a": 1})
    write(path, {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert list(tmp_path.iterdir()) == [path]
