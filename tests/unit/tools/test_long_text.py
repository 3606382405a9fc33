"""A very long text: how it is composed, and the tool that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.training.texts import SEPARATOR, is_held_out
from tools import endless
from tools.long_text import compose
from tools.support.speaking import make_speaking


class Letters:
    def encode(self, text: str, *, special: bool) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("texts")
    for kind in ("one", "two"):
        documents = [f"{kind} {i} says that {i * 7919 % 977} is {i}." for i in range(400)]
        (out / f"{kind}.txt").write_text(SEPARATOR.join(documents))
    return out


def documents(text: str) -> list[str]:
    return text.split("\n\n")


def test_held_out_documents_stand_at_both_ends_and_none_twice(texts: Path) -> None:
    text = compose(Letters(), texts, 6000, 300)
    whole = Letters().decode(text.ids)
    assert len(whole) == 6000 and text.about["tokens"] == 6000
    for end in (documents(whole[:300]), documents(whole[-300:])):
        assert all(map(is_held_out, end[:-1])) and len(end) > 5
        assert {document[:3] for document in end[:4]} == {"one", "two"}
    held_out = text.about["held_out_tokens"]
    assert 600 < held_out < 2400
    middle = documents(whole[held_out - 300 : -300])[1:-1]  # after the held-out ones
    assert not any(map(is_held_out, middle)) and len(middle) > 50
    complete = [d for d in documents(whole) if d.endswith(".")]
    assert len(complete) == len(set(complete))


def test_too_little_text(texts: Path) -> None:
    with pytest.raises(EvalError, match=r"--edge 5000: the held-out documents .* twice the edge"):
        compose(Letters(), texts, 20_000, 5000)
    with pytest.raises(EvalError, match=r"--tokens 90000: the documents at .* give more text"):
        compose(Letters(), texts, 90_000, 300)
    with pytest.raises(EvalError, match="no text there"):
        compose(Letters(), texts / "no", 100, 10)


def measured(model: Path, texts: Path, *options: str) -> dict[str, Any]:
    argv = ["--model", str(model), "--texts", str(texts), "--tokens", "2000", "--edge", "300"]
    argv += ["--every", "250", "--needle-every", "600", "--dtype", "float32", "--worse", "9"]
    return endless.measure(endless.parse([*argv, *options]))


def test_a_text_beyond_the_models_positions_is_read_and_asked(tmp_path: Path, texts: Path) -> None:
    model = make_speaking(tmp_path / "tiny", max_position_embeddings=256)
    lola = ["--lola-config", '{"context_shift": 64}']
    report = measured(model, texts, *lola, "--ask-after", "100", "700")
    assert report["faults"] == [] and not report["untrained_positions"]
    assert [sample["tokens"] for sample in report["samples"]] == list(range(250, 2001, 250))
    found = {key: row["asked"] for key, row in report["needles"].items()}
    assert found == {"100": 3, "700": 2}  # needles at 600, 1200 and 1800; the last too late
    assert {row["expected"] in row["answer"] for row in report["asked"]} <= {False, True}
    # Questions are put to copies of the state.
    silent = measured(model, texts, *lola, "--ask-after")
    assert silent["needles"] == {}
    assert silent["perplexity"] == pytest.approx(report["perplexity"], rel=1e-6)
    run_on = measured(model, texts, "--ask-after")
    assert run_on["untrained_positions"]
    assert run_on["perplexity"]["last"] != pytest.approx(silent["perplexity"]["last"], rel=1e-6)


def test_options_that_do_not_fit(tmp_path: Path, texts: Path) -> None:
    with pytest.raises(EvalError, match="--edge 1500: must be from 1 to half of --tokens 2000"):
        measured(tmp_path, texts, "--edge", "1500")


def test_faults() -> None:
    args = endless.parse(["--model", "m", "--texts", "t"])
    samples = [{"memory_mib": 100.0, "us_per_token": 50.0} for _ in range(8)]
    report: dict[str, Any] = {"samples": samples, "perplexity": {"last_over_afresh": 1.0}}
    assert endless.judge(report, args) == []
    report["perplexity"]["last_over_afresh"] = 1.5
    grown = [{**s, "memory_mib": 100.0 + 10 * i} for i, s in enumerate(samples)]
    slower = [{**s, "us_per_token": 50.0 + 10 * i} for i, s in enumerate(grown)]
    faults = endless.judge({**report, "samples": slower}, args)
    assert [fault.split()[0] for fault in faults] == ["the", "memory", "time"]
    assert json.dumps(faults)
