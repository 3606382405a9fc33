"""Sizes of the sparse caches by layer, measured where texts repeat themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lola_vllm import cli
from lola_vllm.calibrate.run import ATTENTION, _Reader, divide
from lola_vllm.eval.repeats import repeated_ngrams
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
    with pytest.raises(ValueError, match="30 pairs for 4 layers"):
        divide([1.0] * 4, 30, 10)
    with pytest.raises(ValueError, match="100 pairs"):
        divide([0.0] * 4, 100, 10)


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
            for head in range(4)
        )
        for weights in attentions
    ]
    import transformers

    reader = _Reader()
    transformers.AttentionInterface.register(ATTENTION, reader.attention)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=ATTENTION).eval()
    reader.read(model, ids)
    reader.read(model, list(range(64)))  # repeats nothing
    assert reader.places == len(places)
    assert reader.mass() == pytest.approx(expected, rel=1e-4)


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


def test_command_writes_the_sizes(
    base: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "lola"
    assert cli.main(["init", "--base", str(base), "--out", str(model)]) == 0
    argv = ["calibrate", "--base", str(base), "--texts", str(texts), "--window-length", "300"]
    argv += ["--pairs", "40", "--least", "8", "--windows", "5", "--model", str(model)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    sizes = json.loads((model / "config.json").read_text())["lola_config"]["sparse_cache_size"]
    assert len(sizes) == 3 and sum(sizes) == 120 and min(sizes) >= 8
    assert json.dumps(sizes) in out and "reads back" in out
    assert cli.main(argv) == 0
    assert json.loads((model / "config.json").read_text())["lola_config"]["sparse_cache_size"] == (
        sizes
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "4"], "--pairs = 4: must be at least --least = 16"),
        (["--window-length", "301"], "no window of 301 tokens repeats anything"),
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
