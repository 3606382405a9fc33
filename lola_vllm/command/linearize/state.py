"""What `lola-vllm linearize` has done so far, in a file of its working directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lola_vllm.models.files import CheckpointError
from lola_vllm.training.distill.state import open_work

NAME = "linearize.json"


@dataclass
class WorkState:
    """A run that can be gone on with.

    Attributes:
        work: its directory.
        inputs: what the user gave: base, texts and options. Another run has others.
        recipe: as JSON, once derived.
        done: stages that are finished.
        seconds: spent in each stage, in interrupted runs too.
    """

    work: Path
    inputs: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file, completely or not at all.

        Raises:
            OSError: it cannot be written.
        """
        values = {key: value for key, value in vars(self).items() if key != "work"}
        part = self.work / f"{NAME}.part"
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")
        part.replace(self.work / NAME)


def open_state(work: Path, inputs: Mapping[str, Any], *, resume: bool) -> WorkState:
    """The state of a working directory, or a new one.

    Raises:
        CheckpointError: a directory in use without `resume`, a run with other inputs, or a file
            that is damaged.
    """
    path = work / NAME
    open_work(work, resume=resume)
    if not path.is_file():
        return WorkState(work, dict(inputs))
    try:
        state = WorkState(work=work, **json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete {work} to start again") from None
    for key, value in inputs.items():
        if state.inputs.get(key) != value:
            raise CheckpointError(
                f"{path}: of a run with {key} = {state.inputs.get(key)!r}, not {value!r}; give "
                "the same options, or another --work-dir"
            )
    return state
