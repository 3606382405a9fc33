"""The blocks of a request, as both model runners of vLLM have them."""

import pytest
import torch

from lola_vllm.engine.vllm import compat


class Table:
    """A block table of vLLM's second model runner."""

    gpu = torch.tensor([[9, 9, 9], [4, 7, 0]])


def runners():
    """The two model runners of vLLM 0.32, as far as `request_blocks` looks."""
    first = type("First", (), {})()
    first.requests = {"abc-1f": type("State", (), {"block_ids": ([4, 7],)})()}
    second = type("Second", (), {})()
    second.req_states = type("States", (), {"req_id_to_index": {"abc-1f": 1}})()
    second.block_tables = type("Tables", (), {})()
    second.block_tables.block_tables = [Table()]
    second.block_tables.num_blocks = type("Counts", (), {"np": torch.tensor([[3, 2]]).numpy()})()
    return [first, second]


@pytest.mark.parametrize("runner", runners(), ids=["first", "second"])
def test_blocks_of_a_request(runner):
    assert compat.request_blocks(runner, "abc") == [4, 7]
    assert compat.request_blocks(runner, "abc-1f") == [4, 7]
    assert compat.request_blocks(runner, "ab") is None
