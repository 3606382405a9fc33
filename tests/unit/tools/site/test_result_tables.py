"""benchmarks/results/: summaries, of which the tables of the pages are made."""

import json
import re

import pytest

from lola_vllm.evaluation import summary
from lola_vllm.evaluation.results import wilson
from tools.site import result_tables
from tools.site.summaries import RESULTS, ROOT, asked, of_both, together

files = pytest.mark.parametrize("file", sorted(RESULTS.iterdir()), ids=lambda path: path.stem)


@pytest.mark.parametrize("name", result_tables.PAGES)
def test_a_pages_tables_are_those_of_the_summaries(name):
    page = (ROOT / name).read_text()
    found = [match[1] for match in result_tables.MARK.finditer(page)]
    assert found and page.count("made by python -m tools.site.result_tables") == len(found)
    remedy = "run python -m tools.site.result_tables"
    assert result_tables.with_tables(page) == page, remedy


def test_every_table_is_on_one_page():
    pages = "".join((ROOT / name).read_text() for name in result_tables.PAGES)
    found = [match[1] for match in result_tables.MARK.finditer(pages)]
    assert sorted(found) == sorted(result_tables.TABLES)


@files
def test_a_summary_says_what_made_it_and_has_no_answers(file):
    runs = json.loads(file.read_text())
    assert file.read_text() == summary.text(runs), "write it with lola_vllm.evaluation.summary.text"
    for run in runs:
        assert run["made_by"] and re.fullmatch(r"20\d\d-\d\d-\d\d", run["date"])
        assert "answer" not in json.dumps(run).replace("answers_that_differ", "")


@files
def test_intervals_are_those_of_the_counts(file):
    def cells(value):
        if isinstance(value, dict):
            if {"exact", "samples", "low", "high"} <= set(value):
                yield value
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                yield from cells(inner)

    for cell in cells(json.loads(file.read_text())):
        expected = wilson(cell["exact"], cell["samples"])
        assert (cell["low"], cell["high"]) == pytest.approx(expected, rel=1e-5)


def test_a_summary_leaves_out_answers_only(tmp_path):
    cell = {"task": "niah-1", "exact": 1, "samples": 3, "low": 0.12345678912}
    setting = {"name": "a", "cells": [cell], "samples": [{"answer": "7"}], "sizes": [[1, 2], [3]]}
    report = {"settings": [setting], "asked": [{"answer": "8"}], "samples": [{"tokens": 9}]}
    path = tmp_path / "made" / "recall.summary.json"
    summary.write(path, report, "a test")
    found = json.loads(path.read_text())
    assert found.pop("made_by") == "a test" and found.pop("date")
    kept = {"task": "niah-1", "exact": 1, "samples": 3, "low": 0.123456789}
    assert found == {
        "settings": [{"name": "a", "cells": [kept], "sizes": [[1, 2], [3]]}],
        "samples": [{"tokens": 9}],
    }


def recall_run(seed, exact, name="a", samples=3):
    low, high = wilson(exact, samples)
    cell = {"task": "vt", "length": 2048, "exact": exact, "samples": samples}
    cell |= {"low": low, "high": high, "rate": exact / samples}
    setting = {"name": name, "fingerprint": "f", "cells": [cell]}
    return {"plan": {"seed": seed, "samples": samples}, "settings": [setting]}


def test_seeds_of_the_same_questions_count_together():
    runs = [recall_run(1, 1), recall_run(2, 3)]
    ((key, cell),) = together(asked(runs, "a")).items()
    assert key == ("vt", 2048) and (cell["exact"], cell["samples"]) == (4, 6)
    assert (cell["low"], cell["high"]) == wilson(4, 6) and cell["rate"] == pytest.approx(2 / 3)


def test_what_both_were_asked_counts_and_what_one_was_asked_alone_does_not():
    base, other = (recall_run(seed, exact, "softmax base") for seed, exact in ((1, 3), (2, 1)))
    ships = recall_run(1, 2)
    both = of_both([base, other, ships], ["softmax base", "a"])
    found = {name: [(x["exact"], x["samples"]) for x in both[name].values()] for name in both}
    assert found == {"softmax base": [(3, 3)], "a": [(2, 3)]}
    # Of another number of samples the same seed hides things elsewhere: it is another question.
    ships["plan"]["samples"] = 4
    both = of_both([base, other, ships], ["softmax base", "a"])
    assert not both["a"] and not both["softmax base"]


@pytest.mark.parametrize(
    ("seed", "fingerprint", "message"),
    [(1, "f", "count twice"), (2, "g", "vt at 2048: of the models f, g; leave")],
)
def test_no_question_counts_twice_and_no_other_model(seed, fingerprint, message):
    runs = [recall_run(1, 1), recall_run(seed, 2, samples=4)]
    runs[1]["settings"][0]["fingerprint"] = fingerprint
    with pytest.raises(ValueError, match=message):
        together(asked(runs, "a"))
