"""A tiny base, and texts that repeat themselves."""

from pathlib import Path

import pytest
import torch

from lola_vllm.training.texts import SEPARATOR
from tests.unit.training.distill.test_distill import write_base


@pytest.fixture
def base(tmp_path) -> Path:
    """Its tokens are letters: token i is chr(33 + i), if i < 64."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    return write_base(tmp_path / "base", **sizes, max_position_embeddings=2048)


@pytest.fixture
def texts(tmp_path) -> Path:
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
