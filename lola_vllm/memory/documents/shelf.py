"""Where a server keeps the keys of its libraries' documents, apart from their states.

They are in a file beside that of the state, which is mapped into memory and stays open; what is
encrypted is opened whole, and kept in memory where it was used last. Where a state has no file,
its keys are in memory as long as it is. They can always be taken from the state
again, so nothing is lost where a file is damaged, missing, or of another state.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lola_vllm.memory.documents.keys import DocumentKeys, KeysError
from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.file import StateFileError, file_name, keys_file, read_header

logger = logging.getLogger("vllm.lola")

# Of keys in memory that have an encrypted file as well: those of 700 documents of 2,000 tokens of
# the demo model.
CACHE_BYTES = 512 * 2**20
# Files that stay open, each a mapping of this process.
MAX_OPEN = 8192


class KeyShelf:
    """Keys of documents by the id of their state. Several threads may use it.

    Args:
        of_state: the keys of a state `[rank_bytes]` after so many tokens; all, or of so many of the
            newest.
        directory: of the files; None: there are none. key: that encrypts them; None: nothing does.
    """

    def __init__(
        self,
        of_state: Callable[[Tensor, int, int | None], DocumentKeys],
        directory: Path | None = None,
        key: StateKey | None = None,
    ) -> None:
        self.of_state = of_state
        self._directory, self._key = directory, key
        self._lock = threading.Lock()
        self._held: dict[str, DocumentKeys] = {}
        self._cached: OrderedDict[str, DocumentKeys] = OrderedDict()
        self._cached_bytes = 0

    def add(self, state: str, row: Tensor, num_tokens: int, disk: bool) -> DocumentKeys:
        """Take and keep the keys of a state.

        Args:
            disk: whether the keys go into a file, where the state has one.

        Raises:
            KeysError: the document is longer than the trained length. OSError: of the file.
        """
        keys = self.of_state(row, num_tokens, None)
        name = self._name(state) if disk else None
        if name is not None and self._directory is not None:
            keys.write(keys_file(self._directory, state), self._key, name)
            if self._key is not None:  # else they are mapped when they are asked for
                self._cache(state, keys)
        else:
            with self._lock:
                self._held[state] = keys
        return keys

    def find(self, state: str) -> DocumentKeys | None:
        """The keys of a state; None where they have to be taken from it."""
        with self._lock:
            found = self._held.get(state) or self._cached.get(state)
            if state in self._cached:
                self._cached.move_to_end(state)
        if found is None and self._directory is not None:
            path = keys_file(self._directory, state)
            name = self._name(state) if path.exists() else None
            try:
                found = DocumentKeys.read(path, self._key, name) if name is not None else None
            except KeysError as error:
                logger.warning("LoLA: %s; the keys are taken from the state again", error)
            if found is not None:
                self._cache(state, found)
        return found

    def _name(self, state: str) -> bytes | None:
        """What a file of keys says of its state: id and prefix hash, `[32]`, as the state's file
        has them. None where there is no such file, or one that cannot be used."""
        if self._directory is None:
            return None
        try:
            # Libraries are of servers with one rank.
            header = read_header(self._directory / file_name(state, 0, 1), self._key)
        except StateFileError:
            return None
        return bytes.fromhex(header.id + header.prefix_hash)

    def drop(self, state: str) -> None:
        """Forget the keys of a state in memory."""
        with self._lock:
            self._held.pop(state, None)
            self._forget(state)

    def _cache(self, state: str, keys: DocumentKeys) -> None:
        sealed = self._key is not None
        with self._lock:
            self._forget(state)
            self._cached[state] = keys
            self._cached_bytes += keys.nbytes if sealed else 0
            while len(self._cached) > (1 if self._cached_bytes > CACHE_BYTES else MAX_OPEN):
                self._forget(next(iter(self._cached)))

    def _forget(self, state: str) -> None:
        keys = self._cached.pop(state, None)
        if keys is not None and self._key is not None:
            self._cached_bytes -= keys.nbytes
