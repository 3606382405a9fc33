"""Sizes of the sparse caches, and importance, measured on text."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lola_vllm.command import cli
from lola_vllm.core.lola_config import HEAD_KEYS
from lola_vllm.core.ops.reference import feature_map, pair_importance, self_recall_error
from lola_vllm.engine.hf.attention import order_heads
from lola_vllm.engine.hf.modeling import LolaForCausalLM
from lola_vllm.models import read_facts
from lola_vllm.models.calibration import (
    importance_tensors,
    load_calibration,
)
from lola_vllm.models.files import CheckpointError, open_weights
from lola_vllm.training.calibrate.importance import (
    LAST_TOKENS,
    SKIPPED_TOKENS,
    LongRangeAttention,
    PromptReads,
    errors_of_others,
    far_attention,
    features,
    fit,
    held,
    parted,
)
from lola_vllm.training.calibrate.losses import PAIRS, Losses
from lola_vllm.training.calibrate.options import CalibrateOptions
from lola_vllm.training.calibrate.prompts import (
    AFTER,
    BEFORE,
    CalibrationPrompt,
    asked_for,
    draw_prompts,
)
from lola_vllm.training.calibrate.reader import ATTENTION, attention, read
from lola_vllm.training.calibrate.sizes import cost_at, divide, divide_among, scaled
from lola_vllm.training.texts import SEPARATOR, is_held_out


def test_pairs_are_as_good_as_any_other_choice():
    generator = torch.Generator().manual_seed(8)
    attention = [torch.rand(8, generator=generator).sort(descending=True).values for _ in range(3)]
    for total in range(6, 20):
        sizes = divide(attention, total, 2)
        assert sum(sizes) == total and min(sizes) >= 2
        found = sum(float(x[:n].sum()) for x, n in zip(attention, sizes, strict=True))
        best = max(
            sum(float(x[:n].sum()) for x, n in zip(attention, other, strict=True))
            for other in itertools.product(range(2, total + 1), repeat=3)
            if sum(other) == total
        )
        assert found == pytest.approx(best)


def test_what_adds_nothing_goes_to_all_alike():
    assert divide([torch.tensor([1.0, 0]), torch.zeros(3), torch.zeros(2)], 12, 1) == [4, 4, 4]
    assert divide([torch.tensor([1.0, 1]), torch.zeros(3), torch.zeros(2)], 12, 1) == [5, 4, 3]
    assert divide([torch.zeros(0)] * 3, 8, 1) == [3, 3, 2]
    with pytest.raises(ValueError, match="30 pairs for 4 caches of 10 or more"):
        divide([torch.ones(9)] * 4, 30, 10)


def _losses(facts: list[list[float]], plain: list[list[float]]) -> Losses:
    """Of one layer, by KV head: what 0, 8 and 11 pairs cost; more cost nothing."""
    padding = (0, len(PAIRS) - 3)
    pad = torch.nn.functional.pad
    return Losses(*(pad(torch.tensor([x]).double(), padding) for x in (facts, plain)))


NONE = [[0.0, 0, 0]] * 2


def test_pairs_go_where_they_lower_losses_most():
    assert divide_among(_losses([[9.0, 1, 1], [8, 0, 0]], NONE), 4, 0, 50) == [[4, 4]]
    assert divide_among(_losses([[9.0, 1, 1], [4, 0, 0]], NONE), 4, 0, 50) == [[8, 0]]
    # Beyond 8 pairs the first head loses no more.
    assert divide_among(_losses([[9.0, 1, 1], [4, 0, 0]], NONE), 8, 0, 50) == [[8, 8]]


def test_plain_text_weighs_less_than_facts_among_sizes():
    """Both sum to one, and plain text's is halved."""
    losses = _losses([[0.6, 0, 0], [0, 0, 0]], [[0, 0, 0], [10.0, 0, 0]])
    assert divide_among(losses, 6, 0, 50) == [[8, 4]]
    assert divide_among(Losses(*reversed(losses)), 6, 0, 50) == [[4, 8]]


def test_costs_between_those_that_were_tried():
    facts = _losses([[9.0, 1, 1], [8, 0, 0]], NONE).facts
    assert cost_at(facts, [[0, 8]]).tolist() == [[9, 0]]
    # 4 pairs stand between 0 and 8 as the logarithms of 8, 12 and 16 do.
    found = cost_at(facts, [[4, 4]])
    torch.testing.assert_close(found, torch.tensor([[4.32, 3.32]]).double(), rtol=1e-3, atol=0)


def test_losses_grow_to_what_a_hidden_state_is_worth():
    losses = _losses(NONE, [[9.0, 1, 1], [8, 0, 0]])
    worths = torch.tensor([[27.0, 0.4]])
    assert scaled(losses, [[0, 0]], worths, 0.5).plain.tolist() == [
        [[27, 3, 3, *[0] * (len(PAIRS) - 3)], losses.plain[0, 1].tolist()]
    ]
    for less in ([[8.0, 8.0]], [[torch.inf, 0.4]]):  # estimated to be worth more, or not tried
        assert scaled(losses, [[0, 0]], torch.tensor(less), 0.5).plain.equal(losses.plain)
    assert scaled(losses, [[0, 0]], worths, 0.5).facts is losses.facts


def test_plain_text_weighs_less_than_facts_in_the_fit():
    """What facts and what plain text ask for are opposites: facts win."""
    reads = []
    for i, one in enumerate(_reads(40)):
        x, of_facts = one.features[:, :, 1], bool(i % 2)
        attention = ((x > 4) if of_facts else (x < -2)).float() / 2  # the features' mean is 1
        reads.append(one._replace(attention=attention, of_facts=of_facts))
    slopes = fit(reads, [40, 40])[:, 1]
    swapped = fit([x._replace(of_facts=not x.of_facts) for x in reads], [40, 40])[:, 1]
    assert (slopes > 0.01).all() and (swapped < -0.01).all()


def test_held_out_documents_are_not_read(tmp_path, base):
    """They are for measuring. Here they are of one letter, and all others of other letters."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(1, 64, (40, 400), generator=generator).tolist()
    read = ["".join(chr(33 + code) for code in codes) for codes in drawn]
    read = [text for text in read if not is_held_out(text)][:10]
    kept = [text for text in ("!" * n for n in range(400, 1000)) if is_held_out(text)][:10]
    mixed = [text for pair in zip(read, kept, strict=True) for text in pair]
    path = tmp_path / "mixed.txt"
    path.write_text(SEPARATOR.join(mixed), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = CalibrateOptions(prompts=40, prompt_length=300, facts=0)
    prompts = draw_prompts(path, tokenizer, options)
    assert len(prompts) == 40 and not any(0 in prompt.ids for prompt in prompts)
    path.write_text(SEPARATOR.join(kept), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not held out"):
        draw_prompts(path, tokenizer, options)


def test_attention_is_what_transformers_reports(base):
    import transformers

    class Kept:
        def begin(self, ids: list[int]) -> torch.Tensor:
            self.weights: list[torch.Tensor] = []
            return torch.tensor([3, 50, 69])

        def add(self, layer: int, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor) -> None:
            assert layer == len(self.weights) and k.shape == v.shape == (2, 70, 8)
            self.weights.append(weights.clone())

    ids = torch.randint(64, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = plain(torch.tensor([ids]), output_attentions=True).attentions
    transformers.AttentionInterface.register(ATTENTION, attention)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ATTENTION).eval()
    order_heads(model)
    kept = Kept()
    read(model, [ids], kept, "reading")
    for found, expected in zip(kept.weights, attentions, strict=True):
        torch.testing.assert_close(found, expected[0, :, [3, 50, 69]], rtol=1e-4, atol=1e-6)


def test_far_attention_is_the_largest_from_far_behind():
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(4, 150, 150, generator=generator)
    queries = torch.tensor([5, 130, 140, 149])
    near = [128, 100]
    found = far_attention(weights[:, queries], queries, torch.tensor(near))
    for head, token in ((0, 0), (0, 11), (0, 12), (1, 3), (1, 21), (1, 40), (1, 49), (0, 149)):
        far = [q for q in queries.tolist() if q - token > near[head]]
        of_group = weights[2 * head : 2 * head + 2, far, token]
        assert found[head, token] == (of_group.max() if far else 0)


@pytest.mark.parametrize("state_heads", [2, 4])
def test_errors_are_those_in_a_state_of_all_other_pairs(state_heads):
    generator = torch.Generator().manual_seed(6)
    k, v = torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64)
    maps = torch.randn(state_heads, 8, 5, generator=generator, dtype=torch.float64)
    found, without = errors_of_others(k, v, maps)
    assert found.shape == (2, 9)
    group = state_heads // 2
    torch.testing.assert_close(without, v.norm(dim=-1) if group == 1 else torch.ones(2, 9).double())
    for head in range(2):
        for token in (0, 4, 8):
            others = [t for t in range(9) if t != token]
            errors = []
            for state_head in range(group * head, group * (head + 1)):
                phi = feature_map(k[head : head + 1], maps[state_head : state_head + 1])[0]
                H, s = phi[others].T @ v[head, others], phi[others].sum(0)
                sre = self_recall_error(phi[token : token + 1], v[head, token : token + 1], H, s)
                errors.append(sre[0] / (v[head, token].norm() if group > 1 else 1))
            expected = sum(errors) / len(errors)
            torch.testing.assert_close(found[head, token], expected, rtol=1e-5, atol=1e-7)


def test_tokens_of_facts_that_are_asked_for():
    text = [*range(100, 140), 7, 8, 9, *range(140, 200)]
    ids = [*text, 50, 7, 8, 9, 51, 60, 61]
    marks = [False] * (len(text) + 1) + [True] * 3 + [False] + [True] * 2
    asked = asked_for(ids, marks)
    assert [i for i, x in enumerate(asked) if x] == list(range(40 - BEFORE, 43 + AFTER))
    # The first token of a value may be another one where the text says it.
    assert asked_for([*text[:40], 6, *text[41:], *ids[len(text) :]], marks)[41]
    assert not any(asked_for(ids, [False] * len(ids)))


def _reads(number: int, heads: int = 2, tokens: int = 400) -> list[PromptReads]:
    """Prompts whose attention follows feature 1 in head 0, and feature 2, reversed, in head 1."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(number):
        x = torch.randn(heads, tokens, 6, generator=generator)
        told = torch.stack([x[0, :, 1], -x[1, :, 2]])
        attention = (told > 1.5).float() * torch.rand(heads, tokens, generator=generator)
        log_errors = 0.2 * torch.randn(heads, tokens, generator=generator)
        of_facts = bool(i % 4)
        found.append(PromptReads(x.half() * 3 + 1, log_errors, log_errors, attention, of_facts))
    return found


def test_the_fit_finds_what_is_read():
    fitted, judged = parted(_reads(50))
    assert (len(fitted), len(judged)) == (40, 10)
    sizes = [40, 12]
    weights = fit(fitted, sizes)
    assert weights.shape == (2, 7) and weights.dtype == torch.float32
    assert weights[0].argmax() == 1 and weights[1, :-1].argmin() == 2
    kept, total = held(judged, sizes, weights)
    alone, _ = held(judged, sizes, None)
    oracle = sum(r.attention.sort(-1, descending=True).values[1, :12].sum() for r in judged)
    # By chance a tenth is held, as the errors say nothing here.
    assert (alone / total < 0.25).all()
    assert kept[0] / total[0] > 0.9 and kept[1] / oracle > 0.6
    # The mean of the log is 0, and what is served is what was fitted.
    x = torch.cat([r.features for r in fitted], dim=1).float()
    log = (x * weights[:, None, :-1]).sum(-1) + weights[:, None, -1]
    assert log.mean(-1).abs().max() < 1e-4
    k, v = x[..., :4], x[..., 2:]
    k = torch.cat([k[..., :2].abs(), torch.zeros_like(k[..., :2])], dim=-1)
    served = pair_importance(k, v, weights[:, None]).log()
    expected = (features(k, v) * weights[:, None, :-1]).sum(-1) + weights[:, None, -1]
    torch.testing.assert_close(served, expected)
    assert fit(fitted, sizes).equal(weights) and not fit(fitted, sizes, 1).equal(weights)


def test_plain_text_is_read_anywhere_and_facts_where_they_are(base):
    import transformers

    transformers.AttentionInterface.register(ATTENTION, attention)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ATTENTION).eval()
    order_heads(model)
    ids = torch.randint(64, (320,), generator=torch.Generator().manual_seed(1)).tolist()
    near = [40 <= i < 60 for i in range(320)]
    prompts = [CalibrationPrompt(ids), CalibrationPrompt(ids, near)]
    maps = [torch.eye(8).repeat(2, 1, 1)] * 3
    recorder = LongRangeAttention(prompts, maps, [[0], [150], [0, 250]])
    read(model, [prompt.ids for prompt in prompts], recorder, "reading")
    for plain, facts in recorder.reads:
        assert plain.features.shape == (2, 320 - SKIPPED_TOKENS - LAST_TOKENS, 12)
        assert not plain.of_facts and facts.of_facts
        inside = torch.tensor(near)[SKIPPED_TOKENS:-LAST_TOKENS]
        torch.testing.assert_close(facts.attention, plain.attention * inside)
    assert sum(float(facts.attention.sum()) for _, facts in recorder.reads) > 0
    # What the recent pairs of a head serve does not count: the last tokens are 250 behind token 69.
    of_all = [plain.attention for plain, _ in recorder.reads]
    assert (of_all[0][:, 160 - SKIPPED_TOKENS :] > 0).any()
    assert (of_all[2][1, 70 - SKIPPED_TOKENS :] == 0).all()
    assert (of_all[2][0, 70 - SKIPPED_TOKENS :] > 0).any()
    assert (of_all[1][:, 170 - SKIPPED_TOKENS :] == 0).all()


def _importance(model: Path) -> list[torch.Tensor]:
    with open_weights(model / "model.safetensors") as file:
        return [file.get_tensor(f"model.layers.{i}.self_attn.importance") for i in range(3)]


def test_command_writes_sizes_and_importance(base, texts, tmp_path, capsys):
    source, model = tmp_path / "lola", tmp_path / "calibrated"
    assert cli.main(["init", "--base", str(base), "--out", str(source)]) == 0
    argv = ["calibrate", "--base", str(base), "--texts", str(texts)]
    recipe = {"pairs": 40, "least": 8, "recent": 106, "prompts": 8}
    argv += ["--recipe", json.dumps({**recipe, "prompt_length": 300, "facts": 0.2})]
    argv += ["--model", str(source), "--out", str(model)]
    argv += ["--save", str(tmp_path / "found.safetensors")]
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert cli.main(argv) == 0
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert {path.name for path in model.iterdir()} == set(before)
    out = capsys.readouterr().out
    lola = json.loads((model / "config.json").read_text())["lola_config"]
    sizes = lola["sparse_cache_size"]
    assert [len(heads) for heads in sizes] == [2, 2, 2] and read_facts(model).importance
    flat = [size for heads in sizes for size in heads]
    recent = [size for heads in lola["recent_size"] for size in heads]
    # Not all of 6 * 106 reach to the end of a class of distances. The scored pairs have the others.
    assert sum(recent) in (300, 600) and min(recent) == 0
    flat = [size - newest for size, newest in zip(flat, recent, strict=True)]
    assert sum(flat) == 6 * (40 + 106 - sum(recent) // 6) and min(flat) >= 8 and len(set(flat)) > 1
    assert json.dumps(sizes) in out and json.dumps(lola["recent_size"]) in out
    assert "long-range attention" in out
    first = _importance(model)
    assert all(x.shape == (2, 4 + 8 + 1) and x.dtype == torch.float32 for x in first)
    assert cli.main(argv) == 2  # there is a model at --out
    assert "not empty" in capsys.readouterr().err
    assert cli.main([*argv, "--force"]) == 0  # once more: the same again
    assert json.loads((model / "config.json").read_text())["lola_config"] == lola
    for x, y in zip(first, _importance(model), strict=True):
        assert x.equal(y)
    saved, tensors = load_calibration(tmp_path / "found.safetensors")
    assert saved == {key: lola[key] for key in HEAD_KEYS} and lola["hidden_state"] is True
    assert sorted(tensors) == sorted(importance_tensors(dict(enumerate(first))))
    assert tensors["model.layers.2.self_attn.importance"].equal(first[2])
    served = LolaForCausalLM.from_pretrained(model)
    assert served.model.layers[1].self_attn.importance.equal(first[1])


def test_out_is_refused_before_anything_is_read(base, texts, tmp_path, capsys):
    out, model = str(tmp_path / "out"), str(base)
    argv = ["calibrate", "--base", str(base), "--texts", str(texts), "--out"]
    for more, message in (
        ([out], f"--out {out}: there is no --model to copy; give one, or --save FILE"),
        ([model, "--model", model, "--force"], "would replace"),
        ([str(texts), "--model", model, "--force"], "would replace"),
    ):
        assert cli.main([*argv, *more]) == 2
        assert message in capsys.readouterr().err
    assert (base / "config.json").is_file() and texts.is_dir() and not Path(out).exists()


def test_importance_is_fitted_to_the_models_own_pairs(base, texts, tmp_path):
    from lola_vllm.training.calibrate.run import calibrate

    other, lola = tmp_path / "other", tmp_path / "lola"
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 2
            layer.self_attn.o_proj.weight /= 2  # so that nothing else changes
    model.save_pretrained(other)
    assert cli.main(["init", "--base", str(other), "--out", str(lola)]) == 0
    options = CalibrateOptions(pairs=40, least=8, prompts=8, prompt_length=300, facts=0)
    of_base, of_other = (calibrate(base, texts, options, x) for x in (None, lola))
    for of_layer in of_base.held.values():
        assert (of_layer.alone <= of_layer.total).all()
        assert (of_layer.weighted <= of_layer.total * (1 + 1e-6)).all()
    assert any(x.any() for x in of_base.importance.values())
    assert of_base.sizes == of_other.sizes
    config = json.loads((lola / "config.json").read_text())
    (lola / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(CheckpointError, match="calibrate a model before it is quantized"):
        calibrate(base, texts, options, lola)
    in_bfloat16 = calibrate(base, texts, dataclasses.replace(options, dtype="bfloat16"))
    for x, y in zip(in_bfloat16.held.values(), of_base.held.values(), strict=True):
        torch.testing.assert_close(x.total, y.total, rtol=0.05, atol=0.05)
    assert all(x.dtype == torch.float32 for x in in_bfloat16.importance.values())
    for layer, x in of_base.importance.items():
        y = of_other.importance[layer]
        torch.testing.assert_close(x[:, :4], y[:, :4], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(x[:, 4:-1], 2 * y[:, 4:-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 4}, "pairs = 4: must be at least least = 16"),
        ({"recent": -1}, "recent = -1: must be of the kind of 0"),
        ({"prompts": 4}, "prompts = 4: must be at least 5"),
        ({"facts": 2}, "facts = 2: must be between 0 and 1"),
        ({"state_worth": 0.1}, "state_worth = 0.1: heads are tried in a LoLA model; give one, or"),
        (
            {"facts": 0, "prompt_length": 80},
            "prompt_length = 80: too short for anything to leave the window",
        ),
        ({"facts": 0}, "hardly a document of"),
        ({"fact": 0}, "unknown key 'fact'; did you mean 'facts'?"),
        ({"dtype": "int8"}, "dtype = 'int8': must be one of float32, bfloat16"),
    ],
)
def test_bad_options_are_named(base, texts, capsys, options, message):
    argv = ["calibrate", "--base", str(base), "--texts", str(texts)]
    assert cli.main([*argv, "--recipe", json.dumps(options)]) == 2
    assert message in capsys.readouterr().err
