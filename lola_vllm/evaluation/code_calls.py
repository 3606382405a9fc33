"""A line of code that needs a definition read long ago: a call by the names of its parameters.

The text is held-out Python. Among it stands a function of it, whose name is exchanged for one that
no model has seen, so that only the definition says what the parameters are called. At the end the
function is called, after a call of the same form, and the rest of that line is asked for.
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.question import Draft, Question, RealText, hide

# Parameters and lines of a function that is asked for.
LEAST_PARAMETERS, MOST_PARAMETERS, MOST_LINES = 3, 6, 24
# A list or a text without empty lines is cut into pieces of so many lines.
PIECE_LINES = 16
CALL_ROOM = 64  # tokens of six names, each said twice

# The definition and the call that show the form. It stands near the end, in every window.
EXAMPLE = '''def nearest(value, lowest, highest):
    """The value, or the bound that it exceeds."""
    return max(lowest, min(value, highest))


def call_by_name():
    # Every argument has its parameter's name, in the order of the definition.
    nearest(value=value, lowest=lowest, highest=highest)
   '''


class Definition(NamedTuple):
    """A function of a document.

    Attributes:
        name: its own. parameters: their names in order, without `self` or `cls`.
        source: without indentation, decorators, `self` and `cls`.
    """

    name: str
    parameters: tuple[str, ...]
    source: str

    def renamed(self, name: str) -> str:
        """The source of the function under another name."""
        return re.sub(rf"\bdef {re.escape(self.name)}\b", f"def {name}", self.source, count=1)


class Code(RealText):
    """Pieces of Python documents, read on from a random place.

    Args:
        documents: texts; one after the other, and from the start again after the last.

    Raises:
        EvalError: they define no function that could be asked for.

    Attributes:
        definitions: of functions with different parameters.
    """

    what = "code"

    def __init__(self, documents: list[str]) -> None:
        super().__init__(documents)
        found = {d.parameters: d for text in documents for d in definitions(text)}
        self.definitions = [found[key] for key in sorted(found)]
        if not self.definitions:
            raise EvalError(
                "--texts: the held-out code defines no function of "
                f"{LEAST_PARAMETERS} to {MOST_PARAMETERS} parameters; give more Python"
            )

    def split(self, document: str) -> list[str]:
        """What stands between empty lines, at most `PIECE_LINES` long."""
        pieces = []
        for block in re.split(r"\n(?:[ \t]*\n)+", document.strip("\n")):
            lines = block.split("\n")
            pieces += [
                "\n".join(lines[i : i + PIECE_LINES]) for i in range(0, len(lines), PIECE_LINES)
            ]
        return [piece for piece in pieces if piece.strip()]


def definitions(document: str) -> list[Definition]:
    """The functions and methods of a document that can be asked for; none of one that is cut.

    They have `LEAST_PARAMETERS` to `MOST_PARAMETERS` parameters, all by position or name.
    """
    try:
        tree = ast.parse(document)
    except (SyntaxError, ValueError):
        return []
    found = []
    lines = document.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        given = node.args
        names = tuple(arg.arg for arg in given.args if arg.arg not in ("self", "cls"))
        if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs:
            continue
        if not LEAST_PARAMETERS <= len(names) <= MOST_PARAMETERS:
            continue
        if node.end_lineno - node.lineno >= MOST_LINES:
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        source = re.sub(r"\(\s*(?:self|cls)\s*,\s*", "(", source, count=1)
        found.append(Definition(node.name, names, source))
    return found


@dataclass(frozen=True)
class CallDraw:
    """Draws a function, and asks for a call of it; see `Task.draw`.

    Attributes:
        key: draws its new name, in which a hyphen is none of Python's.
    """

    key: Callable[[random.Random], str]

    def __call__(
        self, rng: random.Random, depth: float, length: int, text: RealText | None
    ) -> Draft:
        assert isinstance(text, Code)
        definition, start = rng.choice(text.definitions), text.start(rng)
        name = self.key(rng).replace("-", "_")
        source = definition.renamed(name)
        first, *others = (f"{name}={name}" for name in definition.parameters)

        def draft(units: int) -> Question:
            pieces = text.read(start, units)
            # As deep in a class or function as what follows, so that the code stays code.
            follows = pieces[int(depth * units)]
            indent = follows[: len(follows) - len(follows.lstrip(" "))]
            needle = textwrap.indent(source, indent)
            mixed, (found,) = hide(pieces, [(depth, needle)])
            return Question(
                text="\n\n".join([*mixed, EXAMPLE]),
                answer_prefix=f"{name}({first},",
                expected=(", ".join(others) + ")",),
                depth=found,
                needed=(needle,),
                begins=True,
            )

        return draft
