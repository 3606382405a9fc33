"""What is read next to a question of a session: a segment of its own text, or a library's part.

The text of a session is cut into segments, and each is read once more, apart, before the first
question after its end. A question is asked of the present and, next to it, of the segment that it
reads most; where newer text has what it reads, of the present alone (`comes_back`).
What came back is no part of the session: the question and its answer are read at its end
(`docs/library.md`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import HTTPException

from lola_vllm.memory.documents.choose import FOUND
from lola_vllm.memory.documents.parts import PART_TOKENS, SHARED_TOKENS
from lola_vllm.memory.sessions.names import PAST, Part, part_session
from lola_vllm.serving.library.adding import check_libraries, most_tokens, read_part
from lola_vllm.serving.library.asking import ask_parts, find, source_of, with_passages
from lola_vllm.serving.library.words import KnownPart
from lola_vllm.serving.sessions.owners import owned
from lola_vllm.serving.sessions.template_boundary import Transcript

if TYPE_CHECKING:
    from lola_vllm.serving.engine import LolaEngine


TOP = 4  # documents that are looked for
# A segment comes back where so much of its score is its own: else newer text has the same.
OWN = 0.4
# None does where newer text has so many times its score.
OUTDOES = 2.0


class Recalled(NamedTuple):
    """What a question is asked of.

    Attributes:
        session: the server's own, composed of the present and what is read next to it.
        transcript: of it. said: what the store's report tells of a segment. sources: parts of a
            library, whose passages are `before` the question.
    """

    session: str
    transcript: Transcript
    said: dict[str, Any]
    sources: list[dict[str, Any]]
    before: str


def segment_tokens(engine: LolaEngine) -> int:
    """Tokens of a segment: as many as a state holds well, and as leave room for a question."""
    interval = engine.page.update_interval
    longest = min(PART_TOKENS, most_tokens(engine) // 4)
    size = longest // interval * interval
    if size < max(interval, engine.page.sink_size, 2 * SHARED_TOKENS):
        raise HTTPException(
            HTTPStatus.NOT_IMPLEMENTED,
            f"recall: segments of {size} tokens are too short; start the server with a longer "
            "--max-model-len",
        )
    return size


async def recall(
    engine: LolaEngine,
    session: str,
    transcript: Transcript,
    question: str,
    salt: str | None,
) -> Recalled | None:
    """What to ask a question of; None: the session alone, as it is short, newer text has what
    the question reads, or there is no room for a segment in the server's longest context.

    Args:
        transcript: of the session. salt: the caller's.

    Raises:
        HTTPException: there can be no libraries here, or a segment could not be stored.
    """
    check_libraries(engine)
    size = segment_tokens(engine)
    count, left = divmod(len(transcript.tokens), size)
    room = int(engine.config.model_config.max_model_len) - len(transcript.tokens) - size
    if not count or room < len(question):  # a token has a character or more
        return None
    present = f"{session}@{transcript.turn}"
    asked = {"reference": present, "size": size, "salt": owned(salt)}
    found = await engine.sessions("past", **asked)
    there = {segment["segment"] for segment in found["segments"]}
    for number in sorted(set(range(count)) - there):
        part = Part(PAST, found["session_id"], number + 1, number + 1)
        tokens = transcript.tokens[number * size : (number + 1) * size]
        await read_part(engine, part, part_session(secrets.token_hex(12)), tokens, None, salt)
    if len(there) < count:
        found = await engine.sessions("past", **asked)
    parts = [
        KnownPart(session, segment["segment"] + 1, count, segment["session"], segment["id"], size)
        for segment in found["segments"]
    ]
    if not parts:
        return None
    rest = (found["id"], found["tokens"], left) if left else None
    newest = 2 if left else 1  # the last segment, and what follows it
    segments = {"parts": [list(part) for part in parts], "rest": rest, "newest": newest}
    _, answer = await ask_parts(engine, question, TOP, salt, segments=segments)
    choice = comes_back(answer["found"], len(parts))
    if choice is None:
        return None
    source = await source_of(engine, parts, choice, question)
    first = (source["part"] - 1) * size
    said = {
        "first": first, "last": first + size, "score": source["score"],
        "sentence": source["sentence"],
    }  # fmt: skip
    composed = await _beside(engine, present, source, salt)
    return Recalled(*composed, {"recalled": said}, [], "")


def comes_back(found: Sequence[dict[str, Any]], segments: int) -> dict[str, Any] | None:
    """The segment that comes back; None: none does.

    It stands next to the question, and what stands there wins where two texts answer it. What is
    newer should: it may have another word on what an old segment tells.

    Args:
        found: as of `ask_parts`, one a segment or more; the last one's number and more are newer
            text. segments: how many there are.
    """
    one = next(one for one in found if one["document"] < segments)
    after = max(one["document"], segments - 2)
    newer = [other["score"] for other in found if other["document"] > after]
    outdone = max(newer, default=0.0) >= OUTDOES * one["score"]
    return None if outdone or one["own"] < OWN else one


async def read_library(
    engine: LolaEngine,
    session: str,
    transcript: Transcript,
    library: str,
    question: str,
    salt: str | None,
) -> Recalled:
    """What to ask a question of that is asked of a library: the session and, next to the
    question, the part that it reads.

    Args:
        transcript: of the session. salt: the caller's.

    Raises:
        HTTPException: there is no such library, or there can be none here.
    """
    check_libraries(engine)
    sources, _ = await find(engine, library, question, FOUND, salt)
    composed = await _beside(engine, f"{session}@{transcript.turn}", sources[0], salt)
    return Recalled(*composed, {}, sources, with_passages(sources))


async def _beside(
    engine: LolaEngine, present: str, source: dict[str, Any], salt: str | None
) -> tuple[str, Transcript]:
    """The session that is composed of a present and a part next to the question."""
    sources = [present, source["session"]]
    said = await engine.sessions("compose_parts", sources=sources, salt=owned(salt))
    return said["session"], Transcript(said["turn"], said["kind"], said["tokens"], said["tail"])
