"""What people do with sessions: list, look, fork, rename, delete, export and import.

Answers are plain dicts and lists, because routes and commands ask from another process.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from lola_vllm.memory.sessions.catalog import SessionError
from lola_vllm.memory.sessions.file import StateFileError, read_header, with_rank
from lola_vllm.memory.sessions.libraries import (
    all_parts,
    describe_libraries,
    describe_library,
    made_of_parts,
    replaced_parts,
)
from lola_vllm.memory.sessions.making import compose, fork, import_state
from lola_vllm.memory.sessions.names import (
    LIBRARY,
    MAX_SOURCES,
    Reference,
    SessionNameError,
    addition_of,
    check_name,
    check_new_name,
    parse_reference,
)
from lola_vllm.memory.sessions.orders import DISK, MEMORY
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.memory.sessions.shared_prefixes import orphaned_prefixes
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.tiers import SessionKey, Stored
from lola_vllm.memory.sessions.upkeep import Operation

Answer = dict[str, Any]

# Seconds for which what the server composed for a request stays where nobody deletes it.
COMPOSED_TTL = 3600.0


class SessionManager:
    """Sessions of one store.

    `salt` is the cache salt of the caller, None for none: sessions of one salt do not exist for
    another.
    """

    METHODS = (
        "sessions", "show", "tokens", "fork", "compose", "rename", "delete", "clear",
        "files", "import_file", "stats", "result", "libraries", "library", "texts",
        "compose_parts", "remove_documents", "past",
    )  # fmt: skip

    def __init__(self, store: SessionStore) -> None:
        self.store = store

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """Call a method by name, for another process.

        Returns:
            What it returns, or `{"error": text, "kind": kind}` in place of an exception.
        """
        try:
            if method not in self.METHODS:
                raise SessionError("bad", f"{method}: no such method")
            return getattr(self, method)(**arguments)
        except SessionError as error:
            return {"error": str(error), "kind": error.kind}
        except (SessionNameError, StateFileError) as error:
            return {"error": str(error), "kind": "bad"}
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}", "kind": "unavailable"}

    def result(self, operation: int) -> Any:
        """What became of a rename or a deletion that was answered with its number.

        Returns:
            `{"operation": number}` while it is not over, else what the method answers.
        """
        found = self.store.upkeep.find(operation)
        if found is None:
            raise SessionError("not-found", f"operation = {operation}: there is none, or no longer")
        return self._ended(found)

    def sessions(self, salt: str | None = None) -> list[Answer]:
        """Sessions, the last used first. An owner's libraries are listed by `libraries`."""
        store, hashed = self.store, salt_hash(salt)
        with store.lock:
            store.expire()
            found = [
                self._describe(key)
                for key in store.sessions
                if key[0] == hashed and not key[1].startswith(LIBRARY)
            ]
        return sorted(found, key=lambda one: -one["used"])

    def show(self, session: str, salt: str | None = None) -> Answer:
        """A session with all of its states, oldest first."""
        return self._shown((salt_hash(salt), check_name(session)))

    def tokens(self, reference: str, salt: str | None = None) -> Answer:
        """Token ids of a session, or of a turn: what its longest state covers, and what was said
        after it: `{"turn", "kind", "tokens", "tail"}`."""
        state = self._longest(reference, salt)
        header, tokens = state.header, self.store.tokens_of(state)
        return {
            "turn": header.turn, "kind": header.kind, "tokens": tokens.tolist(),
            "tail": header.tail,
        }  # fmt: skip

    def fork(self, reference: str, to: str, salt: str | None = None) -> Answer:
        """Another session that goes on from a session or one of its turns."""
        store, key = self.store, (salt_hash(salt), check_new_name(to, "to"))
        with store.lock:
            states = self._turn(reference, salt)
            store.check_new(key, "to")
            fork(store, states, to)
            return self._made(key)

    def compose(
        self, sources: list[str], to: str, salt: str | None = None, ttl: float | None = None
    ) -> Answer:
        """A new session made of others, or of turns of them, as if their texts stood one behind the
        other.

        Args:
            sources: in the order of the texts. ttl: seconds for which it is kept; no longer than
                any of the sources.
        """
        store, key = self.store, (salt_hash(salt), check_new_name(to))
        if not 1 <= len(sources) <= MAX_SOURCES:
            raise SessionError(
                "bad", f"from: {len(sources)} sessions; give 1 to {MAX_SOURCES} to compose"
            )
        with store.lock:
            store.check_new(key, "session")
            states = [self._longest(source, salt) for source in sources]
            compose(store, states, to, salt_hash(salt), ttl)
            return self._made(key)

    def _made(self, key: SessionKey) -> Answer:
        if key not in self.store.sessions:
            raise SessionError("unavailable", "the budgets have no room for another session")
        return self._shown(key)

    def libraries(self, salt: str | None = None) -> list[Answer]:
        """The libraries of an owner, by name."""
        return describe_libraries(self.store, salt_hash(salt))

    def library(self, library: str, salt: str | None = None) -> Answer:
        """A library, its documents by title, and the parts of each.

        What newer additions have replaced is deleted.
        """
        store, hashed, name = self.store, salt_hash(salt), check_name(library, "library")
        with store.lock:
            replaced = replaced_parts(store, hashed, name)
            if replaced:
                answers, _ = made_of_parts(store, hashed, replaced)
                store.upkeep.delete(replaced + answers)
            return describe_library(store, hashed, name)

    def texts(self, sessions: list[str], salt: str | None = None) -> list[list[int]]:
        """Token ids of sessions, each that of its longest state."""
        return [self.tokens(one, salt)["tokens"] for one in sessions]

    def compose_parts(self, sources: list[str], salt: str | None = None) -> Answer:
        """A session that the server composes of others for a request, in the order of their texts,
        and what `tokens` tells of it. It is kept for `COMPOSED_TTL`, if nobody deletes it before.

        Args:
            sources: sessions, or turns of them.
        """
        name = f"{LIBRARY}answer-{secrets.token_hex(16)}"
        with self.store.lock:
            parts = [self._longest(source, salt) for source in sources]
            compose(self.store, parts, name, salt_hash(salt), COMPOSED_TTL)
        return {"session": name, **self.tokens(name, salt)}

    def remove_documents(
        self,
        library: str,
        document: str | None = None,
        salt: str | None = None,
        addition: str | None = None,
    ) -> Answer:
        """Delete a document of a library, or all of them, for good.

        What was composed of its parts to answer questions goes too. Sessions that somebody composed
        of them, or went on with, stay, and are named.

        Args:
            addition: 24 hex digits: its parts alone.
        """
        store, hashed = self.store, salt_hash(salt)
        with store.lock:
            leaving = all_parts(store, hashed, check_name(library, "library"), document)
            if addition is not None:
                leaving = [s for s in leaving if addition_of(s.header.session) == addition]
            answers, others = made_of_parts(store, hashed, leaving)
            answer = {"deleted": len(leaving), **({"composed": others} if others else {})}
            return self._ended(store.upkeep.delete(leaving + answers, lambda: answer))

    def past(self, reference: str, size: int, salt: str | None = None) -> Answer:
        """The state of a session, and the segments of its text that are kept, by number from 0 on.

        They are kept as long as the session. Those of another text are deleted.

        Args:
            size: tokens of a segment.

        Returns:
            The newest state's `id` and `tokens`, the `session_id`, which is the `document` of the
            session's segments, and the `segments`.
        """
        store = self.store
        with store.lock:
            newest = self._longest(reference, salt)
            if newest.header.adapter:  # segments are read without
                raise SessionError(
                    "bad", f"recall: {reference} has an adapter, and is asked alone; leave it out"
                )
            text = store.tokens_of(newest)
            kept: dict[int, Stored] = {}
            stale = []
            for state in store.segments_of({newest.header.session_id}):
                number = state.header.part - 1
                own = text[number * size : (number + 1) * size]
                hashes = store.prefix_hashes(own, "", newest.header.salt)
                same = state.header.prefix_hash == hashes.prefix_hash(len(own)).hex()
                if same and len(own) == size and number not in kept:
                    kept[number] = state
                else:
                    stale.append(state)
            if stale:
                store.upkeep.delete(stale)
            return {
                "id": newest.id,
                "session_id": newest.header.session_id,
                "tokens": newest.header.num_tokens,
                "segments": [
                    {"segment": number, "session": state.header.session, "id": state.id}
                    for number, state in sorted(kept.items())
                ],
            }

    def rename(self, session: str, to: str, salt: str | None = None) -> Answer:
        """Another name for a session."""
        store, old, new = self.store, check_name(session), check_new_name(to, "to")
        with store.lock:
            states = store.lookup(Reference(old), salt_hash(salt))
            store.check_new((salt_hash(salt), new), "to")
            due = [state for state in states if store.is_due(state, new)]
            operation = store.upkeep.rewrite(
                states, answer=lambda: self.show(new, salt), session=new
            )
            for state in due:
                store.write(state)
            return self._ended(operation)

    def delete(self, reference: str, salt: str | None = None) -> Answer:
        """Delete a session, or one of its turns: from memory and from the disk.

        The shared prefixes that nothing else goes on from go with it. It is over when the files
        are gone. A file that cannot be removed stays listed. What the server composed of it for a
        request goes too. Sessions that somebody composed of it stay, and are named.
        """
        with self.store.lock:
            states = self.store.lookup(parse_reference(reference, "session"), salt_hash(salt))
            name = states[0].header.session
            segments = self.store.segments_of({state.header.session_id for state in states})
            answers, others = made_of_parts(self.store, salt_hash(salt), states + segments)
            states += orphaned_prefixes(self.store, states) + segments
            left = [other for other in others if other != name]
            answer = {"deleted": len(states), **({"composed": left} if left else {})}
            return self._ended(self.store.upkeep.delete(states + answers, lambda: answer))

    def clear(self) -> Answer:
        """Delete all sessions of this model, whoever they belong to."""
        with self.store.lock:
            states = list(self.store.states.values())
            for state in states:
                self.store.forget(state)
        return {"deleted": len(states)}

    def files(self, reference: str, salt: str | None = None) -> Answer:
        """Where the files of a session's longest state, or a turn's, are: to copy elsewhere."""
        state, directory = self._longest(reference, salt), self.store.directory
        if directory is None or DISK not in state.tiers:
            raise SessionError(
                "unavailable",
                f"{reference} is in memory only; a server with a state directory writes files",
            )
        if not directory.complete(state.id):
            raise SessionError(
                "unavailable", f"{reference} is not written yet; try again in a moment"
            )
        paths = directory.files(state.id)
        for rank, path in enumerate(paths):
            try:
                read_header(path, directory.key, with_rank(state.header, rank))
            except StateFileError as error:
                raise self.store.unusable(state, error) from None
        return describe_state(state) | {"files": list(map(str, paths))}

    def import_file(self, file: str, session: str, salt: str | None = None) -> Answer:
        """Store a state from a file of the same model under a new session.

        Args:
            file: as `files` names it, or as `LolaCache.save` wrote it. It is checked completely. A
                server with a key takes one that has the same key or none, and stores it encrypted.
        """
        name = check_new_name(session)
        import_state(self.store, Path(file), name, salt_hash(salt))
        return self.show(name, salt)

    def stats(self) -> Answer:
        """Numbers for metrics; counters grow from 0 at the start."""
        store = self.store
        with store.lock:
            return {
                "store": store.id,
                "sessions": len(store.sessions),
                "states": len(store.states),
                "state_bytes": store.rank_bytes * store.ranks,
                "bytes": {MEMORY: store.memory.nbytes, DISK: store.disk.nbytes},
                "budget": {MEMORY: store.memory.budget, DISK: store.disk.budget},
                "counts": dict(store.counts),
                "failures": dict(store.failures),
                "seconds": {name: float(value) for name, value in store.seconds.items()},
                "directory": None if store.directory is None else str(store.directory.path),
                "unread": store.unread(),
            }

    def _shown(self, key: SessionKey) -> Answer:
        with self.store.lock:
            states = self.store.lookup(Reference(key[1]), key[0])
            return self._describe(key) | {"states": [describe_state(state) for state in states]}

    def _describe(self, key: SessionKey) -> Answer:
        session = self.store.sessions[key]
        states = list(session.states.values())
        newest = max(state.header.turn for state in states)
        segments = self.store.segments_of({state.header.session_id for state in states})
        return {
            "session": key[1],
            "turn": session.last_turn,
            "turns": sorted({state.header.turn for state in states}),
            "tokens": max(s.header.num_tokens for s in states if s.header.turn == newest),
            "bytes": sum(state.nbytes for state in states),
            "made_of": next((s.header.made_of for s in states if s.header.made_of), []),
            "created": min(state.header.created for state in states),
            "used": max(state.used for state in states),
            "segments": len(segments),
            "segment_bytes": sum(state.nbytes for state in segments),
        }

    def _ended(self, operation: Operation) -> Any:
        """The answer of an operation, or its number while it is not over."""
        if not operation.done:
            return {"operation": operation.number}
        if operation.error is not None:
            raise SessionError(
                "unavailable",
                f"the directory cannot be changed, so all is as it was ({operation.error})"
                if operation.before is not None
                else f"what could not be removed is still listed ({operation.error})",
            )
        return operation.answer()

    def _turn(self, reference: str, salt: str | None) -> list[Stored]:
        """The states of a turn: the one that is named, else the newest."""
        asked = parse_reference(reference, "session")
        states = self.store.lookup(asked, salt_hash(salt))
        newest = max(state.header.turn for state in states)
        return [state for state in states if state.header.turn == newest]

    def _longest(self, reference: str, salt: str | None) -> Stored:
        return max(self._turn(reference, salt), key=lambda state: state.header.num_tokens)


def describe_state(state: Stored) -> Answer:
    """A state for people."""
    header = state.header
    return {
        "id": header.id,
        "turn": header.turn,
        "kind": header.kind,
        "tokens": header.num_tokens,
        "bytes": state.nbytes,
        "tiers": sorted(state.tiers),
        "unwritten": state.unwritten,
        "created": header.created,
        "used": state.used,
        "expires": header.expires,
        "superseded": state.superseded,
        "adapter": header.adapter.partition(":")[0],
        "parent": header.parent,
    }
