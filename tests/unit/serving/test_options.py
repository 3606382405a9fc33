"""What a command line of `vllm serve` names."""

import pytest

from lola_vllm.models.files import CheckpointError
from lola_vllm.serving.options import named_options


def test_options_as_vllm_spells_them(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("max-num-seqs: 9\nblock_size: 64\nenforce-eager: false\n")
    named = named_options(
        ["--config", str(path), "--api-key", "a", "b", "-pp", "2", "--x_y=1", "y", "-cc.mode=3",
         "-O2", "--hf-overrides.a.b", "7", "--seed", "-1"]
    )  # fmt: skip
    assert named == {
        "config", "max-num-seqs", "block-size", "enforce-eager", "api-key",
        "pipeline-parallel-size", "x-y", "compilation-config", "optimization-level",
        "hf-overrides", "seed",
    }  # fmt: skip
    assert named_options([f"--config={path}"]) >= {"max-num-seqs"}


@pytest.mark.parametrize(
    "text", ["api-key: [SECRET\nport: 80\n", "- SECRET\n", "\tapi-key: SECRET"]
)
def test_errors_of_a_config_file_show_nothing_of_it(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError) as error:
        named_options(["--config", str(path)])
    assert str(path) in str(error.value) and "SECRET" not in str(error.value)
