"""Sessions made of others in the engine, beside the same in transformers."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lola_vllm.engine.hf import LolaCache
from tests.support.engine import ask, engine, scheduler, store_options
from tools.support.tiny import make_tiny, random_prompts

LOLA = {
    "window_size": 16, "sparse_cache_size": [[24, 9], 24], "hidden_state": [True, [False, True]],
    "sink_size": 2, "context_shift": 64,
}  # fmt: skip
NEW = 12


@torch.no_grad()
def in_transformers(model: Any, documents: list[list[int]], question: list[int]) -> list[int]:
    """Greedy tokens that answer a question to composed documents."""

    def read(ids: list[int], cache: LolaCache) -> int:
        out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return int(out.logits[0, -1].argmax())

    caches = [LolaCache(model.config) for _ in documents]
    for ids, cache in zip(documents, caches, strict=True):
        read(ids, cache)
    composed = LolaCache.compose(caches, model)
    answer = [read(question, composed)]
    while len(answer) < NEW:
        answer.append(read(answer[-1:], composed))
    return answer


@pytest.mark.parametrize("length", [4096, 256], ids=["one-context", "shifted"])
def test_the_engine_answers_as_transformers_do(tmp_path, length):
    directory = make_tiny(tmp_path / "tiny", LOLA, importance=True, max_position_embeddings=length)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    documents = random_prompts([117, 200, 64], seed=5)
    (question,) = random_prompts([21], seed=6)
    with engine(directory, max_num_seqs=8, **store_options()) as llm:
        for name, ids in zip("abc", documents, strict=True):
            ask(llm, ids, 1, save=name, answer=False)
        manager = scheduler(llm).get_kv_connector().scheduling.manager
        made = manager.call("compose", {"sources": ["a", "b@1", "c"], "to": "all"})
        assert made["made_of"] == ["a@1", "b@1", "c@1"]
        text = manager.call("tokens", {"reference": "all"})["tokens"]
        assert len(text) == 112 + 192 + 64
        tokens, told = ask(llm, text + question, NEW, from_="all", save="all")
        assert (told["restored_tokens"], told["turn"], told["reason"]) == (len(text), 2, None)
        assert tokens == in_transformers(model, documents, question)
        # Its next turn goes on from what it has seen, and no other request does.
        more = text + question + tokens
        _, told = ask(llm, [*more, 5], 1, from_="all", save="all")
        assert told["restored_tokens"] == len(more) - 1
        _, told = ask(llm, [*more, 5], 1, save=False)
        assert told["restored_tokens"] == 0
