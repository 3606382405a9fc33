"""Texts read in pieces are the same as texts read at once, and questions change no state."""

import json
from typing import Any

import pytest
import torch

from lola_vllm.evaluation import EvalError, reader
from lola_vllm.evaluation.models import Prediction, Stop
from lola_vllm.evaluation.reader import Reader, Run, load
from lola_vllm.evaluation.settings import Setting
from tests.support.families import make_base
from tools.support.tiny import random_prompts

BLOCK = 60


def at_once(model: Any, ids: list[int], last: int = 0) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, or of the last ones, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return logprobs[-last:]


def check(found: list[Prediction], wanted: torch.Tensor) -> None:
    logprobs = torch.tensor([value.logprob for value in found])
    torch.testing.assert_close(logprobs, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [[], [7, 8]])
@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [1, 3]])
def test_a_lola_model_reads_with_one_state(lola, monkeypatch, prefix, wanted):
    monkeypatch.setattr(reader, "PIECE", 25)
    (ids,) = random_prompts([4 * BLOCK])
    setting = Setting("a", lola, {"sparse_cache_size": 8})
    whole = load(setting, "float32")
    assert whole.config.lola.sparse_cache_size == 8
    expected = at_once(whole, prefix + ids)
    found = dict(Reader(setting, "float32").read_blocks(prefix, ids, BLOCK, 10, wanted))
    assert list(found) == wanted
    lead = len(prefix) - 1
    for index, values in found.items():
        check(values, expected[max(0, index * BLOCK + lead) : (index + 1) * BLOCK + lead])


def test_a_softmax_model_sees_the_context_before_each_block_alone(llama):
    (ids,) = random_prompts([4 * BLOCK])
    whole = load(Setting("a", llama), "float32")
    model = Reader(Setting("a", llama), "float32")
    for index, values in model.read_blocks([5], ids, BLOCK, 70, [0, 1, 3]):
        start = max(0, index * BLOCK - 70)
        check(values, at_once(whole, [5, *ids[start : (index + 1) * BLOCK]], BLOCK))


@pytest.mark.parametrize("kind", ["lola", "llama"])
def test_every_question_is_asked_from_the_state_of_its_stop(kind, request):
    """A softmax model sees its last positions, and the floor 200 tokens."""
    setting = Setting("a", request.getfixturevalue(kind))
    ids, *questions = [[i % 300 for i in ids] for ids in random_prompts([500, 25, 25, 25, 9])]
    asked = [(question, 12) for question in questions[:3]] + [(questions[3], 1)]
    stops = [Stop(480, asked), Stop(500, asked[::-1])]
    found = Reader(setting, "float32", batch=2).ask(ids, stops, 200)
    whole = load(setting, "float32")
    begin = 0 if kind == "lola" else 500 - (400 - 25)
    for (at, of_stop), answers in zip(stops, found, strict=True):
        assert answers.reach == at - begin and (answers.floor is None) == (kind == "lola")
        for start, predicted in ((begin, answers.read), (at - 200, answers.floor or [])):
            for (question, size), values in zip(of_stop, predicted, strict=bool(predicted)):
                check(values, at_once(whole, ids[start:at] + question, size))


def test_questions_of_a_model_with_a_sliding_window(tmp_path):
    model = make_base(tmp_path, "mistral", sliding_window=30).eval()
    ids, *questions = [[i % 300 for i in ids] for ids in random_prompts([60, 25, 25])]
    run = Run(model)
    run.read(ids)
    for question, values in zip(questions, run.ask([(q, 12) for q in questions], 5), strict=True):
        check(values, at_once(model, ids + question, 12))


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(EvalError, match="transformers cannot load it"):
        load(Setting("a", tmp_path), "float32")
    with pytest.raises(EvalError, match="its tokenizer cannot be loaded"):
        Reader(Setting("a", tmp_path), "float32")
