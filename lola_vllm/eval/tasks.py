"""The recall tasks by name."""

from __future__ import annotations

from collections.abc import Sequence

from lola_vllm.eval.chains import draw_chain
from lola_vllm.eval.errors import EvalError
from lola_vllm.eval.needles import NeedleDraw, draw_pass_key
from lola_vllm.eval.questions import Task

# Room for an answer: 7 digits, a uuid's 36 characters or five names, in tokenizers that take a
# token per digit, and some words before them. RULER leaves 128 tokens (30 for chains).
_NUMBER_ROOM, _UUID_ROOM, _CHAIN_ROOM = 24, 56, 48

TASKS = {
    task.name: task
    for task in (
        Task(
            "niah-1",
            "RULER S-NIAH-1: a 7-digit number in repeated noise",
            NeedleDraw("noise"),
            _NUMBER_ROOM,
        ),
        Task(
            "niah-2",
            "RULER S-NIAH-2: a 7-digit number in real prose",
            NeedleDraw("prose"),
            _NUMBER_ROOM,
            needs_prose=True,
        ),
        Task(
            "niah-3",
            "RULER S-NIAH-3: a uuid in real prose",
            NeedleDraw("prose", value="uuid"),
            _UUID_ROOM,
            needs_prose=True,
        ),
        Task("passkey", "a 5-digit pass key in repeated noise", draw_pass_key, _NUMBER_ROOM),
        Task(
            "multikey",
            "RULER MK-NIAH-1: one of four 7-digit numbers in real prose",
            NeedleDraw("prose", keys=4),
            _NUMBER_ROOM,
            needs_prose=True,
        ),
        Task(
            "multikey-2",
            "RULER MK-NIAH-2: one number in a text of nothing but such needles",
            NeedleDraw("needles"),
            _NUMBER_ROOM,
        ),
        Task("vt", "RULER variable tracking: a chain of five variables", draw_chain, _CHAIN_ROOM),
    )
}
DEFAULT_TASKS = ("niah-1", "niah-2", "niah-3", "passkey", "multikey", "vt")


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, in order, doubles dropped.

    Raises:
        EvalError: a name that no task has, or none at all.
    """
    for name in names:
        if name not in TASKS:
            raise EvalError(f"--tasks: {name!r} is no task; choose from {', '.join(TASKS)}")
    if not names:
        raise EvalError(f"--tasks: name at least one of {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names)]
