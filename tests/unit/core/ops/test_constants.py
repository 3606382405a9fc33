"""The constants that Python, C++ and CUDA share are the same numbers everywhere."""

import re
from pathlib import Path

import torch

from lola_vllm.core.ops import constants
from lola_vllm.core.ops.reference import feature_map
from lola_vllm.core.state import BOUND_ROWS

CSRC = Path(__file__).parents[4] / "csrc"


def snake(name):
    """`kRecallEps` as `RECALL_EPS`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("k")).upper()


def number(text):
    """The value of a C++ literal."""
    text = re.sub(r"^T\((.*)\)$", r"\1", text)
    if text.startswith("0x"):
        return float.fromhex(text.rstrip("f")) if "p" in text else int(text.rstrip("u"), 16)
    return float(text)


def test_the_header_has_the_numbers_of_python():
    header = (CSRC / "constants.h").read_text()
    found = re.findall(r"constexpr \w+ (k\w+) = (.+);", header)
    expected = {name: value for name, value in vars(constants).items() if name.isupper()}
    del expected["MAX_FEATURE_NORM"]  # C++ computes the norm
    assert {snake(name): number(text) for name, text in found} == expected


def test_bounds_have_the_same_rows():
    header = (CSRC / "bounds.h").read_text()
    body = re.search(r"enum BoundsRow \{(.*?)\}", header, re.S).group(1)
    rows = re.findall(r"^\s*k(\w+)", body, re.M)
    assert [row.lower() for row in rows] == [*BOUND_ROWS, "bounds"]


def test_the_norm_of_features_is_bounded():
    """Largest where both halves of a feature map are one entry of 1."""
    x = torch.tensor([[1000.0, -1000.0]], dtype=torch.float64)
    phi = feature_map(x, torch.eye(2, dtype=torch.float64))
    assert phi.norm() + 1e-9 >= 2**0.5 and phi.norm() < constants.MAX_FEATURE_NORM
