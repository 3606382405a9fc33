"""How much is stored, and where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lola_vllm.memory.sessions.cipher import StateKey, StateKeyError, read_key
from lola_vllm.memory.sessions.names import is_unnamed

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
STORE_KEY = "lola"  # in vLLM's --additional-config
# The types that a value may have, and what it must be, in words. An empty text is none.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "state_dir": ((str,), "a path"),
    "state_ttl": ((int, float), "a number"),
    "state_key_file": ((str,), "a path"),
    "state_key_variable": ((str,), "the name of an environment variable"),
    "allowed_hosts": ((str, list, tuple), "names of hosts, as lola.example.com"),
    "list_sessions": ((bool,), "true or false"),
}
_KEYS = ("state_ram", "state_disk", "store", *_KINDS)
STORED = ("named", "all", "none")
AUTO = "auto"  # a `state_ram` that the config hook settles
DISK_BYTES = 20 * 2**30
# States that wait to be written may take so much memory beside the budget, or a quarter of it.
WAITING_BYTES = 256 * 2**20


class StoreSettingsError(ValueError):
    """A setting that cannot be used; names the setting, its value and the remedy."""


@dataclass(frozen=True)
class StoreSettings:
    """Settings of a store.

    Attributes:
        memory: bytes of states in memory, all ranks of an engine together; 0: none.
        directory: where states outlive the process; None: nowhere.
        disk: bytes of the files of one model there.
        ttl: seconds for which a state is kept; None: until others need the room.
        key_file: of the key that encrypts files; key_variable: the environment variable that has
            it instead. Both None: files are not encrypted. The key itself is in neither: each
            process reads it.
        store: "named": texts without a session's name are kept in memory only; "all": they are
            written to the directory too; "none": nothing is kept.
        allowed_hosts: names in a request's `Host` that the routes of a server without API keys
            answer to, beside its own. list_sessions: whether such a server lists its sessions.
    """

    memory: int = 0
    directory: Path | None = None
    disk: int = DISK_BYTES
    ttl: float | None = None
    key_file: Path | None = None
    key_variable: str | None = None
    store: str = STORED[0]
    allowed_hosts: tuple[str, ...] = ()
    list_sessions: bool = False

    def __post_init__(self) -> None:
        if self.memory < 0 or self.disk < 0:
            raise StoreSettingsError(
                f"state_ram = {self.memory}, state_disk = {self.disk}: must not be negative"
            )
        if self.ttl is not None and not 0 < self.ttl < math.inf:
            raise StoreSettingsError(
                f"state_ttl = {self.ttl}: must be a finite number of seconds above 0"
            )
        if self.store not in STORED:
            raise StoreSettingsError(
                f"{STORE_KEY}.store = {self.store!r}: must be one of {', '.join(STORED)}"
            )
        if self.key_file is not None and self.key_variable is not None:
            raise StoreSettingsError(
                f"state_key_file = {self.key_file} and the variable {self.key_variable}: there can "
                "be one key; remove the option or unset the variable"
            )

    @property
    def enabled(self) -> bool:
        """Whether anything can be stored."""
        there_is_room = self.memory > 0 or (self.directory is not None and self.disk > 0)
        return there_is_room and self.store != "none"

    def without(self, staging: int) -> StoreSettings:
        """The same, less the bytes of memory that copies from a device pass through.

        Raises:
            StoreSettingsError: there is memory for states, and no more of it than that.
        """
        if 0 < self.memory <= staging:
            raise StoreSettingsError(
                f"state_ram = {self.memory}: copies from the device pass through {staging} bytes "
                f"of it; give more than {staging}, or 0 to keep no states in memory"
            )
        return replace(self, memory=max(0, self.memory - staging))

    def may_write(self, session: str) -> bool:
        """Whether states of a session may be in the directory."""
        return self.store == "all" or not is_unnamed(session)

    def max_waiting(self, state_bytes: int) -> int:
        """States that may wait to be written, so that a slow disk does not fill the memory.

        Args:
            state_bytes: of a state, all ranks together.
        """
        return max(4, max(WAITING_BYTES, self.memory // 4) // state_bytes)

    def key(self) -> StateKey | None:
        """The key that encrypts files, read anew; None where they are not encrypted.

        Raises:
            StoreSettingsError: it is not there, or it is no key.
        """
        try:
            return read_key(self.key_file, self.key_variable)
        except StateKeyError as error:
            name = "state_key_file" if self.key_variable is None else "state_key_variable"
            raise StoreSettingsError(f"{STORE_KEY}.{name} = {error}") from None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], where: str = "lola") -> StoreSettings:
        """Read `{"state_ram": "2GiB", "state_dir": path, "state_disk": "20GiB", ...}`.

        A `state_ram` of "auto" counts as none until it is settled.

        Args:
            where: what errors call the mapping.

        Raises:
            StoreSettingsError: an unknown key, or a value that cannot be read.
        """
        for key in given:
            if key not in _KEYS:
                raise StoreSettingsError(
                    f"{where}.{key}: unknown setting; known: {', '.join(_KEYS)}"
                )
        found = {key: value for key, value in given.items() if value is not None}
        for key, (types, words) in _KINDS.items():
            if key in found and (type(found[key]) not in types or found[key] == ""):
                raise StoreSettingsError(f"{where}.{key} = {found[key]!r}: must be {words}")
        hosts = found.get("allowed_hosts", ())
        if isinstance(hosts, str):  # of the command line
            hosts = hosts.replace(",", " ").split()
        places = {
            key: Path(found[key]).expanduser().absolute()
            for key in ("state_dir", "state_key_file") if key in found
        }  # fmt: skip
        ram = found.get("state_ram", 0)
        return cls(
            memory=parse_bytes(0 if ram == AUTO else ram, f"{where}.state_ram"),
            directory=places.get("state_dir"),
            key_file=places.get("state_key_file"),
            key_variable=found.get("state_key_variable"),
            disk=parse_bytes(found.get("state_disk", DISK_BYTES), f"{where}.state_disk"),
            ttl=found.get("state_ttl"),
            store=found.get("store", STORED[0]),
            allowed_hosts=tuple(map(str, hosts)),
            list_sessions=found.get("list_sessions", False),
        )


def parse_bytes(text: object, field: str) -> int:
    """Bytes: a number, or a text such as `512MiB`, `2G` or `1.5 GiB`. All units are of 1024.

    Raises:
        StoreSettingsError: it is none.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(text), re.I)
    if not isinstance(text, str) or match is None:
        raise StoreSettingsError(f"{field} = {text!r}: must be bytes, such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
