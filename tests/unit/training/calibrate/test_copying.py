"""Which KV heads copy passages, how many recent pairs they have, and trials of divisions."""

import itertools
import math
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lola_vllm.engine.hf.attention import order_heads
from lola_vllm.training.calibrate.copying import (
    DECAY,
    ENOUGH,
    GIVEN,
    LEAST_DISTANCE,
    NOTHING,
    PASSAGE,
    PASSAGES,
    CopyingAttention,
    class_end,
    distance_class,
    divide_recent,
    repeat_passages,
)
from lola_vllm.training.calibrate.trials import (
    RECENT_ATTENTION,
    SINKS,
    WINDOW,
    passage_log_probs,
    recent_attention,
)


def test_passages_stand_in_the_text_and_again_at_its_end():
    ids = list(range(2000))
    found, starts = repeat_passages(ids, random.Random(0))
    assert found[:2000] == ids and len(found) == 2000 + PASSAGES * PASSAGE
    for i, at in enumerate(starts):
        again = found[2000 + i * PASSAGE :][:PASSAGE]
        assert again == ids[at : at + PASSAGE]
    distances = [2000 - at for at in starts]
    assert min(distances) >= LEAST_DISTANCE and max(distances) > 1000
    # From 150 to 2,000 tokens are 3.74 doublings, which 24 passages share evenly.
    for i in range(3):
        assert sum(distance_class(x) == i for x in distances) in (6, 7)


def test_classes_of_distance_double():
    assert [distance_class(d) for d in (0, 150, 299, 301, 599, 601, 4799, 4801)] == [
        *(0, 0, 0, 1, 1, 2, 4, 5)
    ]
    assert [class_end(i) for i in range(3)] == [300, 600, 1200]


def test_attention_to_the_first_place_by_distance():
    """Two KV heads of two query heads: one query head of the second copies half the time what
    stands less than 300 tokens before the end."""
    ids = list(range(1000))
    prompts = [repeat_passages(ids, random.Random(seed)) for seed in range(2)]
    recorder = CopyingAttention([starts for _, starts in prompts], 1000, num_layers=2)
    k = torch.zeros(2, len(prompts[0][0]), 4)
    for found, starts in prompts:
        queries = recorder.begin(found)
        assert len(queries) == PASSAGES * (PASSAGE - GIVEN)
        weights = torch.zeros(4, len(queries), len(found))
        for row, query in enumerate(queries.tolist()):
            passage, token = divmod(query - len(ids), PASSAGE)
            assert token >= GIVEN
            if starts[passage] > 1000 - 300:
                weights[3, row, starts[passage] + token] = 0.5
            weights[:, row, 0] += 0.25
        for layer in range(2):
            recorder.add(layer, k, k, weights if layer else torch.zeros_like(weights))
    nothing, found = recorder.attention
    assert found.shape == (3, 2) and not nothing.any()
    near, middle, far = found.tolist()
    assert near == [0, 0.5] and middle == [0, 0]
    of_far = [at for _, starts in prompts for at in starts if 1000 - at >= 600]
    expected = 0.25 * sum(at == 0 for at in of_far) / len(of_far)
    assert far == pytest.approx([expected] * 2)


def test_no_head_has_more_recent_pairs_than_it_is_needed_for():
    attention = [
        torch.tensor([[0.8, 0], [0.8, 0], [0, 0]]),
        torch.tensor([[0, 0.2]] * 2 + [[0, 1]]),
    ]
    assert divide_recent(attention, 0, 1000, 0.8) == [[0, 0], [0, 0]]
    # The first head holds as much as is enough of the nearer classes, up to 600 tokens. Only the
    # last head serves the third, which ends with the prompt.
    assert divide_recent(attention, 10**6, 1000, 0.8) == [[600, 0], [0, 1000]]
    assert divide_recent(attention, 150, 1000, 0.8) == [[600, 0], [0, 0]]
    assert divide_recent(attention, 74, 1000, 0.8) == [[0, 0], [0, 0]]


def test_far_passages_are_copied_by_heads_together():
    """Three heads give the far passages a third of the attention each: one alone copies nothing,
    so that no single step leads there."""
    attention = [torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1]])]
    assert divide_recent(attention, 525, 600, 0.8) == [[300, 600, 600, 600]]
    assert divide_recent(attention, 524, 600, 0.8) == [[300, 600, 600, 0]]


@pytest.mark.parametrize("enough", ENOUGH)
@pytest.mark.parametrize("seed", range(5))
def test_no_division_copies_much_more(seed, enough):
    attention = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) ** 2
    shares = attention / attention.sum(1, keepdim=True)
    ends = [0, 300, 600, 1000]

    def copied(sizes: Sequence[int]) -> float:
        total = 0.0
        for i, width in enumerate((1, 1, math.log2(1000 / 600))):
            held = sum(float(shares[i, h]) for h in range(4) if sizes[h] >= ends[i + 1])
            missing = max(0.0, enough - held) / (enough - NOTHING * enough)
            total += width * DECAY**i * max(0.0, 1 - missing**2)
        return total

    for pairs in (100, 250, 400, 700):
        allowed = (x for x in itertools.product(ends, repeat=4) if sum(x) <= 4 * pairs)
        (found,) = divide_recent([attention], pairs, 1000, enough)
        assert sum(found) <= 4 * pairs
        assert copied(found) >= 0.8 * max(map(copied, allowed))


HEADS, GROUP = 2, 3


def inputs(n: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n)
    return (
        torch.randn(1, HEADS * GROUP, n, 8, dtype=torch.float64),
        torch.randn(1, HEADS, T, 8, dtype=torch.float64),
        torch.randn(1, HEADS, T, 8, dtype=torch.float64),
    )


@pytest.mark.parametrize(("n", "T"), [(1, 5), (3, 3), (7, 200), (130, 301)])
@pytest.mark.parametrize("sizes", [[0, 0], [17, 1000], [0, 90]])
def test_a_head_sees_sinks_window_and_recent_pairs(n, T, sizes):
    q, k, v = inputs(n, T)
    out, _ = recent_attention(
        SimpleNamespace(lola_number=1, lola_window=None), q, k, v, None, [[5, 5], sizes]
    )
    for head in range(HEADS * GROUP):
        of = head // GROUP
        for i in range(n):
            at = T - n + i
            seen = [j for j in range(at + 1) if j < SINKS or at - j < WINDOW + sizes[of]]
            weights = (k[0, of, seen] @ q[0, head, i] * 8**-0.5).softmax(0)
            torch.testing.assert_close(out[0, i, head], weights @ v[0, of, seen])


def test_without_sizes_a_head_sees_all():
    q, k, v = inputs(70, 70)
    module = SimpleNamespace(lola_number=0, lola_window=None)
    out, _ = recent_attention(module, q, k, v, None)
    torch.testing.assert_close(out, recent_attention(module, q, k, v, None, [[99, 99]])[0])


def test_log_probs_of_passages_by_division():
    """What a division gives is what the model says that reads all at once and sees as much, and
    one division leaves nothing behind for the next."""
    import transformers

    transformers.AttentionInterface.register(RECENT_ATTENTION, recent_attention)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        attn_implementation=RECENT_ATTENTION,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().double()
    for parameter in model.parameters():
        parameter.data *= 3
    order_heads(model)
    prompts = [torch.randint(50, (300 + PASSAGES * PASSAGE,)).tolist() for _ in range(2)]
    everything, nothing, some = [[2000] * 2] * 2, [[0] * 2] * 2, [[0, 200], [100, 0]]
    found = passage_log_probs(model, prompts, [nothing, everything, some, nothing])
    assert found.shape == (4,) and found.dtype == torch.float64
    assert found[0] == pytest.approx(float(found[3]))
    assert len({round(float(x), 6) for x in found}) == 3
    expected = 0.0
    for ids in prompts:
        says = model(torch.tensor([ids])).logits[0, :-1].detach().log_softmax(-1)
        of_tokens = says.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][-PASSAGES * PASSAGE :]
        expected += float(of_tokens.view(PASSAGES, PASSAGE)[:, GIVEN:].mean()) / 2
    assert float(found[1]) == pytest.approx(expected)
