"""The options of `lola-vllm serve` for stored states, as vLLM's `--additional-config`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from lola_vllm.memory.sessions.settings import (
    AUTO,
    STORE_KEY,
    StoreSettings,
    StoreSettingsError,
)
from lola_vllm.models.files import CheckpointError

ADDITIONAL = "--additional-config"
# Settings of the store by their names there: value and help of their options. A flag has no value.
_OPTIONS = {
    "state_ram": (
        "BYTES",
        "memory for stored states, as 2GiB; 0: none (default: 64 states, in a quarter of what "
        "running states may take)",
    ),
    "state_dir": (
        "DIR",
        "where states are kept for the next start: whoever can read it can read what was said "
        "(default: in memory only)",
    ),
    "state_disk": ("BYTES", "of the files of one model there (default: 20GiB)"),
    "state_key_file": (
        "FILE",
        "a secret that encrypts the files (default: LOLA_VLLM_STATE_KEY, else they are plain)",
    ),
    "store": (
        "WHAT",
        "named: texts without a session's name are kept in memory only, and never in the "
        "directory; all: there too; none: nothing is kept (default: named)",
    ),
    "allowed_hosts": (
        "NAMES",
        "hosts, separated by commas, whose requests a server without API keys answers under "
        "/v1/lola; *: all (default: this machine, and what --host says)",
    ),
    "list_sessions": (
        None,
        "let everybody list the sessions of a server without API keys; by its name a session is "
        "found without it",
    ),
}


class StoreOptions(NamedTuple):
    """What a command line of `lola-vllm serve` says of the store, and the rest of it.

    Attributes:
        given: settings by their names in `--additional-config`.
        rest: the options of `vllm serve`, in their order.
        additional: the user's `--additional-config`, which is not in `rest`; None: none.
        dry_run: whether to start nothing.
    """

    given: dict[str, str | bool]
    rest: list[str]
    additional: dict[str, Any] | None = None
    dry_run: bool = False

    @classmethod
    def parse(cls, options: Sequence[str], before: Mapping[str, Any] | None = None) -> StoreOptions:
        """Take the options of this command out of a command line.

        Args:
            options: what follows the model. before: values of options that stand before it.

        Raises:
            CheckpointError: an option without a value, or an `--additional-config` that is no
                object.
        """
        parser = _Parser(add_help=False, allow_abbrev=False)
        add_options(parser)
        parser.add_argument(ADDITIONAL)
        found, rest = parser.parse_known_args(
            [_dashed(part) for part in options], argparse.Namespace(**before or {})
        )
        given = {name: value for name, value in vars(found).items() if name in _OPTIONS}
        text = found.additional_config
        return cls(given, rest, None if text is None else _object(text), found.dry_run)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the store, from both."""
        return {**(self.additional or {}).get(STORE_KEY, {}), **self.given}

    def value(self, default: bool) -> str | None:
        """The value of `--additional-config`; None where it is not needed.

        Args:
            default: whether states are kept in memory where the user says nothing of it.

        Raises:
            CheckpointError: a setting that cannot be used; names the option.
        """
        settings = self.settings
        if default and settings.get("store") != "none":
            settings.setdefault("state_ram", AUTO)
        if not settings and self.additional is None:
            return None
        try:
            StoreSettings.from_mapping(settings, STORE_KEY).key()
        except StoreSettingsError as error:
            text = str(error)
            for setting in _OPTIONS:
                text = text.replace(f"{STORE_KEY}.{setting}", _option(setting))
            raise CheckpointError(text) from None
        return json.dumps({**(self.additional or {}), STORE_KEY: settings})

    @property
    def keeps(self) -> bool:
        """Whether any state is kept, where the user's memory has room for it."""
        settings = self.settings
        if settings.get("state_ram", AUTO) == AUTO:
            return settings.get("store") != "none"
        return StoreSettings.from_mapping(settings, STORE_KEY).enabled


def add_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of this command that may stand before the model and after it."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be run, and stop there"
    )
    for setting, (metavar, text) in _OPTIONS.items():
        how: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        parser.add_argument(
            _option(setting), dest=setting, default=argparse.SUPPRESS, help=text, **how
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CheckpointError(message.removeprefix("argument "))


def _option(setting: str) -> str:
    return f"--lola-{setting.replace('_', '-')}"


def _dashed(part: str) -> str:
    """An option of this command with dashes for underscores; anything else as it is."""
    head, equals, value = part.partition("=")
    name = head.replace("_", "-")
    return name + equals + value if name in (ADDITIONAL, *map(_option, _OPTIONS)) else part


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{ADDITIONAL}: not valid JSON ({error})") from None
    theirs = found.get(STORE_KEY, {}) if isinstance(found, dict) else None
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{ADDITIONAL}: must be an object, and so must its {STORE_KEY!r}")
    return dict(found)
