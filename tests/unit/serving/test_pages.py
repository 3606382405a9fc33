"""The watch over pages: there only while something waits, bounded, and never in the way."""

import pytest
import torch

from lola_vllm.engine.vllm import compat
from lola_vllm.serving import pages
from lola_vllm.serving.pages import MAX_WATCHES, PageWatch, StateCopy, StepRow, Unreadable


class Halves:
    """A state of two layers of four bytes."""

    @staticmethod
    def pages(rows):
        return list(rows.split(4, dim=1))


class Layer:
    """As much of a LoLA layer as a watch looks at; the first one has the state_indices of both."""

    def __init__(self, index):
        self.prefix = f"model.layers.{index}.self_attn"
        self.sequence = Halves
        self.kv_cache = (torch.tensor([]),)
        if index == 0:
            self.kv_cache = (torch.zeros(4, 8, dtype=torch.uint8),)
            self.kv_cache[0][2] = torch.tensor([100] * 4 + [101] * 4)


class Context:
    """vLLM's forward context of a step with these rows."""

    def __init__(self, rows):
        self.attn_metadata = rows


@pytest.fixture
def model():
    return torch.nn.Linear(1, 1)


@pytest.fixture
def step(model, monkeypatch):
    """Run a step of the model with the rows given."""

    def run(rows):
        metadata = None if rows is None else {"model.layers.0.self_attn": rows}
        monkeypatch.setattr(pages, "get_forward_context", lambda: Context(metadata))
        monkeypatch.setattr(pages, "step_rows", lambda found: found)
        model(torch.zeros(1))

    return run


@pytest.fixture
def watch(model):
    return PageWatch(model, [Layer(0), Layer(1)])


def longest(rows):
    return max(rows, key=lambda row: row.num_tokens, default=None)


def test_a_copy_is_taken_once_and_the_hook_goes(model, watch, step):
    assert not model._forward_hooks
    assert watch.add("a", longest)
    assert len(model._forward_hooks) == 1
    step([StepRow(1, 5), StepRow(2, 9)])
    assert not model._forward_hooks
    watch._layers[0].kv_cache[0].zero_()  # what happens to the page later does not matter
    copy = watch.take("a")
    assert copy.num_tokens == 9 and copy.rows == [StepRow(1, 5), StepRow(2, 9)]
    assert [int(page[0]) for page in copy.pages] == [100, 101]
    assert watch.take("a") is None


def test_it_waits_for_its_sequence_and_for_a_real_step(model, watch, step):
    watch.add("a", lambda rows: next((row for row in rows if row.num_tokens == 7), None))
    step(None)  # profiling
    step([StepRow(1, 6)])
    assert model._forward_hooks
    step([StepRow(1, 7)])
    assert isinstance(watch.take("a"), StateCopy)


def test_giving_up_removes_the_hook(model, watch, step):
    watch.add("a", longest)
    assert watch.take("a") is None
    assert not model._forward_hooks


def test_waiting_and_untaken_copies_are_bounded(watch, step):
    for i in range(MAX_WATCHES - 1):
        assert watch.add(str(i), longest)
    step([StepRow(1, 1)])
    assert watch.add("last", longest)
    assert not watch.add("one more", longest)
    assert watch.add("last", longest)  # already among them
    watch.take("0")
    assert watch.add("one more", longest)


def test_an_error_is_told_to_who_asked_and_the_step_goes_on(model, watch, step):
    def broken(rows):
        raise RuntimeError("no memory")

    watch.add("a", broken)
    step([StepRow(1, 1)])
    assert watch.take("a") == Unreadable("RuntimeError: no memory")
    assert not model._forward_hooks


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
