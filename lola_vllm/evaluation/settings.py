"""What is compared: models with their LoLA parameters, and what a sequence of each takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lola_vllm.evaluation import EvalError
from lola_vllm.models.files import CheckpointError, read_json

# The name of the row that `--reference` makes, with which others are compared.
REFERENCE = "reference"


@dataclass(frozen=True)
class Setting:
    """One row of a comparison.

    Attributes:
        name: of the row. model: its directory. lola_config: keys that replace the checkpoint's.
        without: parts that are left out; see `lola_vllm.evaluation.ablation.leave_out`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # rows of a sweep

    name: str
    model: Path
    lola_config: dict[str, Any] = field(default_factory=dict)
    without: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of the model; `CheckpointError` where there is none that can be read."""
        return read_json(self.model / "config.json")

    @property
    def is_lola(self) -> bool:
        """Whether the model is a LoLA checkpoint."""
        from lola_vllm.core.model_types import LOLA_TYPES

        return self.config.get("model_type") in LOLA_TYPES


@dataclass(frozen=True)
class SequenceMemory:
    """Bytes that one sequence takes in the server's pool, prefix caching off.

    Attributes:
        full_kv_bytes_per_token: of a full KV cache of the same layers.
        state_bytes: of a LoLA state, whatever the length; None for softmax attention.
        lola_config: all parameters, defaults and overrides settled; None for softmax attention.
    """

    full_kv_bytes_per_token: int
    state_bytes: int | None
    lola_config: dict[str, Any] | None


def measure(setting: Setting, dtype: str) -> SequenceMemory | None:
    """What a sequence costs; None for models that `lola-vllm estimate` does not know.

    Args:
        setting: of the row. dtype: of keys and values.

    Raises:
        LolaConfigError: the setting's parameters are not valid for the model.
    """
    from lola_vllm.engine.estimate import estimate

    try:
        result = estimate(setting.model, setting.lola_config, dtype=dtype)
    except CheckpointError:
        if setting.is_lola:
            raise
        return None
    full = result.sequence.full_kv_bytes_per_token
    if not setting.is_lola:
        return SequenceMemory(full, None, None)
    return SequenceMemory(full, result.bytes_per_sequence, result.config.lola.model_dump())


def check(setting: Setting, max_length: int) -> None:
    """Refuse settings that an engine would refuse only after its start.

    Raises:
        EvalError: LoLA parameters for a model without LoLA, or a length beyond the model's
            context. CheckpointError: no readable config. LolaConfigError: parameters that are not
            valid.
    """
    from lola_vllm.evaluation.ablation import parts_of

    parts, config = parts_of(setting.without), setting.config
    if not setting.is_lola and (setting.lola_config or parts):
        raise EvalError(
            f"setting {setting.name!r}: {setting.model} is a {config.get('model_type')} model, "
            "which has no lola_config and no sparse cache; make a LoLA checkpoint with "
            "'lola-vllm init', 'convert' or 'demo-model'"
        )
    memory = measure(setting, "bfloat16")  # for its errors as well
    if memory and memory.lola_config and memory.lola_config.get("context_shift"):
        return  # its positions do not end
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and max_length > context:
        raise EvalError(
            f"a length of {max_length} tokens: {setting.model} takes {context} "
            "(max_position_embeddings); ask for shorter ones"
        )


def parse_settings(
    model: Path,
    configs: Sequence[str],
    sweep: Path | None,
    reference: Path | None,
    without: str = "",
) -> list[Setting]:
    """The rows that a command line asks for.

    Args:
        model: of `--model`. configs: values of `--lola-config`, `JSON` or `NAME=JSON`.
        sweep: a JSON file of settings. reference: a model for a row `REFERENCE`, which comes first.
        without: of `--without`.

    Returns:
        At least one setting, with different names.

    Raises:
        EvalError: an option or a file that cannot be read, or names that repeat.
    """
    settings = [] if reference is None else [Setting(REFERENCE, reference)]
    settings += [_parse_config(model, text, without) for text in configs]
    if sweep is not None:
        settings += _read_sweep(sweep, model, without)
    if not configs and sweep is None:
        settings.append(Setting("model", model, {}, without))
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise EvalError(
                f"two settings are named {name!r}; give each a name: --lola-config NAME=JSON"
            )
    return settings


def _parse_config(model: Path, text: str, without: str) -> Setting:
    # "=" may occur in the name, and inside the object.
    head, brace, rest = text.partition("{")
    name, equals, start = head.rpartition("=")
    name, value = (name, start + brace + rest) if equals else ("override", text)
    try:
        config = json.loads(value)
    except ValueError as error:
        raise EvalError(
            f"--lola-config {text!r}: not JSON ({error}); "
            "write NAME='{\"sparse_cache_size\": 256}'"
        ) from None
    if not isinstance(config, dict):
        raise EvalError(f"--lola-config {text!r}: must be a JSON object")
    return Setting(name, model, config, without)


def _read_sweep(path: Path, model: Path, without: str) -> list[Setting]:
    """The rows of a file; what one leaves out is that of the command line."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not rows:
            raise ValueError("no row")
        rows = [{"model": model, "without": without, **row} for row in rows]
        return TypeAdapter(list[Setting]).validate_python(rows)
    except OSError as error:
        raise EvalError(f"--sweep {path}: cannot be read ({error})") from None
    except (ValueError, TypeError) as error:
        what = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        known = ", ".join(item.name for item in fields(Setting))
        raise EvalError(f"--sweep {path}: {what}; must be a list of objects with {known}") from None
