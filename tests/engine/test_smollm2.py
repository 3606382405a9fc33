"""A real model: with a window above the sequence length, LoLA is the stock Llama, token for token.

The models come from `lola-vllm demo-model` (`make test` builds them): SmolLM2-135M-Instruct as a
distilled LoLA checkpoint and as the plain Llama it was made from.
"""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from tests.support.engine import engine

MODELS = Path(__file__).parents[2] / "models"
LENGTHS = [5, 65, 128, 200, 411]
NEW = 12
# float32 rounding moves a log-probability by about 1e-5 here; a choice between two tokens closer
# than this is a tie that either engine may break.
TIE = 1e-3

PAGE = MODELS.parent / "docs" / "howto" / "python.md"
TEXT = (MODELS.parent / "docs" / "algorithm.md").read_text()


@pytest.fixture(scope="module")
def prompts():
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODELS / "smollm2-base")(TEXT)["input_ids"]
    assert len(ids) > 37 * len(LENGTHS) + max(LENGTHS)
    return [ids[37 * i : 37 * i + n] for i, n in enumerate(LENGTHS)]


def answers(model, prompts, **options):
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=2)
    with engine(
        model, skip_tokenizer_init=False, kv_cache_memory_bytes=2**30, max_num_seqs=8, **options
    ) as llm:
        requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
        (dtypes,) = llm.apply_model(dtypes_of_projections)
        return dtypes, [o.outputs[0] for o in llm.generate(requests, params, use_tqdm=False)]


def dtypes_of_projections(model):
    return {x.dtype for name, x in model.named_parameters() if "proj" in name and x.numel()}


def test_large_window_reproduces_stock_vllm(prompts, untrained):
    _, stock = answers(MODELS / "smollm2-base", prompts)
    window = {"lola_config": {"window_size": 1024}}
    dtypes, lola = answers(untrained, prompts, hf_overrides=window)
    assert dtypes == {torch.bfloat16}  # as they were stored, while all else is float32
    exact = 0
    for a, b in zip(stock, lola, strict=True):
        if a.token_ids == b.token_ids:
            exact += 1
            continue
        at = next(i for i in range(NEW) if a.token_ids[i] != b.token_ids[i])
        first, second = (entry.logprob for entry in list(a.logprobs[at].values())[:2])
        assert abs(first - second) < TIE, f"token {at} differs and is no tie: {first} {second}"
    assert exact >= len(LENGTHS) - 1


def test_the_program_of_the_python_page_answers_its_question(monkeypatch, capsys):
    """The demo model with its small window, as the page asks it."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    started = []
    with contextlib.ExitStack() as stack:

        def start(model, **options):  # this folder's start of an engine, with the page's options
            started.append((model, options))
            options |= {"skip_tokenizer_init": False, "kv_cache_memory_bytes": 2**28}
            return stack.enter_context(engine(MODELS.parent / model, **options))

        monkeypatch.setattr("vllm.LLM", start)
        exec(compile(program, str(PAGE), "exec"), {"__name__": "__main__"})
    ((model, _),) = started
    assert model == "models/smollm2-lola"
    answer = capsys.readouterr().out
    assert "fundamental" in answer and "physics" in answer
    (told,) = [line for line in answer.splitlines() if line.startswith("{'session'")]
    # Whether tokens are restored depends on where a tokenizer parts the answer from the chat.
    assert "'session': 'physics', 'turn': 2" in told and "'restored_tokens'" in told
