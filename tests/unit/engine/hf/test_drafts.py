"""Tokens that a cache forgets, and assisted decoding, which lives on it."""

import copy
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from lola_vllm.engine.hf import LolaCache, LolaModelError
from lola_vllm.models.init import init_checkpoint
from tests.support.families import make_base
from tools.support.tiny import VOCAB, make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": [[24, 9], 24], "sink_size": 2, "update_interval": 8}
CLOSE = {"rtol": 0, "atol": 1e-9}
NEW = 100


@pytest.fixture(scope="module", params=[0, 16], ids=["", "shifts"])
def model(request, tmp_path_factory) -> Any:
    """In float64; with context shifts, some of them within an answer."""
    lola = {**LOLA, "context_shift": request.param}
    length = 64 if request.param else 4096
    directory = make_tiny(tmp_path_factory.mktemp("tiny"), lola, max_position_embeddings=length)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


def read(model: Any, ids: torch.Tensor, cache: LolaCache | None = None, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **inputs)


@pytest.mark.parametrize("at", [41, 44, 47, 57, 60])
def test_a_cache_forgets_what_it_read_since_an_update(model, at):
    ids, others = (torch.tensor(random_prompts([120, 120], seed=s)) for s in (1, 2))
    cache = read(model, ids[:, :at]).past_key_values
    kept = copy.deepcopy(cache)
    for count in {0, (7 - at % 8) // 2, 7 - at % 8}:
        read(model, others[:, :count], cache) if count else None
        cache.crop(-count)
        assert cache.get_seq_length() == at
    after, expected = (read(model, ids[:, at:], c).logits for c in (cache, kept))
    torch.testing.assert_close(after, expected, **CLOSE)


def test_what_cannot_be_forgotten_is_refused_and_changes_nothing(model):
    ids = torch.tensor(random_prompts([50, 50]))
    cache = read(model, ids).past_key_values
    for count, words in (
        (-3, "a state of 50 tokens does not go back to 47, as an update, every 8 tokens"),
        (-51, "more than the cache has seen"),
        (48, "as a negative number"),
    ):
        with pytest.raises(LolaModelError, match=rf"crop\({count}\): .*{words}.*copy\.deepcopy"):
            cache.crop(count)
    assert [layer.num_tokens.tolist() for layer in cache.layers] == [[50, 50]] * 2
    cache.crop(-2)
    mask = torch.ones(2, 52)
    mask[1, 50] = 0
    read(model, ids[:, :4], cache, attention_mask=mask)
    cache.crop(-1)
    with pytest.raises(LolaModelError, match=r"crop\(-1\): among them is padding"):
        cache.crop(-1)


def test_a_cache_does_not_go_back_across_a_context_shift(tmp_path):
    lola = {**LOLA, "update_interval": 24, "context_shift": 16}
    directory = make_tiny(tmp_path, lola, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    cache = read(model, torch.tensor(random_prompts([66]))).past_key_values
    with pytest.raises(LolaModelError, match=r"66 tokens does not go back to 63"):
        cache.crop(-3)
    cache.crop(-1)
    with pytest.raises(LolaModelError, match=r"65 tokens does not go back to 64"):
        cache.crop(-1)


def stock() -> Any:
    """A stock model of the same tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=2, initializer_range=0.5, **sizes)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("by", ["lookup", "assistant"])
def test_assisted_decoding_changes_no_token(model, by, padding, monkeypatch):
    (prompt,) = random_prompts([41], seed=3)
    ids = torch.tensor([[7] * padding + prompt])
    mask = torch.tensor([[0] * padding + [1] * len(prompt)])
    given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 7}
    expected = model.generate(ids, **given)
    calls: list[int] = []
    hook = model.model.register_forward_hook(lambda _, __, out: calls.append(out[0].shape[1]))
    helped: dict[str, Any] = {"assistant_model": stock()}
    if by == "lookup":
        helped = {"prompt_lookup_num_tokens": 6}
        rng = random.Random(0)

        def planned(_: Any, known: torch.Tensor) -> tuple[torch.Tensor, None]:
            """What comes, now and then with a fault."""
            found = expected[:, : known.shape[1] + rng.choice([0, 2, 6, 6])].clone()
            if found.shape[1] > known.shape[1] and rng.random() < 0.5:
                found[0, rng.randrange(known.shape[1], found.shape[1])] = 1
            return found, None

        monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", planned)
    found = model.generate(ids, **given, **helped)
    hook.remove()
    assert torch.equal(found, expected)
    assert max(calls[1:]) > 2  # candidates were checked
    if by == "lookup":
        assert len(calls) < 0.7 * NEW and sum(calls[1:]) > 1.1 * NEW  # accepted, and rejected


def test_a_sliding_layer_forgets_nothing_and_checks_no_candidates(tmp_path):
    make_base(tmp_path / "base", "olmo3")
    init_checkpoint(tmp_path / "base", tmp_path / "lola", {"window_size": 8})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lola").eval()
    ids = torch.tensor([[5, 6, 7, 8] * 10])
    cache = read(model, ids).past_key_values
    with pytest.raises(LolaModelError, match=r"crop\(-1\): a state of 40 tokens"):
        cache.crop(-1)
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 7}
    found = model.generate(ids, prompt_lookup_num_tokens=3, **given)
    assert torch.equal(found, model.generate(ids, **given))
