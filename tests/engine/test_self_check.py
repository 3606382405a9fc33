"""An engine whose back end is wrong on this machine says so, and answers as the next one does."""

import pytest

from lola_vllm.core.ops import choose_backend, cpp, self_check
from tests.support.engine import engine, generate
from tools.support.tiny import make_tiny, random_prompts

pytestmark = pytest.mark.usefixtures("fresh_choice")


def test_an_engine_falls_back_where_kernels_are_wrong(tmp_path, monkeypatch):
    tiny = make_tiny(tmp_path, {"window_size": 16, "sparse_cache_size": 24, "update_interval": 8})
    prompts = random_prompts([90, 7], seed=1)
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 4}
    monkeypatch.setenv("LOLA_VLLM_OPS", "torch")
    with engine(tiny, **options) as llm:
        expected = generate(llm, prompts)
    monkeypatch.delenv("LOLA_VLLM_OPS")
    choose_backend.cache_clear()
    right = cpp.decode

    def wrong(layer, q, k, v, batch, out):
        right(layer, q, k, v, batch, out)
        out[..., 0] += 1

    said = []
    monkeypatch.setattr(cpp, "decode", wrong)
    monkeypatch.setattr(self_check.logger, "warning", lambda text, *x: said.append(text % x))
    with engine(tiny, **options) as llm:
        assert generate(llm, prompts) == expected
    assert len(said) == 1
    assert "torch serves instead" in said[0] and "decode: answer of KV head" in said[0]
