"""What one setting gave, as it is kept in a file and taken up again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lola_vllm.eval.settings import Memory, Setting


@dataclass
class Record:
    """Samples of one setting, and how they came about.

    Attributes:
        setting: whose. fingerprint: of the model's files; None for a server.
        memory: what a sequence costs, None if unknown.
        samples: rows of the plan that was run. dtype: the model's, None if unknown.
        seconds: they took, starts of engines included.
        selections: made by another score than the self-recall error, over all layers.
        finished: whether the plan has no more samples.
    """

    setting: Setting
    fingerprint: str | None = None
    memory: Memory | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    dtype: str | None = None
    seconds: float = 0.0
    selections: int = 0
    finished: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What makes samples of two runs comparable; models by name, not by where they lie."""
        return {
            "name": self.setting.name,
            "model": self.setting.model.name,
            "fingerprint": self.fingerprint,
            "overrides": self.setting.lola_config,
            "score": self.setting.score,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        memory = self.memory
        return {
            **self.identity,
            "lola_config": memory.lola_config if memory else None,
            "selections_by_other_score": self.selections,
            "dtype": self.dtype,
            "state_bytes": memory.state_bytes if memory else None,
            "full_kv_bytes_per_token": memory.full_kv_bytes_per_token if memory else None,
            "seconds": round(self.seconds, 1),
            "finished": self.finished,
        }

    def take_up(self, row: dict[str, Any]) -> None:
        """Go on from what `to_json` and the samples beside it once were."""
        self.samples = list(row["samples"])
        self.dtype, self.seconds = row["dtype"], row["seconds"]
        self.selections, self.finished = row["selections_by_other_score"], row["finished"]


def fingerprint(model: Path) -> str:
    """A hash of a model directory's config, tokenizer and weights, 16 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    files = [model / "config.json", model / "tokenizer.json", *sorted(model.glob("*.safetensors"))]
    for path in files:
        if not path.is_file():
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]
