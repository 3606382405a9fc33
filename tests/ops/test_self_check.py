"""The self-check: every back end passes as it is. What is broken on purpose is caught, named and
replaced."""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.ops import Backend, context_shift, cpp, portable, select, self_check
from tests.support.layers import KINDS, bind, layer

pytestmark = pytest.mark.usefixtures("fresh_choice")


def cpp_backend():
    assert cpp.load()
    return Backend("cpp (here)", cpp.decode, cpp.prefill)


def torch_again():
    """The portable ops under another name, so that they are compared with themselves."""
    return Backend(
        "torch again",
        lambda *args: portable.decode(*args),
        lambda *args: portable.prefill(*args),
    )


BACKENDS = {"cpp": cpp_backend, "torch": torch_again}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]()


def faults(backend, state):
    return [line for line in self_check.examine(backend, state) if not line.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_back_end_passes(backend, kind, dtype):
    lines = self_check.examine(backend, bind(layer(kind, dtype)[0]))
    shifts = ["context shift"] if KINDS[kind].get("context_shift") else []
    assert [line.step for line in lines] == [
        "prefill", *shifts, "decode", "prefill of several", "update", "decode after it",
    ]  # fmt: skip
    assert all(line.ok for line in lines), "\n".join(map(str, lines))


def test_a_layer_as_the_demo_models_passes(backend):
    state = self_check.example_layer(torch.device("cpu"), torch.bfloat16)
    assert not faults(backend, state)


# --- broken on purpose ---


def breaks(op, how, when=lambda batch: True):
    """An op that does `how` to its pages or answers afterwards."""

    def broken(state, q, k, v, batch, out):
        op(state, q, k, v, batch, out)
        if when(batch):
            how(state, batch, out)

    return broken


def an_answer_of_head(head):
    def how(state, batch, out):
        share = out.shape[1] // state.layout.num_kv_heads
        out[-1, head * share] += 0.5

    return how


def a_byte_of(part, head):
    """The highest byte of a number of one head's page, of every live row."""

    def how(state, batch, out):
        page, group = state.groups[head].pages, state.groups[head].layout
        last = group.offsets[part] + getattr(state.groups[0].views, part).itemsize
        rows = batch.state_indices[batch.state_indices > 0].long()
        page[rows, last - 1] ^= 0x7F

    return how


def another_page(state, batch, out):
    state.pages[0, 7] = 1


def padding_that_is_not_zero(state, batch, out):
    if (batch.state_indices <= 0).any():
        row = int((batch.state_indices <= 0).nonzero()[0])
        out[row if not hasattr(batch, "query_start_loc") else int(batch.query_start_loc[row])] = 1


def raises(state, batch, out):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


FAULTS = {
    "decode, an answer": ("decode", an_answer_of_head(1), "decode", "answer of KV head 1"),
    "prefill, an answer": ("prefill", an_answer_of_head(2), "prefill", "answer of KV head 2"),
    "decode, H": ("decode", a_byte_of("H", 2), "decode", "H of KV head 2"),
    "prefill, the window": (
        "prefill", a_byte_of("exact_v", 1), "prefill", "values of the window of KV head 1",
    ),
    "another page": ("decode", another_page, "decode", "another page"),
    "padding": ("decode", padding_that_is_not_zero, "update", "answer"),
    "an error": (
        "decode", raises, "decode",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_named(backend, fault):
    op, how, step, words = FAULTS[fault]
    state = bind(layer("plain")[0])
    broken = replace(backend, **{op: breaks(getattr(backend, op), how)})
    found = faults(broken, state)
    assert found, fault
    assert found[0].step == step and words in str(found[0]), list(map(str, found))


def test_a_fault_of_updates_alone_is_one_of_the_update(backend):
    """What only a token that is followed by an update does wrong."""
    state = bind(layer("plain")[0])
    due = lambda batch: bool(state.groups[0].layout.update_due(batch.seq_lens).any())  # noqa: E731
    broken = replace(backend, decode=breaks(backend.decode, a_byte_of("H", 1), due))
    assert [line.step for line in faults(broken, state)] == ["update"]


def test_a_wrong_choice_of_pairs_is_named(backend):
    """The two oldest entries of a head change places with none of their bytes out of order but one
    position."""

    def how(state, batch, out):
        state.groups[2].views.positions[1, 0, 0] += 1000

    broken = replace(backend, decode=breaks(backend.decode, how))
    assert "choice of pairs of KV head 2" in str(faults(broken, bind(layer("plain")[0]))[0])


def test_a_wrong_context_shift_is_named(backend):
    def shift(states, state_indices, num_tokens):
        context_shift.shift_layers(states, state_indices, num_tokens)
        states[0].groups[1].views.s[state_indices] *= 1.1

    state = bind(layer("as the demo model")[0])
    assert not faults(replace(backend, shift=context_shift.shift_layers), state)
    named = list(map(str, faults(replace(backend, shift=shift), state)))
    assert any(text.startswith("context shift: s of KV head 1 differs") for text in named), named


# --- who serves then ---


@pytest.fixture
def said(monkeypatch):
    """What is warned of; vLLM's own logging may hide it from pytest."""
    messages = []
    monkeypatch.setattr(self_check.logger, "warning", lambda text, *x: messages.append(text % x))
    return messages


@pytest.mark.parametrize(
    ("wanted", "order"),
    [("cuda", ["cuda", "triton", "torch"]), ("xformers", ["xformers", "triton", "torch"])],
)
def test_the_next_back_end_serves(monkeypatch, said, wanted, order):
    """On a device whose kernels all answer nonsense; the torch back end serves in the end."""
    broken = breaks(portable.decode, an_answer_of_head(1))
    for name in order[:-1]:
        made = Backend(name, broken, portable.prefill, capturable=True)
        monkeypatch.setattr(select, f"_{name}", lambda device, dtype, made=made: made)
    monkeypatch.setenv("LOLA_VLLM_OPS", wanted)
    state = bind(layer("plain")[0])
    chosen = select.choose_backend("cpu", torch.float32)
    assert chosen.name == wanted
    served = self_check.serving_backend(chosen, [state])
    assert served.decode is portable.decode
    assert select.choose_backend("cpu", torch.float32).name == served.name == "torch"
    assert [text.split()[2] for text in said] == order[:-1]
    for text, other in zip(said, order[1:], strict=True):
        assert f"{other} serves instead" in text and "lola-vllm doctor" in text
        assert "decode: answer of KV head 1 differs by" in text


def test_a_back_end_that_does_not_compile_is_replaced(said):
    def warm_up(state):
        raise RuntimeError("out of resource: shared memory")

    made = Backend("cpp (broken)", cpp.decode, cpp.prefill, warm_up)
    served = self_check.serving_backend(made, [bind(layer("plain")[0])])
    assert served.name == "torch"
    assert "compilation: RuntimeError: out of resource: shared memory" in said[0]


def test_two_scores_that_are_almost_equal_are_no_fault(monkeypatch):
    """A fault that comes with one set of numbers alone is the choice between such pairs."""
    runs = []

    def check(backend, state, seed):
        runs.append(seed)
        return [self_check.Line("update", "choice of pairs", 0, float(seed == 0), 1e-9)]

    monkeypatch.setattr(self_check, "check", check)
    assert not faults(cpp_backend(), bind(layer("plain")[0]))
    assert runs == [0, 1]
