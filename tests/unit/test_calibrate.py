"""Sizes of the sparse caches, and saliency, measured on text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lola_vllm import cli
from lola_vllm.calibrate import saliency as saliency_module
from lola_vllm.calibrate.options import CalibrateOptions
from lola_vllm.calibrate.reader import ATTENTION, Repeats, attention, read
from lola_vllm.calibrate.run import divide, divide_among
from lola_vllm.calibrate.saliency import SaliencyFit, far_attention, features
from lola_vllm.checkpoint.calibration import load_calibration, saliency_tensors
from lola_vllm.checkpoint.files import open_weights
from lola_vllm.eval.repeats import repeated_ngrams
from lola_vllm.hf.modeling import LolaLlamaForCausalLM
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
    found = far_attention(weights, 2)
    for head, token in ((0, 0), (0, 20), (1, 3), (1, 21)):
        of_group = weights[2 * head : 2 * head + 2, token + 129 :, token]
        assert found[head, token] == (of_group.max() if of_group.numel() else 0)


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


def test_saliency_is_the_ridge_regression_of_log_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saliency_module, "RIDGE", 0.3)
    generator = torch.Generator().manual_seed(5)
    fit, seen = SaliencyFit(), []
    for i in range(1, 7):
        assert fit.judgeable == (i > 5)
        k, v = torch.randn(2, 2, 200, 6, generator=generator)
        weights = torch.rand(4, 200, 200, generator=generator) ** 4
        weights *= k[0, :, :1].T.abs()  # so that there is something to find
        fit.add(k, v, weights)
        target = far_attention(weights, 2).clamp(min=1e-5).log()
        stop = 200 - 128 - 200 // 24
        seen.append((features(k, v)[:, 4:stop], target[:, 4:stop]))
    found, correlation = fit.weights(), fit.correlation()
    assert found.shape == (2, 3 + 6 + 1) and found.dtype == torch.float32

    def ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(0)) / x.std(0, correction=0)
        penalty = 0.3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        return torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean()))

    for head in range(2):
        x = torch.cat([x[head] for x, _ in seen]).double()
        y = torch.cat([y[head] for _, y in seen]).double()
        estimate = x @ found[head, :-1].double() + found[head, -1]
        assert estimate.mean().abs() < 1e-6
        expected = (x - x.mean(0)) / x.std(0, correction=0) @ ridge(x, y)
        torch.testing.assert_close(estimate, expected, rtol=1e-5, atol=1e-6)
        # The fifth window is judged by a fit to the others.
        others = [i for i in range(6) if i != 4]
        x = torch.cat([seen[i][0][head] for i in others]).double()
        y = torch.cat([seen[i][1][head] for i in others]).double()
        unseen = (seen[4][0][head].double() - x.mean(0)) / x.std(0, correction=0) @ ridge(x, y)
        pair = torch.stack([unseen, seen[4][1][head].double()])
        assert correlation[head] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), rel=1e-6)
    assert correlation[0] > 0.3


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

    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 2
            layer.self_attn.o_proj.weight /= 2  # so that nothing else changes
    model.save_pretrained(other)
    options = CalibrateOptions(pairs=40, least=8, windows=5, window_length=300, facts=0)
    of_base, of_other = (calibrate(base, texts, options, x) for x in (None, other))
    weaker = calibrate(base, texts, replace(options, strength=0.1))
    torch.testing.assert_close(weaker.saliency[1], of_base.saliency[1] / 2)
    assert of_base.sizes == of_other.sizes
    for x, y in zip(of_base.saliency, of_other.saliency, strict=True):
        torch.testing.assert_close(x[:, :4], y[:, :4], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(x[:, 4:-1], 2 * y[:, 4:-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "4"], "--pairs = 4: must be at least --least = 16"),
        (["--strength", "-1"], "--strength = -1: must be between 0 (no weight) and 10"),
        (["--window-length", "300", "--facts", "2"], "--facts = 2: must be between 0 and 1"),
        (["--window-length", "301"], "no window of 301 tokens repeats anything"),
        (
            ["--window-length", "300", "--windows", "4"],
            "--windows 4 of --window-length 300: too little text to fit saliency to",
        ),
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
