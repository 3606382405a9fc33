"""Command lines of `vllm serve`: what they set, and that nothing secret of them is shown."""

import json

import pytest

from lola_vllm.models.files import CheckpointError
from lola_vllm.serving.options import given_options, masked, number


def test_a_config_file_counts_and_the_command_line_goes_before_it(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "max-num-seqs: 9\nblock_size: 64\nhf-overrides: {a: 1}\n"
        "enforce-eager: false\nenable-prefix-caching: true\n"
    )
    given = given_options(["--config", str(path), "--block-size", "128"])
    assert given["max-num-seqs"] == "9" and given["block-size"] == "128"
    assert json.loads(given["hf-overrides"]) == {"a": 1}
    assert "no-enforce-eager" in given and given["enable-prefix-caching"] == ""


def test_options_as_vllm_spells_them():
    given = given_options(
        ["--enforce-eager", "--api-key", "a", "b", "-tp", "2", "--x=1", "y", "-cc.mode=3", "-O2",
         "--hf-overrides.a.b", "7", "--seed", "-1"]
    )  # fmt: skip
    assert given == {
        "enforce-eager": "", "api-key": "a", "tensor-parallel-size": "2", "x": "1",
        "compilation-config": "3", "optimization-level": "", "hf-overrides": "7", "seed": "-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("2k", 2000), ("2K", 2048), ("1.5M", 3 * 2**19), ("auto", None), ("", None)],
)
def test_numbers_as_vllm_reads_them(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "options",
    [
        ["--api-key", "SECRET"],
        ["--api-key=SECRET"],
        ["--api_key", "SECRET"],
        ["--api_key=SECRET"],
        ["--api-k", "SECRET"],  # as argparse completes it
        ["--api-ke=SECRET"],
        ["--api-key", "SECRET", "SECRET-2", "SECRET=3"],
        ["--api-key", "-SECRET"],
        ["--api-key", "--SECRET 4"],
        ["--api-key", "-1234567"],
        ["--hf-token", "SECRET"],
        ["--hf_token=SECRET"],
        ["--hf-t", "SECRET"],
        ["--watermark-config", '{"key": "SECRET"}'],
        ["--watermark-config.key", "SECRET"],
        ["--watermark-config.key=SECRET"],
    ],
)
def test_secrets_are_hidden_and_nothing_else(options):
    shown = masked(["vllm", "serve", "model", *options, "--port", "80"])
    assert not any("SECRET" in part or "1234567" in part for part in shown)
    assert shown[:3] == ["vllm", "serve", "model"] and shown[-2:] == ["--port", "80"]
    assert shown[3].partition("=")[0] == options[0].partition("=")[0]
    assert len(shown) == len(options) + 5


def test_options_that_only_look_alike_are_shown():
    options = ["--api-server-count", "2", "--hf-overrides", "{}", "--host", "h", "-tp", "2"]
    assert masked(options) == options


@pytest.mark.parametrize(
    "text", ["api-key: [SECRET\nport: 80\n", "- SECRET\n", "\tapi-key: SECRET"]
)
def test_errors_of_a_config_file_show_nothing_of_it(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError) as error:
        given_options(["--config", str(path)])
    assert str(path) in str(error.value) and "SECRET" not in str(error.value)


def test_a_config_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(CheckpointError, match=r"--config nowhere\.yaml: cannot be read"):
        given_options(["--config", "nowhere.yaml"])
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        given_options(["--config", str(path)])
