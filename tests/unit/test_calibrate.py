"""Sizes of the sparse caches, and saliency, measured on text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lola_vllm import cli
from lola_vllm.calibrate.options import CalibrateOptions
from lola_vllm.calibrate.prompts import AFTER, BEFORE, Prompt, asked_for
from lola_vllm.calibrate.reader import ATTENTION, Repeats, attention, read
from lola_vllm.calibrate.run import divide, divide_among
from lola_vllm.calibrate.saliency import (
    LAST_TOKENS,
    SKIPPED_TOKENS,
    Asked,
    Read,
    errors_of_others,
    far_attention,
    features,
    fit,
    held,
    parted,
)
from lola_vllm.checkpoint.calibration import load_calibration, saliency_tensors
from lola_vllm.checkpoint.files import open_weights
from lola_vllm.eval.repeats import repeated_ngrams
from lola_vllm.hf.modeling import LolaLlamaForCausalLM
from lola_vllm.ops.reference import feature_map, pair_saliency, self_recall_error
from lola_vllm.texts import SEPARATOR


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random Llama with grouped heads whose tokens are letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    out = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
        )
    ).save_pretrained(out)  # fmt: skip
    letters = {chr(33 + i): i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    return out


def test_pairs_follow_the_root_of_the_mass() -> None:
    assert divide([0.01, 0.04, 0.0, 0.09], 100, 10) == [20, 30, 10, 40]
    for total in range(40, 90):
        sizes = divide([0.3, 0.011, 0.2, 0.07], total, 10)
        assert sum(sizes) == total and min(sizes) >= 10
    with pytest.raises(ValueError, match="30 pairs for 4 sets"):
        divide([1.0] * 4, 30, 10)
    with pytest.raises(ValueError, match="100 pairs"):
        divide([0.0] * 4, 100, 10)


def test_sizes_are_of_heads_or_of_layers() -> None:
    mass = [[0.01, 0.04], [0.0, 0.09]]
    by_head = divide_among(mass, CalibrateOptions(pairs=25, least=10))
    assert by_head == [[20, 30], [10, 40]]
    by_layer = divide_among(mass, CalibrateOptions(pairs=25, least=10, by="layer"))
    assert by_layer == [22, 28]  # of the strongest heads


def test_the_mass_is_the_attention_that_transformers_reports(base: Path) -> None:
    ids = torch.randint(64, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    ids[200:210] = ids[3:13]
    places = repeated_ngrams(ids)
    assert len(places) >= 8
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = plain(torch.tensor([ids]), output_attentions=True).attentions
    expected = [
        max(
            sum(float(weights[0, head, end - 1, before]) for end, before in places) / len(places)
            for head in (2 * kv_head, 2 * kv_head + 1)
        )
        for weights in attentions
        for kv_head in range(2)
    ]
    import transformers

    transformers.AttentionInterface.register(ATTENTION, attention)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ATTENTION).eval()
    repeats = Repeats()
    read(model, [ids, list(range(64))], repeats)  # the second repeats nothing
    assert repeats.places == len(places)
    assert [m for heads in repeats.mass() for m in heads] == pytest.approx(expected, rel=1e-4)


def test_far_attention_is_the_largest_from_far_behind() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(4, 150, 150, generator=generator)
    queries = torch.tensor([5, 130, 140, 149])
    found = far_attention(weights[:, queries], queries, 2)
    for head, token in ((0, 0), (0, 11), (1, 3), (1, 20), (1, 21), (0, 149)):
        far = [q for q in queries.tolist() if q - token > 128]
        of_group = weights[2 * head : 2 * head + 2, far, token]
        assert found[head, token] == (of_group.max() if far else 0)


@pytest.mark.parametrize("state_heads", [2, 4])
def test_errors_are_those_in_a_state_of_all_other_pairs(state_heads: int) -> None:
    generator = torch.Generator().manual_seed(6)
    k, v = torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64)
    maps = torch.randn(state_heads, 8, 5, generator=generator, dtype=torch.float64)
    found = errors_of_others(k, v, maps)
    assert found.shape == (2, 9)
    group = state_heads // 2
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


def test_tokens_of_facts_that_are_asked_for() -> None:
    text = [*range(100, 140), 7, 8, 9, *range(140, 200)]
    ids = [*text, 50, 7, 8, 9, 51, 60, 61]
    marks = [False] * (len(text) + 1) + [True] * 3 + [False] + [True] * 2
    asked = asked_for(ids, marks)
    assert [i for i, x in enumerate(asked) if x] == list(range(40 - BEFORE, 43 + AFTER))
    # The first token of a value may be another one where the text says it.
    assert asked_for([*text[:40], 6, *text[41:], *ids[len(text) :]], marks)[41]
    assert not any(asked_for(ids, [False] * len(ids)))


def test_features_do_not_depend_on_the_position() -> None:
    generator = torch.Generator().manual_seed(4)
    k, v = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    angle = torch.rand(5, 4, generator=generator, dtype=torch.float64) * 100
    a, b = k[:, :4], k[:, 4:]
    turned = torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1
    )
    torch.testing.assert_close(features(turned, v), features(k, v))
    assert features(k[:, :7], v[:, :7]).shape == (5, 3 + 7)


def _reads(number: int, heads: int = 2, tokens: int = 400) -> list[Read]:
    """Prompts whose worth follows feature 1 in head 0, and feature 2, reversed, in head 1."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(number):
        x = torch.randn(heads, tokens, 6, generator=generator)
        told = torch.stack([x[0, :, 1], -x[1, :, 2]])
        worth = (told > 1.5).float() * torch.rand(heads, tokens, generator=generator)
        log_errors = 0.2 * torch.randn(heads, tokens, generator=generator)
        found.append(Read(x.half() * 3 + 1, log_errors, worth, bool(i % 4)))
    return found


def test_the_fit_finds_what_is_read() -> None:
    fitted, judged = parted(_reads(50))
    assert (len(fitted), len(judged)) == (40, 10)
    sizes = [40, 12]
    weights = fit(fitted, sizes)
    assert weights.shape == (2, 7) and weights.dtype == torch.float32
    assert weights[0].argmax() == 1 and weights[1, :-1].argmin() == 2
    kept, worth = held(judged, sizes, weights)
    alone, _ = held(judged, sizes, None)
    oracle = sum(r.worth.sort(-1, descending=True).values[1, :12].sum() for r in judged)
    # By chance a tenth is held, as the errors say nothing here.
    assert (alone / worth < 0.25).all()
    assert kept[0] / worth[0] > 0.9 and kept[1] / oracle > 0.6
    # The mean of the log is 0, and what is served is what was fitted.
    x = torch.cat([r.features for r in fitted], dim=1).float()
    log = (x * weights[:, None, :-1]).sum(-1) + weights[:, None, -1]
    assert log.mean(-1).abs().max() < 1e-4
    k, v = x[..., :4], x[..., 2:]
    k = torch.cat([k[..., :2].abs(), torch.zeros_like(k[..., :2])], dim=-1)
    served = pair_saliency(k, v, weights[:, None]).log()
    expected = (features(k, v) * weights[:, None, :-1]).sum(-1) + weights[:, None, -1]
    torch.testing.assert_close(served, expected)
    assert fit(fitted, sizes).equal(weights) and not fit(fitted, sizes, 1).equal(weights)


def test_a_head_with_nothing_to_choose_has_no_saliency() -> None:
    weights = fit(_reads(6), [0, 4000])
    assert not weights.any()
    kept, worth = held(_reads(2), [0, 4000], weights)
    assert kept[0] == 0 and kept[1] == worth[1]


def test_plain_text_is_read_anywhere_and_facts_where_they_are(base: Path) -> None:
    import transformers

    transformers.AttentionInterface.register(ATTENTION, attention)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ATTENTION).eval()
    ids = torch.randint(64, (320,), generator=torch.Generator().manual_seed(1)).tolist()
    near = [40 <= i < 60 for i in range(320)]
    prompts = [Prompt(ids, None), Prompt(ids, near)]
    asked = Asked(prompts, [torch.eye(8).repeat(2, 1, 1)] * 3)
    read(model, [prompt.ids for prompt in prompts], asked)
    for plain, facts in asked.reads:
        assert plain.features.shape == (2, 320 - SKIPPED_TOKENS - LAST_TOKENS, 12)
        assert not plain.of_facts and facts.of_facts
        inside = torch.tensor(near)[SKIPPED_TOKENS:-LAST_TOKENS]
        torch.testing.assert_close(facts.worth, plain.worth * inside)
    assert sum(float(facts.worth.sum()) for _, facts in asked.reads) > 0


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Documents that say a third of themselves twice."""
    generator = torch.Generator().manual_seed(2)
    documents = []
    for _ in range(60):
        codes = torch.randint(64, (200,), generator=generator).tolist()
        text = "".join(chr(33 + code) for code in codes)
        documents.append(text + text[:100])
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")
    return folder


def _saliency(model: Path) -> list[torch.Tensor]:
    with open_weights(model / "model.safetensors") as file:
        return [file.get_tensor(f"model.layers.{i}.self_attn.saliency") for i in range(3)]


def test_command_writes_sizes_and_saliency(
    base: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "lola"
    assert cli.main(["init", "--base", str(base), "--out", str(model)]) == 0
    argv = ["calibrate", "--base", str(base), "--texts", str(texts), "--window-length", "300"]
    argv += [
        "--pairs",
        "40",
        "--least",
        "8",
        "--windows",
        "5",
        "--prompts",
        "8",
        "--prompt-length",
        "300",
        "--facts",
        "0.2",
        "--model",
        str(model),
    ]
    argv += ["--save", str(tmp_path / "found.safetensors")]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    lola = json.loads((model / "config.json").read_text())["lola_config"]
    sizes = lola["sparse_cache_size"]
    assert [len(heads) for heads in sizes] == [2, 2, 2] and lola["saliency"] is True
    flat = [size for heads in sizes for size in heads]
    assert sum(flat) == 240 and min(flat) >= 8 and len(set(flat)) > 1
    assert json.dumps(sizes) in out and "reads back" in out
    first = _saliency(model)
    assert all(x.shape == (2, 4 + 8 + 1) and x.dtype == torch.float32 for x in first)
    assert cli.main(argv) == 0  # once more: the same again
    assert json.loads((model / "config.json").read_text())["lola_config"] == lola
    for x, y in zip(first, _saliency(model), strict=True):
        assert x.equal(y)
    saved, tensors = load_calibration(tmp_path / "found.safetensors")
    assert saved == sizes and sorted(tensors) == sorted(saliency_tensors(first))
    assert tensors["model.layers.2.self_attn.saliency"].equal(first[2])
    assert not list(model.glob("*.partial"))
    served = LolaLlamaForCausalLM.from_pretrained(model)
    assert served.model.layers[1].self_attn.saliency.equal(first[1])


def test_saliency_is_fitted_to_the_models_own_pairs(
    base: Path, texts: Path, tmp_path: Path
) -> None:
    from lola_vllm.calibrate.run import calibrate

    other, lola = tmp_path / "other", tmp_path / "lola"
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 2
            layer.self_attn.o_proj.weight /= 2  # so that nothing else changes
    model.save_pretrained(other)
    assert cli.main(["init", "--base", str(other), "--out", str(lola)]) == 0
    options = CalibrateOptions(
        pairs=40, least=8, windows=5, window_length=300, prompts=8, prompt_length=300, facts=0
    )
    of_base, of_other = (calibrate(base, texts, options, x) for x in (None, lola))
    assert all(0 <= alone <= 1 and 0 <= weighed <= 1 for alone, weighed in of_base.held)
    assert any(x.any() for x in of_base.saliency)
    assert of_base.sizes == of_other.sizes
    for x, y in zip(of_base.saliency, of_other.saliency, strict=True):
        torch.testing.assert_close(x[:, :4], y[:, :4], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(x[:, 4:-1], 2 * y[:, 4:-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "4"], "--pairs = 4: must be at least --least = 16"),
        (["--prompts", "4"], "--prompts = 4: must be at least 5"),
        (["--window-length", "300", "--facts", "2"], "--facts = 2: must be between 0 and 1"),
        (["--window-length", "301"], "no window of 301 tokens repeats anything"),
        (
            ["--window-length", "300", "--facts", "0", "--prompt-length", "80"],
            "--prompt-length = 80: too short for anything to leave the window",
        ),
        (["--window-length", "300", "--facts", "0"], "hardly a document of"),
    ],
)
def test_bad_options_are_named(
    base: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert cli.main(["calibrate", "--base", str(base), "--texts", str(texts), *options]) == 2
    assert message in capsys.readouterr().err
