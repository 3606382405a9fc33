"""Which heads lose their hidden state, and what its memory is given to."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from lola_vllm.command import cli
from lola_vllm.core.state import PAGE_ALIGNMENT
from lola_vllm.engine.estimate import estimate
from lola_vllm.engine.hf import LolaForCausalLM
from lola_vllm.engine.hf.attention import attentions
from lola_vllm.models.calibration import importance_tensors, write_calibrated
from lola_vllm.models.files import CheckpointError
from lola_vllm.models.init import init_checkpoint
from lola_vllm.models.schema import CLOSED_FACTOR
from lola_vllm.training.calibrate import run
from lola_vllm.training.calibrate.importance import PromptReads, without_states
from lola_vllm.training.calibrate.options import CalibrateOptions
from lola_vllm.training.calibrate.states import LAST, state_worths

LOLA = {"window_size": 16, "sparse_cache_size": [[24, 400], 24, 24], "update_interval": 16}


def test_worth_is_the_divergence_that_closing_a_head_adds(base, tmp_path):
    init_checkpoint(base, tmp_path / "lola", LOLA)
    model = LolaForCausalLM.from_pretrained(tmp_path / "lola").eval()
    softmax = AutoModelForCausalLM.from_pretrained(base).eval()
    gates = [layer.window_factors.data for layer in attentions(model)]
    heads = len(gates[0]) // 2
    gates[1][:heads] = CLOSED_FACTOR  # nothing is lost there
    before = [x.clone() for x in gates]
    ids = torch.randint(64, (3, 300), generator=torch.Generator().manual_seed(3))
    worths = state_worths(model, softmax, ids.tolist())
    assert all(torch.equal(x, y) for x, y in zip(gates, before, strict=True))
    assert worths[0][1] == torch.inf  # all pairs are exact
    assert worths[1][0] == 0 and all(x != 0 for x in (worths[0][0], worths[1][1], *worths[2]))

    def divergence():
        with torch.no_grad():
            found, truth = (
                x(ids, use_cache=False).logits[:, -LAST:].double().log_softmax(-1)
                for x in (model, softmax)
            )
        return (truth.exp() * (truth - found)).sum(-1).mean()

    whole = divergence()
    gates[2][heads:] = CLOSED_FACTOR
    assert worths[2][1] == pytest.approx(float(divergence() - whole), rel=0.05, abs=1e-5)


def test_without_a_state_the_values_alone_are_scored():
    errors, values = torch.zeros(2, 5), torch.ones(2, 5)
    read = PromptReads(torch.zeros(2, 5, 3), errors, values, torch.rand(2, 5), True)
    assert without_states(read, [True, False]).log_errors.tolist() == [[0] * 5, [1] * 5]


def test_the_memory_of_hidden_states_goes_to_pairs(base, texts, tmp_path):
    source, out = tmp_path / "lola", tmp_path / "calibrated"
    assert cli.main(["init", "--base", str(base), "--out", str(source)]) == 0
    options = CalibrateOptions(pairs=40, least=8, prompts=8, prompt_length=300, facts=0)
    before = run.calibrate(base, texts, options, source)
    assert before.keys["hidden_state"] is True
    options = dataclasses.replace(options, state_worth=1e9)
    found = run.calibrate(base, texts, options, source)
    assert found.states == [[False, False]] * 3
    # H and s of a head, over a pair in bfloat16 with its position; but for the padding of pages.
    pairs = (2 * 8 * (8 + 1) * 4) // (2 * 8 * 2 + 4)
    more = sum(map(sum, found.sizes)) - sum(map(sum, before.sizes))
    assert pairs - 3 <= more // 6 <= pairs + 3
    size = estimate(source, before.keys).bytes_per_sequence
    assert abs(estimate(source, found.keys).bytes_per_sequence - size) < 6 * PAGE_ALIGNMENT
    write_calibrated(source, out, found.keys, importance_tensors(found.importance))
    served = LolaForCausalLM.from_pretrained(out)
    assert not served.config.lola.for_layer(1).hidden_state


def test_a_head_that_needs_its_hidden_state_gets_pairs_in_its_place(
    base, texts, tmp_path, monkeypatch
):
    assert cli.main(["init", "--base", str(base), "--out", str(tmp_path / "lola")]) == 0
    asked, worths = [], torch.full((3, 2), 0.001)
    worths[0, 0], worths[1, 1] = 0.5, torch.inf

    def tried(student, softmax, plain):
        asked.append(student.config.lola_config["sparse_cache_size"])
        return list(worths)

    monkeypatch.setattr(run, "state_worths", tried)
    options = CalibrateOptions(pairs=40, least=8, prompts=8, prompt_length=300, facts=0)

    def calibrated(worth):
        given = dataclasses.replace(options, state_worth=worth)
        return run.calibrate(base, texts, given, tmp_path / "lola")

    found = calibrated(0.49)
    before = asked[0]
    # It takes far more than the others, and what it still lacks costs less than 0.49.
    assert found.states == [[False, False], [False, True], [False, False]]
    assert found.sizes[0][0] > before[0][0] + 100
    size, own = (
        estimate(tmp_path / "lola", keys).bytes_per_sequence
        for keys in ({"sparse_cache_size": before}, found.keys)
    )
    assert abs(size - own) < 6 * PAGE_ALIGNMENT
    # It holds everything then; the others do not.
    assert calibrated(1e-8).states == [[False, True], [True, True], [True, True]]


def test_a_mixing_without_gates_is_refused(base, texts, tmp_path):
    init_checkpoint(base, tmp_path / "lola", {"mixing": "lolcats"})
    options = CalibrateOptions(pairs=40, state_worth=0.1, prompts=8)
    with pytest.raises(CheckpointError, match="mixing = 'lolcats' counts the hidden state"):
        run.calibrate(base, texts, options, tmp_path / "lola")
    with pytest.raises(CheckpointError, match="least = 0, but a head without"):
        run.calibrate(base, texts, dataclasses.replace(options, least=0), tmp_path / "lola")
