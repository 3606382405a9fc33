"""Contexts beyond the base's trained length: how long a request may be, and what is refused."""

import pytest

from lola_vllm.core.config import ENDLESS_LENGTH
from lola_vllm.engine.vllm import config_hook
from tests.support.engine import assert_refused, engine
from tools.support.tiny import make_tiny

LOLA = {"window_size": 8, "sparse_cache_size": 20, "sink_size": 3, "context_shift": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), LOLA, max_position_embeddings=64)


def test_a_request_may_be_longer_than_the_base(tiny, monkeypatch):
    # The first engine of a process has vLLM settle its loggers, which takes handlers from them.
    said = []
    monkeypatch.setattr(
        config_hook.logger, "info", lambda text, *values: said.append(text % values)
    )
    with engine(tiny, max_model_len=None) as llm:
        assert llm.llm_engine.model_config.max_model_len == ENDLESS_LENGTH
    assert any("contexts without end: from 64 tokens on, they shift by 16" in line for line in said)


@pytest.mark.parametrize(
    ("overrides", "length", "words"),
    [
        ({}, 2**31, "--max-model-len = 2147483648 cannot be used.*at most 2147483647"),
        ({"context_shift": 0}, 128, r"max_model_len \(128\) is greater .*=64"),
        ({"context_shift": 24}, 128, "context_shift = 24: must divide max_position_embeddings"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny, overrides, length, words):
    assert_refused(tiny, words, max_model_len=length, hf_overrides={"lola_config": overrides})
