"""benchmarks/results/: summaries, of which the tables of the pages are made."""

import json
import re

import pytest

from lola_vllm.evaluation import summary
from lola_vllm.evaluation.results import wilson
from tools.site import result_tables
from tools.site.summaries import RESULTS, ROOT, asked, of_both, pooled, together

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


def recall_run(seed, exact, **plan):
    samples = 3
    low, high = wilson(exact, samples)
    cell = {"task": "vt", "exact": exact, "samples": samples, "low": low, "high": high}
    cell |= {"match": exact / 3, "share": exact / 3, "rate": exact / 3}
    setting = {"name": "a", "fingerprint": "f", "seconds": 2.0, "cells": [cell]}
    plan = {"tasks": ["vt"], "seed": seed, **plan}
    run = {"evaluation": "recall", "plan": plan, "batch": 2, "machine": {"cores": 2}}
    return {**run, "date": f"2026-01-0{seed}", "settings": [setting]}


def test_seeds_of_the_same_questions_count_together():
    other = recall_run(1, 1, tasks=["niah-1"])
    stream = {"evaluation": "stream", "plan": {"seed": 1}}
    first, same, *rest = pooled([recall_run(1, 1), other, recall_run(2, 3), stream, stream])
    assert same == other and rest == [stream, stream]
    assert first["plan"]["seed"] == [1, 2] and first["date"] == "2026-01-02"
    (setting,) = first["settings"]
    (cell,) = setting["cells"]
    assert (cell["exact"], cell["samples"], setting["seconds"]) == (4, 6, 4.0)
    assert (cell["low"], cell["high"]) == wilson(4, 6) and cell["rate"] == pytest.approx(2 / 3)
    changed = recall_run(2, 1)
    changed["settings"][0]["fingerprint"] = "another"
    assert len(pooled([recall_run(1, 1), changed])) == 2
    with pytest.raises(ValueError, match="count twice"):
        pooled([recall_run(1, 1), recall_run(1, 2)])


def test_what_both_were_asked_counts_and_what_one_was_asked_alone_does_not():
    base, other = recall_run(1, 3, samples=3), recall_run(2, 1, samples=3)
    for run, name in ((base, "softmax base"), (other, "softmax base")):
        run["settings"][0]["name"] = name
    ships = recall_run(1, 2, samples=3)
    for run in (base, other, ships):
        run["settings"][0]["cells"][0]["length"] = 2048
    both, alone = of_both([base, other, ships], ["softmax base", "a"])
    counts = {name: (cell["exact"], cell["samples"]) for name, (cell,) in cells_of(both)}
    assert counts == {"softmax base": (3, 3), "a": (2, 3)}
    assert [cell["exact"] for cell in alone["softmax base"].values()] == [1] and not alone["a"]
    # Of another number of samples the same seed hides things elsewhere: it is another question.
    ships["plan"]["samples"] = 4
    both, alone = of_both([base, other, ships], ["softmax base", "a"])
    assert not both["a"] and [cell["exact"] for cell in alone["a"].values()] == [2]


def cells_of(found):
    return [(name, list(cells.values())) for name, cells in found.items()]


@pytest.mark.parametrize(
    ("seed", "fingerprint", "message"),
    [(1, "f", "count twice"), (2, "g", "vt at 2048: of the models f, g; leave")],
)
def test_no_question_counts_twice_and_no_other_model(seed, fingerprint, message):
    runs = [recall_run(1, 1, samples=3), recall_run(seed, 2, samples=4)]
    runs[1]["settings"][0]["fingerprint"] = fingerprint
    for run in runs:
        run["settings"][0]["cells"][0]["length"] = 2048
    with pytest.raises(ValueError, match=message):
        together(asked(runs, "a"))
