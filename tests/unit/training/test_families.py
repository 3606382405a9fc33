"""Decoders that are no Llama are trained and calibrated as one is."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lola_vllm.engine.hf  # noqa: F401  (makes transformers know LoLA models)
from lola_vllm.training.calibrate.options import CalibrateOptions
from lola_vllm.training.calibrate.run import calibrate, report
from lola_vllm.training.distill.run import distill
from tests.support.families import make_base
from tests.unit.training.distill.test_distill import OPTIONS, write_tokenizer

WORDS = ["river", "stone", "and", "the", "blue", "seven", "runs", "over", "night", "it"]
OUTPUT = {"phi": "dense"}  # of the output projection, where it is not o_proj


@pytest.mark.parametrize("family", ["gemma3_text", "glm", "gpt_oss", "mixtral", "phi", "phi3"])
def test_two_stages_and_a_calibration(tmp_path, family):
    base, out = tmp_path / "base", tmp_path / "lola"
    stock = make_base(base, family, max_position_embeddings=512).state_dict()
    write_tokenizer(base)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (4000,), generator=generator).tolist()
    (tmp_path / "words.txt").write_text(" ".join(WORDS[i] for i in picks))
    options = dataclasses.replace(OPTIONS, rows=4, lora_rows=2)
    distill(base, [str(tmp_path / "words.txt")], out, options)

    made = load_file(out / "model.safetensors")
    assert not torch.equal(made["model.layers.1.self_attn.feature_map_k"][0], torch.eye(16))
    merged = f"model.layers.1.self_attn.{OUTPUT.get(family, 'o_proj')}.weight"
    assert not torch.equal(made[merged], stock[merged])  # with what LoRA found
    ids = torch.randint(0, 256, (1, 90), generator=generator)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=1e-3, rtol=1e-3)

    small = CalibrateOptions(pairs=40, least=8, prompts=8, prompt_length=320, recent=0, facts=0.0)
    found = calibrate(base, tmp_path / "words.txt", small, out)
    assert [len(sizes) for sizes in found.sizes] == [2, 2]
    assert all(weights.isfinite().all() for weights in found.importance.values())
    heads = 2 * len(found.importance)  # of layers that do not slide
    assert f"{heads} of {heads} have a hidden state" in report(found)
