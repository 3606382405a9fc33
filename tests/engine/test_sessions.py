"""Stored states in the engine: what is restored, and that nothing it changes is an answer."""

import pytest
from vllm import SamplingParams, TokensPrompt

from tests.support.engine import GREEDY, engine
from tests.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 24, "sink_size": 2}
NEW = 12
BASE = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
CACHED = {**BASE, "enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 128}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), LOLA)


def store_options(directory=None, ram="64MiB", **more):
    lola = {"state_ram": ram, **more}
    if directory is not None:
        lola["state_dir"] = str(directory)
    return {"additional_config": {"lola": lola}}


def ask(llm, prompt, new=NEW, salt=None, lora=None, **lola):
    """Greedy tokens, and what the answer says of the store."""
    extra = {"kv_transfer_params": {"lola": {k.strip("_"): v for k, v in lola.items()}}}
    params = SamplingParams(max_tokens=new, extra_args=extra, **GREEDY)
    request = TokensPrompt(prompt_token_ids=prompt)
    if salt:
        request["cache_salt"] = salt
    (output,) = llm.generate([request], params, use_tqdm=False, lora_request=lora)
    told = (output.kv_transfer_params or {}).get("lola")
    return list(output.outputs[0].token_ids), told


@pytest.fixture(scope="module")
def cold(tiny):
    """Answers of an engine without a store."""
    answers = {}

    def answer(prompt, new=NEW):
        return answers[tuple(prompt), new]

    (text, tail, other) = random_prompts([203, 31, 9], seed=4)
    with engine(tiny, **BASE) as llm:
        first = ask(llm, text)[0]
        for prompt in (text, text + first + tail, text + first + other, text + tail):
            answers[tuple(prompt), NEW] = ask(llm, prompt)[0]
    answer.text, answer.tail, answer.other, answer.first = text, tail, other, first
    return answer


@pytest.mark.parametrize("options", [BASE, CACHED], ids=["plain", "prefix-caching"])
def test_a_new_process_goes_on_where_the_old_one_stopped(tiny, cold, tmp_path, options):
    with engine(tiny, **options, **store_options(tmp_path)) as llm:
        tokens, told = ask(llm, cold.text)
        assert tokens == cold(cold.text)
        assert told["tokens"] == len(cold.text) + NEW - 1 and told["restored_tokens"] == 0
        assert "no stored state" in told["reason"]
    whole = cold.text + cold.first
    with engine(tiny, **options, **store_options(tmp_path)) as llm:
        for tail, n in ((cold.tail, len(whole) - 1), (cold.other, len(whole) - 1)):
            tokens, told = ask(llm, whole + tail)
            assert tokens == cold(whole + tail)
            assert told["restored_tokens"] == n and told["reason"] is None
        # The end of the prompt is a state of its own: the answer may be left out, or said anew.
        tokens, told = ask(llm, cold.text + cold.tail)
        assert tokens == cold(cold.text + cold.tail)
        assert told["restored_tokens"] == len(cold.text)
