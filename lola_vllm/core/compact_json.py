"""JSON text as people read it: the sizes of all heads on a few lines."""

import json
import re
import textwrap

_JSON_COLUMNS = 96


def compact_lists(text: str) -> str:
    """JSON text with lists of numbers on as few lines as they need, inner lists in one piece."""

    def joined(match: re.Match[str]) -> str:
        items = [json.dumps(item).replace(" ", "\0") for item in json.loads(match[2])]
        numbers = ", ".join(items)
        if len(match[1]) + len(numbers) < _JSON_COLUMNS:
            return f"{match[1]}[{numbers}]".replace("\0", " ")
        indent = " " * (len(match[1]) - len(match[1].lstrip()) + 2)
        lines = textwrap.wrap(
            numbers, _JSON_COLUMNS, initial_indent=indent, subsequent_indent=indent
        )
        return "\n".join([f"{match[1]}[", *lines, f"{indent[2:]}]"]).replace("\0", " ")

    return re.sub(r'^( *"\w+": )(\[[-\d.,\s\[\]]*\])(?=,?$)', joined, text, flags=re.MULTILINE)
