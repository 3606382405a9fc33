"""The constants that Python, C++ and CUDA share are the same numbers everywhere."""

import re
from pathlib import Path

from lola_vllm.core.ops import constants

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
    assert {snake(name): number(text) for name, text in found} == expected
