"""Scoring, confidence intervals, summaries and tables of `lola-vllm eval`."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.perplexity import PerplexityPlan, readings
from lola_vllm.evaluation.recall import RecallPlan, judge, recall_cells
from lola_vllm.evaluation.results import Record, exp_mean, share, wilson
from lola_vllm.evaluation.settings import Setting
from tests.support.evaluations import record_of

UUID = "438584a2-6a23-48b8-a21e-b6c15e265f5a"


@pytest.mark.parametrize(
    ("expected", "answer", "exact", "match"),
    [
        (["1234567"], " 1234567.", True, 1),
        (["1234567"], "", False, 0),
        (["1234567"], " 1234568, or so", False, 0),
        (["1234567"], "12345671234567", True, 1),  # RULER's rule: it occurs
        ([UUID], f" {UUID.upper()}\nand", True, 1),
        (["ABCDE", "FGHIJ"], "abcde FGHIX", False, 0.5),
        (["ABCDE", "FGHIJ"], "FGHIJ ABCDE", True, 1),
    ],
)
def test_judge(expected, answer, exact, match):
    assert judge(expected, answer) == {"exact": exact, "match": match}


def test_an_answer_that_must_begin_with_what_is_expected():
    expected = ("left=left, right=right)",)
    assert judge(expected, " left=left, right=right)\n\nmore", begins=True)["exact"]
    for answer in ("right=right, left=left)", "left=left, right=1)", f"a=a, {expected[0]}"):
        assert not judge(expected, answer, begins=True)["exact"]


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
def test_wilson(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_count(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, trials)


def test_exp_mean_is_perplexity_with_an_interval_that_covers():
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
    value, *_ = exp_mean(np.array([10.0, 60.0]), np.array([10.0, 30.0]))
    assert value == pytest.approx(math.exp(70 / 40))  # windows weigh by their tokens


def test_share_of_sums_and_its_interval():
    value, low, high = share(np.array([1.0, 0.0, 3.0]), np.array([2.0, 2.0, 4.0]))
    assert value == 0.5 and 0 <= low < 0.5 < high <= 0.75
    # What resamples lack has no upper bound.
    assert share(np.array([1.0, 1.0]), np.array([0.0, 1.0])) == (2.0, 1.0, math.inf)


def sample(exact: bool, match: float | None = None, **changes: Any) -> dict[str, Any]:
    row = {"task": "niah-1", "length": 512, "exact": exact}
    return {**row, "match": float(exact) if match is None else match, **changes}


def test_cells():
    samples = [sample(True), sample(False, 0.5), sample(True), sample(True)]
    cell = recall_cells(samples)["niah-1", 512, 0]
    assert (cell["samples"], cell["exact"], cell["rate"], cell["match"]) == (4, 3, 0.75, 0.875)
    assert (cell["low"], cell["high"]) == wilson(3, 4)
    cells = recall_cells([sample(True), sample(False, length=1024), sample(True, task="vt", aim=9)])
    assert list(cells) == [("niah-1", 512, 0), ("niah-1", 1024, 0), ("vt", 512, 9)]


def records(of_base: list[Any], of_lola: list[Any]) -> list[Record]:
    base, lola = (Record(Setting(name, Path("a"))) for name in ("base", "small"))
    base.samples, lola.samples, base.finished = of_base, of_lola, True
    return [base, lola]


def test_recall_table_and_json():
    plan = RecallPlan(["niah-1"], [512])
    all_found = [sample(True, length=n) for n in (512, 1024) for _ in range(4)]
    found = records(all_found, [sample(False, 0.5), *[sample(True)] * 3])
    table = plan.table(found, None)
    assert table.startswith("### niah-1\n\n| setting |") and "Exact answers of 4 by" in table
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["base", "100% [51%, 100%]", "100% [51%, 100%]"] in lines
    assert ["small", "75% [30%, 95%], 88%", ""] in lines
    (cell,) = plan.numbers(found[1], None)["cells"]
    assert (cell["task"], cell["length"], cell["exact"]) == ("niah-1", 512, 3)
    found = records([sample(True, aim=n, length=n + 500) for n in (1000, 4000)], [])
    head = plan.table(found, None).splitlines()[2]
    assert [cell.strip() for cell in head.split("|")[2:-1]] == [
        "1,500, 1,000 back",
        "4,500, 4,000 back",
    ]
    assert plan.numbers(found[0], None)["cells"][1]["distance"] == 4000


def window(kind: str, index: int, nats: float, checksum: int = 7) -> dict[str, Any]:
    found = {"kind": kind, "index": index, "tokens": 10, "bytes": 40}
    return {**found, "nats": nats, "checksum": checksum}


def test_readings_are_paired_with_the_reference_by_window():
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


def test_another_tokenizers_windows_do_not_compare():
    for other in ([window("a", 0, 20, checksum=8)], [window("a", 1, 20)]):
        with pytest.raises(EvalError, match="other tokens"):
            readings(record_of([window("a", 0, 20)]), record_of(other))


def test_perplexity_table_compares_with_the_reference_alone():
    base, lola = records(*([window("a", i, n) for i in (0, 1)] for n in (20, 21)))
    table = PerplexityPlan("t").table([base, lola], base)
    (row,) = [line for line in table.splitlines() if line.startswith("| a")]
    assert row.count("x [") == 1 and "1.105x [1.105, 1.105]" in row
    for record in (base, lola):  # one window has no interval
        del record.samples[1]
    assert "1.105x [-]" in PerplexityPlan("t").table([base, lola], base)
    base.finished = False  # not all of its windows are there
    assert "x [" not in PerplexityPlan("t").table([base, lola], base)
