"""The options of `lola-vllm serve` for stored states, as vLLM's `--additional-config`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lola_vllm.memory.sessions.settings import STORE_KEY, StoreSettings, StoreSettingsError
from lola_vllm.models.files import CheckpointError


class Option(NamedTuple):
    """An option of `lola-vllm serve`.

    Attributes:
        setting: its name in `--additional-config`. metavar, help: as `--help` shows them; a flag,
            which is true where it is given, has no metavar.
    """

    setting: str
    metavar: str | None
    help: str


OPTIONS = {
    "--lola-state-ram": Option(
        "state_ram", "BYTES",
        "memory for stored states, as 2GiB; 0: none (default: 64 states, in a quarter of what "
        "running states may take)",
    ),
    "--lola-state-dir": Option(
        "state_dir", "DIR",
        "where states are kept for the next start: whoever can read it can read what was said "
        "(default: in memory only)",
    ),
    "--lola-state-disk": Option(
        "state_disk", "BYTES", "of the files of one model there (default: 20GiB)"
    ),
    "--lola-state-key-file": Option(
        "state_key_file", "FILE",
        "a secret that encrypts the files (default: LOLA_VLLM_STATE_KEY, else they are plain)",
    ),
    "--lola-store": Option(
        "store", "WHAT",
        "named: texts without a session's name are kept in memory only, and never in the "
        "directory; all: there too; none: nothing is kept (default: named)",
    ),
    "--lola-allowed-hosts": Option(
        "allowed_hosts", "NAMES",
        "hosts, separated by commas, whose requests a server without API keys answers under "
        "/v1/lola; *: all (default: this machine, and what --host says)",
    ),
    "--lola-list-sessions": Option(
        "list_sessions", None,
        "let everybody list the sessions of a server without API keys; by its name a session is "
        "found without it",
    ),
}  # fmt: skip
ADDITIONAL = "--additional-config"
# Without an option: the states of so many conversations, in a quarter of what the pool may take.
STATES = 64
SHARE = 4


class StoreOptions(NamedTuple):
    """What a command line says of the store.

    Attributes:
        given: settings by their names in `--additional-config`. rest: the other options.
        additional: the user's `--additional-config`, which is no longer in `rest`; None: none.
    """

    given: dict[str, str | bool]
    rest: list[str]
    additional: dict[str, Any] | None

    @property
    def memory(self) -> int | None:
        """Bytes of memory that the user gives to the store; None: not said."""
        settings = {**(self.additional or {}).get(STORE_KEY, {}), **self.given}
        if settings.get("store") == "none":
            return 0
        return read(settings).memory if "state_ram" in settings else None

    def value(self, ram: int | None) -> str | None:
        """The value of `--additional-config`; None where it is not needed.

        Args:
            ram: bytes to use where the user says nothing about memory; None: do not.
        """
        theirs = dict((self.additional or {}).get(STORE_KEY, {}))
        settings: dict[str, Any] = {**theirs, **self.given}
        if ram and "state_ram" not in settings:
            settings["state_ram"] = ram
        if not settings:
            return None if self.additional is None else json.dumps(self.additional)
        read(settings)
        return json.dumps({**(self.additional or {}), STORE_KEY: settings})


def split(options: Sequence[str]) -> StoreOptions:
    """Take the store's options out of a command line of `vllm serve`.

    Raises:
        CheckpointError: an option without a value, or an `--additional-config` that is no object.
    """
    given: dict[str, str | bool] = {}
    rest: list[str] = []
    additional: dict[str, Any] | None = None
    left = iter(options)
    for part in left:
        name, equals, value = part.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name not in OPTIONS and name != ADDITIONAL:
            rest.append(part)
            continue
        if name in OPTIONS and OPTIONS[name].metavar is None:
            if equals:
                raise CheckpointError(f"{name} = {value!r}: it takes no value; leave the value out")
            given[OPTIONS[name].setting] = True
            continue
        if not equals:
            following = next(left, None)
            if following is None or following.startswith("--"):
                raise CheckpointError(f"{name}: expects a value")
            value = following
        if name == ADDITIONAL:
            additional = _object(value)
        else:
            given[OPTIONS[name].setting] = value
    return StoreOptions(given, rest, additional)


def read(settings: Mapping[str, Any]) -> StoreSettings:
    """Check settings.

    Raises:
        CheckpointError: names the option.
    """
    try:
        found = StoreSettings.from_mapping(settings, STORE_KEY)
        found.key()
        return found
    except StoreSettingsError as error:
        text = str(error)
        for option, row in OPTIONS.items():
            text = text.replace(f"{STORE_KEY}.{row.setting}", option)
        raise CheckpointError(text) from None


def stores(additional: str) -> bool:
    """Whether a value of `--additional-config` makes a store of states."""
    return read(json.loads(additional).get(STORE_KEY, {})).enabled


def default_memory(room: int, state: int) -> int:
    """Bytes of memory for stored states: 0 where a turn's two states do not fit.

    Args:
        room: bytes that the pool may take. state: bytes of a state, all ranks together.
    """
    states = min(STATES, room // SHARE // state)
    return states * state if states >= 2 else 0


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{ADDITIONAL}: not valid JSON ({error})") from None
    theirs = found.get(STORE_KEY, {}) if isinstance(found, dict) else None
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{ADDITIONAL}: must be an object, and so must its {STORE_KEY!r}")
    return dict(found)
