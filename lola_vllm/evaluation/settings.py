"""What is compared, and on what: models with their LoLA parameters and memory, held-out texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError


@dataclass(frozen=True)
class Setting:
    """One row of a comparison.

    Attributes:
        name: of the row. model: its directory. lola_config: keys that replace the checkpoint's.
        without: parts that are left out; see `lola_vllm.evaluation.ablation.leave_out`.
        positions: that the model is said to take; None: as many as its config says.
    """

    name: str
    model: Path
    lola_config: dict[str, Any] = field(default_factory=dict)
    without: str = option("ablation: leave out hidden-state, importance, or both with a comma", "")
    positions: int | None = None

    @property
    def is_lola(self) -> bool:
        """Whether the model is a LoLA checkpoint."""
        from lola_vllm.core.config import LOLA_TYPES

        return read_model_config(self.model).get("model_type") in LOLA_TYPES


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

    def bytes_at(self, length: int) -> int:
        """Bytes of a sequence of `length` tokens."""
        return self.state_bytes or self.full_kv_bytes_per_token * length

    def saving_at(self, length: int) -> float:
        """How many times smaller that is than a full KV cache."""
        return self.full_kv_bytes_per_token * length / self.bytes_at(length)


def read_model_config(model: Path) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        EvalError: there is no such directory, or no readable config in it.
    """
    if not model.is_dir():
        raise EvalError(f"{model}: no such directory, and no http:// or https:// URL either")
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{model}: its config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise EvalError(f"{model}: its config.json must hold a JSON object")
    return config


def measure(setting: Setting, dtype: str) -> SequenceMemory | None:
    """What a sequence costs; None for models that `lola-vllm estimate` does not know.

    Args:
        setting: of the row. dtype: of keys and values.

    Raises:
        LolaConfigError: the setting's parameters are not valid for the model.
    """
    from lola_vllm.engine.estimate import estimate
    from lola_vllm.models.files import CheckpointError

    try:
        result = estimate(setting.model, setting.lola_config, dtype=dtype)
    except CheckpointError:
        if setting.is_lola:
            raise
        return None
    row = next(row for row in result.rows if row.chosen)
    if not setting.is_lola:
        return SequenceMemory(row.full_kv_bytes_per_token, None, None)
    return SequenceMemory(
        row.full_kv_bytes_per_token, row.bytes_per_sequence, result.lola.model_dump()
    )


def check(setting: Setting, max_length: int) -> None:
    """Refuse settings that an engine would refuse only after its start.

    Raises:
        EvalError: LoLA parameters for a model without LoLA, or a length beyond the model's
            context. LolaConfigError: parameters that are not valid.
    """
    from lola_vllm.evaluation.ablation import parts_of

    parts = parts_of(setting.without)
    config = read_model_config(setting.model)
    if not setting.is_lola and (setting.lola_config or parts):
        raise EvalError(
            f"setting {setting.name!r}: {setting.model} is a {config.get('model_type')} model, "
            "which has no lola_config and no sparse cache; make a LoLA checkpoint with "
            "'lola-vllm init', 'convert' or 'demo-model'"
        )
    memory = measure(setting, "bfloat16")  # for its errors as well
    if memory and memory.lola_config and memory.lola_config.get("context_shift"):
        return  # its positions do not end
    context = setting.positions or config.get("max_position_embeddings")
    if isinstance(context, int) and max_length > context:
        more = ", or for --untrained-positions" if setting.is_lola else ""
        raise EvalError(
            f"a length of {max_length} tokens: {setting.model} takes {context} "
            f"(max_position_embeddings); ask for shorter ones{more}"
        )


def with_positions(setting: Setting, length: int) -> Setting:
    """The setting, a LoLA model without end of positions being said to take `length` tokens.

    Its base was not trained on them, which is what this is to show. A setting whose positions are
    shifted takes any length as it is, and its base's length decides how.
    """
    config = read_model_config(setting.model)
    lola = {**config.get("lola_config", {}), **setting.lola_config}
    if not setting.is_lola or lola.get("context_shift"):
        return setting
    return replace(setting, positions=max(length, config.get("max_position_embeddings") or 0))


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
        sweep: a JSON file of settings. reference: a model for a row "reference", which comes
            first. without: of `--without`.

    Returns:
        At least one setting, with different names.

    Raises:
        EvalError: an option or a file that cannot be read, or names that repeat.
    """
    settings = [] if reference is None else [Setting("reference", reference)]
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


class _Row(BaseModel, extra="forbid"):
    """A row of a sweep; what it leaves out is that of the command line."""

    name: str = Field(min_length=1)
    model: Path | None = None
    lola_config: dict[str, Any] = {}
    without: str | None = None


def _read_sweep(path: Path, model: Path, without: str) -> list[Setting]:
    try:
        rows = TypeAdapter(list[_Row]).validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(f"--sweep {path}: cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(_Row.model_fields)
        raise EvalError(
            f"--sweep {path}: {where}: {first['msg']}; must be a list of objects with {known}"
        ) from None
    return [
        Setting(
            row.name,
            row.model or model,
            row.lola_config,
            without if row.without is None else row.without,
        )
        for row in rows
    ]


def read_held_out(path: Path) -> dict[str, list[str]]:
    """Held-out documents at `path`.

    Args:
        path: a text file, or a directory of them.

    Returns:
        Per file, by its name without ending, its held-out documents in order; files without any
        are left out.

    Raises:
        EvalError: no such path, no text file, or nothing held out.
        TextsError: a file that is not UTF-8 or has no text.
    """
    from lola_vllm.training.texts import is_held_out, read_documents

    if not path.exists():
        raise EvalError(f"--texts {path}: no such file or directory")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise EvalError(f"--texts {path}: no .txt file there")
    kinds = {file.stem: list(filter(is_held_out, read_documents(file))) for file in files}
    found = {kind: documents for kind, documents in kinds.items() if documents}
    if not found:
        raise EvalError(
            f"--texts {path}: no document is held out from training, which about one in twenty "
            "is; give more text"
        )
    return found
