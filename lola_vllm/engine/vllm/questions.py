"""Questions to documents, in the engine's process: a library is listed, the worker that hears a
question is told, and what it finds is composed.

An API server asks twice for each question (`serving/library/asking.py`): before it sends the
question as a request, and when that is over. The worker's half is `serving/library/librarian.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lola_vllm.memory.documents.choose import CANDIDATES
from lola_vllm.memory.documents.words import fuse
from lola_vllm.memory.sessions.manager import SessionManager

Answer = dict[str, Any]
_OF_PART = ("session", "id", "tokens")
# Of a part that has a question's words, and that the model's heads did not find.
_UNREAD: Answer = {"score": 0.0, "share": 0.0, "own": 0.0, "peaks": []}


class Questions:
    """Questions to the documents of an engine.

    Args:
        manager: of its sessions. ask_worker: calls a method of its only worker.
    """

    METHODS = ("hear", "found")

    def __init__(self, manager: SessionManager, ask_worker: Callable[..., Answer]) -> None:
        self._ask, self._ask_worker = manager.call, ask_worker

    def hear(
        self,
        request: str,
        asked: int,
        top: int,
        salt: str | None,
        library: str | None = None,
        segments: Answer | None = None,
    ) -> Answer:
        """Have a question heard that follows the longest of the documents; call before it is sent.

        Args:
            request: id of its request. asked: tokens of it. top: documents to find in it.
            salt: of the owner. library: what is asked.
            segments: or `parts`, as they are answered, with `rest` and `newest` as
                `Librarian.hear` takes them.

        Returns:
            The `parts`: title, part, how many parts the document has, session, id of the state and
            tokens of each; the session of the longest (`anchor`) and the tokens of that (`before`).
            `{"busy": True}`: another question is heard.
        """
        if library is not None:
            listed = self._ask("library", {"library": library, "salt": salt})
            if "error" in listed:
                return dict(listed)
            parts = [
                [one["document"], part["part"], len(one["parts"]), *map(part.get, _OF_PART)]
                for one in listed["documents"]
                for part in one["parts"]
            ]
            segments = {"parts": parts, "rest": None, "newest": 0}
            top = max(top, CANDIDATES)
        assert segments is not None
        parts = segments["parts"]
        anchor = max(parts, key=lambda part: part[-1])[-3]  # the first of several
        texts = self._ask("texts", {"sessions": [anchor], "salt": salt})
        if isinstance(texts, dict):
            return texts
        states = {**segments, "parts": [part[-2:] for part in parts]}
        heard = self._ask_worker("lola_hear", request, len(texts[0]), asked, top, states)
        return {"parts": parts, "anchor": anchor, "before": texts[0], **heard}

    def found(
        self,
        request: str,
        parts: Sequence[tuple[str, int]],
        top: int,
        salt: str | None,
        by_words: Sequence[tuple[int, float]] | None = None,
        made: Answer | None = None,
    ) -> Answer:
        """What a question reads that was heard with a request that is over.

        Args:
            parts: session and tokens of each that it was asked of. top: how many to tell.
            salt: of their owner.
            by_words: the parts that have words of the question, with their scores; None: the
                model's heads find alone.
            made: the `session` that goes on from the first part, and its `ttl`; either may be None.
                None: nothing goes on.

        Returns:
            `found`, the most read first: as `Librarian.found` has it, and the `tokens` of each.
            With `made` also `transcript`: what an answer goes on from, as `SessionManager.tokens`
            has it with its `session`. `{}` while it is looked for.
        """
        answer = self._ask_worker("lola_found", request)
        if "choices" not in answer:
            return answer
        read = {choice["document"]: choice for choice in answer["choices"]}
        order = list(read)
        if by_words is not None:
            scores = {i: choice["score"] for i, choice in read.items()}
            order = fuse([scores, dict(by_words)])[:top]
        names = [parts[i][0] for i in order if i < len(parts)]
        texts = self._ask("texts", {"sessions": names, "salt": salt})
        if isinstance(texts, dict):
            return texts
        told = iter(texts)
        found = [
            {
                **read.get(i, _UNREAD),
                "document": i,
                "tokens": next(told) if i < len(parts) else [],
            }
            for i in order
        ]
        if made is None:
            return {"found": found}
        session = parts[order[0]][0]
        if made["session"] is not None:
            begun = {"sources": [session], "to": made["session"], "ttl": made["ttl"]}
            answer = self._ask("compose", {**begun, "salt": salt})
            session = made["session"]
            if "error" in answer:
                return dict(answer)
        transcript = self._ask("tokens", {"reference": session, "salt": salt})
        if "error" in transcript:
            return dict(transcript)
        return {"found": found, "transcript": {"session": session, **transcript}}
