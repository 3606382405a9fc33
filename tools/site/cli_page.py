"""The page of the command line, from the parsers of `lola-vllm`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from lola_vllm.command import cli

HEAD = """# Command line

This page is made of the commands' own `--help`.
"""


def page() -> str:
    """Markdown with a section for every command."""
    return "\n".join([HEAD, *_commands(cli._parser(), 2)])


def _commands(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _command(command, level)


def _command(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    yield f"{'#' * level} {parser.prog}\n"
    if parser.description:
        yield f"{_plain(parser.description)}\n"
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        ]
        if actions:
            if group.title not in ("positional arguments", "options"):
                about = f": {_plain(group.description)}" if group.description else ""
                yield f"**{group.title}**{about}\n"
            yield "| | |\n|---|---|"
            yield from (_row(parser, action) for action in actions)
            yield ""
    if parser.epilog:
        yield f"{_plain(parser.epilog)}\n"
    yield from _commands(parser, level + 1)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    if action.option_strings:
        name = " ".join([", ".join(action.option_strings), value]).strip()
    else:
        name = str(action.metavar or action.dest)
    words = formatter._expand_help(action) if action.help else ""
    if action.required and action.option_strings:
        words = f"required; {words}" if words else "required"
    cell = f"`{name}`".replace("|", "\\|")
    return f"| {cell} | {_plain(words)} |"


def _plain(text: str) -> str:
    """Words of a terminal as Markdown: on one line, with nothing that Markdown would take as its
    own."""
    words = " ".join(text.split())
    for sign in ("\\", "|", "*", "_", "<", "[", "`"):
        words = words.replace(sign, f"\\{sign}" if sign != "<" else "&lt;")
    return words
