"""Windows of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Prediction
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.training.texts import SEPARATOR
from tests.support.evaluations import Letters, held_out, rows_of


class Reading(Letters):
    """Finds every token half as likely as the last."""

    batch = 3

    def __init__(self, prefix: str = "") -> None:
        super().__init__(prefix)
        self.seen: list[str] = []

    def predictions(self, windows: list[list[int]]) -> list[list[Prediction]]:
        assert len(windows) <= self.batch
        self.seen += map(self.decode, windows)
        return [[Prediction(-float(i), i % 2 == 0) for i in range(1, len(w))] for w in windows]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for kind in ("first", "second"):
        documents = [f"{kind} {i}: " + "äb" * 60 for i in range(300)]
        (tmp_path / f"{kind}.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    return tmp_path


def test_windows_are_disjoint_pieces_of_held_out_text(texts: Path) -> None:
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


def test_what_opens_a_text_opens_every_window_and_is_not_counted(texts: Path) -> None:
    model = Reading(prefix="^")
    samples = rows_of(PerplexityPlan(str(texts), windows=4, window_length=50), model)
    assert all(len(seen) == 50 and seen[0] == "^" for seen in model.seen)
    assert all(s["tokens"] == 49 and s["nats"] == sum(range(1, 50)) for s in samples)
    text = "".join(held_out(texts, "first"))
    assert model.seen[0][1:] == text[49 * samples[0]["index"] :][:49]


def test_the_seed_chooses_and_what_is_done_is_not_read_again(texts: Path) -> None:
    plans = [PerplexityPlan(str(texts), 5, 50, seed) for seed in (1, 1, 2)]
    first, same, other = (rows_of(plan, Reading()) for plan in plans)
    assert first == same != other
    done = plans[0].done(first[:7])
    assert rows_of(plans[0], Reading(), done) == first[7:]


def test_text_too_short_for_a_window(texts: Path) -> None:
    plan = PerplexityPlan(str(texts), windows=2, window_length=100_000)
    with pytest.raises(EvalError, match="--window-length 100000: no kind of text"):
        rows_of(plan, Reading())
