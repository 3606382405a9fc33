"""What few pairs of a head cost predictions."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lola_vllm.engine.hf.attention import attentions, order_heads
from lola_vllm.training.calibrate import losses
from lola_vllm.training.calibrate.losses import PAIRS, pair_losses
from lola_vllm.training.calibrate.prompts import CalibrationPrompt
from lola_vllm.training.calibrate.reader import ATTENTION, attention
from lola_vllm.training.calibrate.trials import SINKS, WINDOW

T = 221


@pytest.fixture
def model(base):
    transformers.AttentionInterface.register(ATTENTION, attention)
    found = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ATTENTION).eval()
    order_heads(found)
    with torch.no_grad():
        for layer in attentions(found):  # so that attention is to a few tokens
            layer.q_proj.weight *= 8
    return found


def _answer(q, k, v, held, sink):
    """One query's softmax attention to the tokens that are held, and to a learned sink of a logit.
    q `[d]`, k and v `[T, d]`."""
    logits = (k @ q * q.shape[-1] ** -0.5).masked_fill(~held, -torch.inf)
    return torch.cat([logits, sink[None]]).softmax(-1)[:-1] @ v


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 2.0, -1.0, 1.0])])
def test_costs_are_squares_of_the_first_order_change(model, monkeypatch, sinks):
    """Of one head and one query, against attention that is computed with the pairs left out."""
    generator = torch.Generator().manual_seed(4)
    monkeypatch.setattr(losses, "ONE_IN", 1)
    ids = torch.randint(64, (T,), generator=generator).tolist()
    answers = [i in (T - 1, T - 9) for i in range(T)]
    importance = [0.1 * torch.randn(2, 4 + 8 + 1, generator=generator) for _ in range(3)]
    maps = [torch.eye(8).repeat(2, 1, 1)] * 3
    recent = [[0, 40], [7, 0], [0, 0]]
    seen = []
    add = losses._Prompt.add

    def kept(self, number, q, k, v, gradient, s_aux):
        seen.append((number, q, k, v, gradient))
        add(self, number, q, k, v, gradient, sinks)

    monkeypatch.setattr(losses._Prompt, "add", kept)
    prompt = CalibrationPrompt(ids, [False] * T, answers)
    found = pair_losses(model, [prompt], importance, maps, recent, False, 0)
    assert found.facts.shape == (3, 2, len(PAIRS)) and not found.plain.any()
    assert sorted(own[0] for own in seen) == [0, 1, 2]
    for number, q, k, v, gradient in seen:
        for head, newest in enumerate(recent[number]):
            lengths = torch.hypot(k[head, :, :4], k[head, :, 4:])
            linear = torch.cat([lengths, v[head]], dim=-1) @ importance[number][head, :-1]
            order = (v[head].norm(dim=-1).log() + linear).argsort(descending=True).tolist()
            for column in (0, 1, 4):
                total = 0.0
                for query in range(T):
                    far = [i for i in order if SINKS <= i <= query - WINDOW - newest]
                    held = torch.arange(T) <= query
                    everything = held.clone()
                    held[far[int(PAIRS[column]) :]] = False
                    change = 0.0
                    for own in (2 * head, 2 * head + 1):
                        at = q[own, query]
                        sink = torch.tensor(-torch.inf) if sinks is None else sinks[own]
                        outs = [_answer(at, k[head], v[head], x, sink) for x in (held, everything)]
                        change += float(gradient[own, query] @ (outs[0] - outs[1]))
                    total += change**2 / 2
                expected = total / 2  # two tokens of answers
                assert float(found.facts[number, head, column]) == pytest.approx(
                    expected, rel=1e-3, abs=1e-9
                )
    assert (found.facts[..., 0] > 1e-4).all() and (found.facts[..., PAIRS > T] < 1e-9).all()


def test_gradients_are_of_the_log_odds_of_answers(model, monkeypatch):
    """Moving what a head of the middle layer says changes the log-odds by the noted gradient."""
    ids = torch.randint(64, (T,), generator=torch.Generator().manual_seed(5)).tolist()
    answers = [i == T - 1 for i in range(T)]
    noted = {}

    def kept(self, number, q, k, v, gradient, s_aux):
        noted[number] = gradient

    monkeypatch.setattr(losses._Prompt, "add", kept)
    zeros = [torch.zeros(2, 13)] * 3
    maps = [torch.eye(8).repeat(2, 1, 1)] * 3
    prompt = CalibrationPrompt(ids, [False] * T, answers)
    pair_losses(model, [prompt], zeros, maps, [[0, 0]] * 3, True, 0)
    assert sorted(noted) == [0, 1, 2]

    def odds(nudge: float) -> float:
        plain = AutoModelForCausalLM.from_pretrained(model.config._name_or_path).eval().double()
        plain.load_state_dict(model.state_dict())
        hook = attentions(plain)[1].o_proj.register_forward_pre_hook(
            lambda _, args: (args[0] + nudge * direction,)
        )
        with torch.no_grad():
            p = plain(torch.tensor([ids])).logits[0, -2].softmax(-1)[ids[-1]]
        hook.remove()
        return float((p / (1 - p)).log())

    direction = torch.zeros(1, T, 4 * 8, dtype=torch.double)
    direction[0, T - 2, 8:16] = torch.linspace(-1, 1, 8)  # of query head 1
    slope = (odds(1e-3) - odds(-1e-3)) / 2e-3
    expected = float(noted[1][1, T - 2].double() @ direction[0, T - 2, 8:16])
    assert slope == pytest.approx(expected, rel=1e-3) and abs(slope) > 1e-4


def test_drawn_tokens_give_the_fisher_information():
    """Of the logits of a softmax it is p (1 - p)."""
    row = torch.tensor([0.5, -1.0, 2.0])
    logits = row.expand(40_000, -1).clone().requires_grad_()
    losses._log_likelihood_of_drawn(logits, torch.Generator().manual_seed(7)).backward()
    p = row.softmax(-1)
    torch.testing.assert_close(logits.grad.square().mean(0), p * (1 - p), rtol=0.05, atol=0)


def test_plain_text_counts_by_query(model):
    ids = torch.randint(64, (T,), generator=torch.Generator().manual_seed(6)).tolist()
    rest = [[torch.zeros(2, 13)] * 3, [torch.eye(8).repeat(2, 1, 1)] * 3, [[0, 0]] * 3]

    def costs(seed, number):
        return pair_losses(model, [CalibrationPrompt(ids)] * number, *rest, True, seed)

    found = costs(0, 200)
    assert not found.facts.any() and (found.plain[..., 0] > 0).all()
    assert not costs(0, 1).plain.equal(costs(1, 1).plain)  # other tokens are drawn
    torch.testing.assert_close(costs(1, 200).plain, found.plain, rtol=0.4, atol=1e-6)
