"""The Hugging Face model: the reference's function, however it is called."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.ops.compose import ComposeError
from lola_vllm.engine.hf import LolaCache, LolaForCausalLM, LolaModelError
from lola_vllm.models.init import init_checkpoint
from tests.support.families import make_base
from tests.support.oracle import Oracle
from tools.support.tiny import make_tiny, random_prompts

# The heads of the first layer have a page each.
LOLA = {"window_size": 16, "sparse_cache_size": [[24, 9], 24], "sink_size": 2}
# LlamaRMSNorm rounds to float32 on the way, whatever the model's dtype.
CLOSE = {"rtol": 0, "atol": 1e-5}


def load(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), LOLA)


@pytest.fixture(scope="module")
def model(tiny) -> Any:
    return load(tiny)


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[7] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


# ---- the function


@pytest.mark.parametrize(
    "lola",
    [
        {},
        {"update_interval": 1},
        {"update_interval": 7, "mixing": "lolcats"},
        {"sparse_cache_size": 0, "sink_size": 0},
        {"sparse_sharing": "kv_head"},
        {"sparse_cache_size": [60, 4]},
        {"weighted": True, "update_interval": 5},
        {"sparse_dtype": "int8", "weighted": True},
    ],
    ids=[
        "chunked",
        "paper",
        "interval-7-lolcats",
        "no-cache",
        "shared",
        "a-size-per-layer",
        "importance",
        "int8",
    ],
)
@pytest.mark.parametrize("state_heads", [2, 4])
def test_logits_are_the_references(tmp_path, lola, state_heads):
    lola = dict(lola)
    weighted = lola.pop("weighted", False)
    directory = make_tiny(tmp_path, {**LOLA, **lola}, state_heads=state_heads, importance=weighted)
    model, ids = load(directory), torch.tensor(random_prompts([131], seed=4))
    truth = Oracle(directory).logprobs(ids[0].tolist())
    whole = model(ids)
    assert whole.past_key_values is None and whole.logits.requires_grad
    with torch.no_grad():
        cached = model(ids)
    assert isinstance(cached.past_key_values, LolaCache)
    for logits in (whole.logits[0], cached.logits[0]):
        torch.testing.assert_close(logits.detach().log_softmax(-1), truth, **CLOSE)


# ---- batches and padding


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_row_does_not_see_padding_or_its_neighbours(model, side, use_cache):
    prompts = random_prompts([90, 33, 1, 64], seed=6)
    ids, mask = torch.full((4, 95), 7), torch.zeros(4, 95, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = torch.arange(len(prompt)) + (95 - len(prompt) if side == "left" else 0)
        if side == "holes":
            at = torch.randperm(95, generator=torch.Generator().manual_seed(row))
            at = at[: len(prompt)].sort().values
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    out = model(ids, attention_mask=mask, use_cache=use_cache)
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt]), use_cache=use_cache).logits[0]
        torch.testing.assert_close(out.logits[row, mask[row] == 1], alone, **CLOSE)
    if use_cache:
        assert out.past_key_values.num_tokens(4).tolist() == [90, 33, 1, 64]


def test_gradients_do_not_depend_on_padding(model):
    prompts = random_prompts([70, 41], seed=8)
    weight = model.model.layers[0].self_attn.feature_map_k
    ids, mask = left_padded(prompts)
    labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)  # no token foretells the first one
    (padded,) = torch.autograd.grad(model(ids, attention_mask=mask, labels=labels).loss, weight)
    alone = torch.zeros_like(padded)
    for row in (torch.tensor([p]) for p in prompts):
        (part,) = torch.autograd.grad(model(row, labels=row).loss, weight)
        alone += part * (row.shape[1] - 1) / (70 + 41 - 2)
    assert alone.abs().max() > 1e-6
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-8)


# ---- generate


def argmax_recompute(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 20}], ids=str)
@torch.no_grad()
def test_generate_is_argmax_of_the_whole(model, options):
    prompts = random_prompts([70, 5, 33], seed=3)
    expected = [argmax_recompute(model, p, 30)[len(p) :] for p in prompts]
    for prompt, answer in zip(prompts, expected, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, **options)
        assert out[0, len(prompt) :].tolist() == answer
    ids, mask = left_padded(prompts)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=7, **options
    )
    assert out[:, ids.shape[1] :].tolist() == expected


@torch.no_grad()
def test_generate_goes_on_from_a_cache(model):
    prompt = random_prompts([50], seed=12)[0]
    expected = argmax_recompute(model, prompt, 24)
    cache = LolaCache(model.config)
    ids = torch.tensor([prompt])
    for _ in range(3):  # each time from all the tokens so far, of which the cache has all but one
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert ids[0].tolist() == expected


@torch.no_grad()
def test_beams_take_their_states_along(model):
    ids, mask = left_padded(random_prompts([40, 21], seed=5))
    options = {"num_beams": 3, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 7}
    cached, whole = (
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, whole)
    greedy = model.generate(ids, attention_mask=mask, **{**options, "num_beams": 1})
    assert not torch.equal(cached, greedy)  # else beams would prove nothing


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_repeated_and_copied(model):
    prompts = random_prompts([40, 21, 34], seed=7)  # of several lengths: a row's count goes along
    ids, mask = left_padded(prompts)
    cache = model(ids, attention_mask=mask).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    kept = copy.deepcopy(cache)
    for state in (cache, kept):
        logits = model(torch.tensor([[3], [4], [5], [6]]), past_key_values=state).logits[:, -1]
        for row, prompt in enumerate([prompts[2], prompts[2], prompts[1], prompts[1]]):
            alone = model(torch.tensor([[*prompt, 3 + row]])).logits[0, -1]
            torch.testing.assert_close(logits[row], alone, **CLOSE)


# ---- refusals


def test_misuse_is_refused_with_the_remedy(model):
    ids = torch.tensor(random_prompts([20, 20]))
    ours = r"a DynamicCache: .*use a lola_vllm\.engine\.hf\.LolaCache"
    with pytest.raises(LolaModelError, match=ours):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(LolaModelError, match=r"attention_mask of shape \[2, 1, 20, 20\]"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20))
    with pytest.raises(LolaModelError, match=r"attention_mask of shape \[2, 19\]"):
        model(ids, attention_mask=torch.ones(2, 19))
    packed = torch.arange(20) % 10
    with pytest.raises(LolaModelError, match="each sequence a row of its own"):
        model(ids, position_ids=packed[None])
    with pytest.raises(LolaModelError, match="give one of them"):
        model.model()
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(LolaModelError, match="a batch of 1 rows, but past_key_values holds 2"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(LolaModelError, match="other models need a DynamicCache"):
        cache.update(ids, ids, 0)


def test_gradients_through_a_cache_are_refused(model):
    out = model(torch.tensor(random_prompts([20])), use_cache=True)
    with pytest.raises(LolaModelError, match="train with use_cache=False"):
        out.logits.sum().backward()
    model.zero_grad()


def test_generate_refuses_what_cannot_be(model):
    ids = torch.tensor(random_prompts([20]))
    with pytest.raises(LolaModelError, match="cache_implementation = 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(LolaModelError, match=r"assistant_model: .*use a stock model"):
        model.generate(ids, assistant_model=model, max_new_tokens=2)


def test_dropout_of_attention_is_refused_in_training(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, attention_dropout=0.1)
    ids = torch.tensor(random_prompts([20]))
    assert model.eval()(ids).logits.isfinite().all()
    with pytest.raises(LolaModelError, match=r"attention_dropout = 0\.1"):
        model.train()(ids)


# ---- checkpoints


@pytest.mark.parametrize("tied", [True, False])
def test_saving_writes_a_checkpoint_like_ours(tmp_path, tied):
    make_base(tmp_path / "base", "llama", tie_word_embeddings=tied)
    init_checkpoint(tmp_path / "base", tmp_path / "ours", LOLA)
    load(tmp_path / "ours", torch.float32).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) != tied
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = ("config.json", "configuration_lola.py", "modeling_lola.py")
    configs = [DecoderConfig.from_pretrained(tmp_path / d) for d in ("ours", "theirs")]
    assert configs[0].to_diff_dict() == configs[1].to_diff_dict()
    assert configs[0].auto_map["AutoConfig"] == "configuration_lola.DecoderConfig"
    assert all((tmp_path / d / n).is_file() for d in ("ours", "theirs") for n in names)


def test_a_bfloat16_model_keeps_its_gates_and_its_importance(tmp_path):
    directory = make_tiny(tmp_path / "tiny", LOLA, importance=True)
    stored = load_file(directory / "model.safetensors")
    model = load(directory, torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name in ("window_factors", "importance"):
        kept = stored[f"model.layers.1.self_attn.{name}"]
        assert torch.equal(getattr(model.model.layers[1].self_attn, name), kept)
        assert torch.equal(saved[f"model.layers.1.self_attn.{name}"], kept)
    ids = torch.tensor(random_prompts([90]))
    whole = model(ids).logits
    with torch.no_grad():
        cached = model(ids).logits
    assert bool(whole.isfinite().all()) and bool(cached.isfinite().all())


def test_untrained_maps_are_lolcats_starting_point(tmp_path):
    tensors = load_file(make_tiny(tmp_path, LOLA) / "model.safetensors")
    plain = {name: t for name, t in tensors.items() if "feature_map" not in name}
    save_file(
        {name: t for name, t in plain.items() if "window_factors" not in name},
        tmp_path / "model.safetensors",
    )
    fresh = LolaForCausalLM(DecoderConfig.from_pretrained(tmp_path))
    for model in (load(tmp_path), fresh):
        attention = model.model.layers[1].self_attn
        for weight in (attention.feature_map_q, attention.feature_map_k):
            assert torch.equal(weight, torch.eye(16, dtype=weight.dtype).expand_as(weight))
        torch.testing.assert_close(attention.window_factors.sigmoid().mean().item(), 0.1)


# ---- other processes


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


LOAD = (
    "import sys; from transformers import AutoModelForCausalLM\n"
    "assert 'lola_vllm' not in sys.modules\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], {})\n"
)


@pytest.mark.slow
def test_trust_remote_code_in_a_process_that_knows_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_base(tmp_path / "base", "qwen3")
    init_checkpoint(tmp_path / "base", tmp_path / "lola", LOLA)
    result = run(
        LOAD.format("trust_remote_code=True")
        + "print(model.generate(model.dummy_inputs['input_ids'], max_new_tokens=3).shape)\n"
        "model.save_pretrained(sys.argv[2])\n"
        "print('vllm' in sys.modules)\n",
        tmp_path / "lola",
        tmp_path / "again",
    )
    assert result.stdout.splitlines() == ["torch.Size([3, 8])", "False"], result.stderr
    # What is saved are the same thin imports, not copies of the package's files.
    first, again = tmp_path / "lola", tmp_path / "again"
    assert {p.name for p in again.glob("*.py")} == {"configuration_lola.py", "modeling_lola.py"}
    for path in again.glob("*.py"):
        assert path.read_text() == (first / path.name).read_text()
    assert DecoderConfig.from_pretrained(again).auto_map == (
        DecoderConfig.from_pretrained(first).auto_map
    )


NOT_INSTALLED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lola_vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
LOADS = (
    "AutoTokenizer.from_pretrained(sys.argv[1])",  # asks, gets no answer, and goes on
    "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)",
    "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)",  # as lm-eval does
    "PreTrainedTokenizerFast.from_pretrained(sys.argv[1])",
)
TOKENIZE = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast\n"
    f"tokenizers = [{', '.join(LOADS)}]\n"
    "print()\n"
    "for tokenizer in tokenizers:\n"
    "    ids = tokenizer('one two').input_ids\n"
    "    print(isinstance(tokenizer, PreTrainedTokenizerFast), ids, flush=True)\n"
    "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
)


@pytest.mark.slow
def test_without_the_package_there_is_a_tokenizer_and_the_model_says_what_is_missing(
    tmp_path, monkeypatch
):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_base(tmp_path / "base", "llama")
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "base")
    init_checkpoint(tmp_path / "base", tmp_path / "lola", LOLA)
    result = run(NOT_INSTALLED + TOKENIZE, tmp_path / "lola")
    assert result.stdout.splitlines()[-4:] == ["True [0, 1]"] * 4, result.stderr
    assert result.returncode and "requires the following packages" in result.stderr
    assert "lola_vllm" in result.stderr.splitlines()[-1]


# ---- contexts without end


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    lola = {**LOLA, "context_shift": 16}
    return make_tiny(tmp_path_factory.mktemp("endless"), lola, max_position_embeddings=64)


@pytest.mark.parametrize("cuts", [[], [64, 65, 80], [1, 63, 100, 131], range(1, 150)], ids=str)
@torch.no_grad()
def test_rows_beyond_the_trained_length_are_the_references(endless, cuts):
    model, (prompt,) = load(endless), random_prompts([150], seed=11)
    expected = Oracle(endless).logprobs(prompt)
    cache, logits = LolaCache(model.config), []
    for start, stop in itertools.pairwise([0, *cuts, 150]):
        ids = torch.tensor([prompt[start:stop]])
        logits.append(model(ids, past_key_values=cache).logits[0])
    torch.testing.assert_close(torch.cat(logits).log_softmax(-1), expected, **CLOSE)


@torch.no_grad()
def test_padded_rows_are_shifted_each_in_its_time(endless):
    model, prompts = load(endless), random_prompts([40, 64, 90, 63], seed=12)
    ids, mask = left_padded(prompts)
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert answer[-40:].tolist() == alone[0, -40:].tolist()


def test_without_a_cache_rows_end_at_the_trained_length(endless):
    model = load(endless)
    model(torch.ones(1, 64, dtype=torch.int64)).logits.sum().backward()
    with pytest.raises(LolaModelError, match=r"65 tokens without a cache.*= 64.*use_cache=True"):
        model(torch.ones(1, 65, dtype=torch.int64))


# ---- documents that were read apart


@torch.no_grad()
def read(model: Any, ids: list[int]) -> LolaCache:
    found: LolaCache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    return found


@torch.no_grad()
def test_composed_documents_go_on_as_one_sequence(model):
    """An empty cache adds nothing, one document is itself, and what is composed stays as it was."""
    documents = [random_prompts([n], seed=n)[0] for n in (48, 64, 37)]
    caches = [read(model, ids) for ids in documents]
    before = [layer.pages.clone() for cache in caches for layer in cache.layers]
    made = [[LolaCache(model.config), *caches], caches, caches[:1]]
    composed = [LolaCache.compose(parts, model) for parts in made]
    assert [cache.get_seq_length() for cache in composed] == [149, 149, 48]
    after = [layer.pages for cache in caches for layer in cache.layers]
    assert all(map(torch.equal, before, after))
    ids = torch.tensor([[5, 6, 7]])
    answers = [model(ids, past_key_values=cache).logits for cache in (*composed, caches[0])]
    torch.testing.assert_close(answers[0], answers[1], **CLOSE)
    torch.testing.assert_close(answers[2], answers[3], **CLOSE)
    assert not torch.allclose(answers[0], answers[2], atol=1e-2)
    assert composed[0].get_seq_length() == 152


@torch.no_grad()
def test_what_cannot_be_composed_is_refused(model, endless):
    one, other = read(model, list(range(40))), read(load(endless), list(range(40)))
    with pytest.raises(ComposeError, match="no cache has seen tokens"):
        LolaCache.compose([LolaCache(model.config)], model)
    with pytest.raises(LolaModelError, match=r"caches\[1\] is of another model"):
        LolaCache.compose([one, other], model)
    with pytest.raises(LolaModelError, match=r"caches\[0\] has 2 rows"):
        two = model(input_ids=torch.tensor([[1, 2], [3, 4]]), use_cache=True).past_key_values
        LolaCache.compose([two, one], model)
    with pytest.raises(ComposeError, match=r"document 1 has 15 tokens"):
        LolaCache.compose([read(model, list(range(15))), one], model)
