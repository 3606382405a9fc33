"""`lola-vllm states VERB`: a state directory, without a server."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lola_vllm.memory.sessions.cipher import StateKey
    from lola_vllm.memory.sessions.inventory import Entry, Inventory

_WHO = "none, file:PATH, env:NAME"
_KEYS = f"API keys: {_WHO}; a file or a variable may have several, one a line"
_NAMES = 8  # of an owner, in the table
_SHOWN = 16  # digits of an owner


def add_states(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `lola-vllm states`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--lola-state-dir", type=Path, required=True, metavar="DIR", help="as of the servers"
    )
    common.add_argument(
        "--lola-state-key-file", type=Path, metavar="FILE",
        help="the secret of encrypted files (default: LOLA_VLLM_STATE_KEY)",
    )  # fmt: skip
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(
        name: str, text: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, parents=[common])
        verb.set_defaults(run=run)
        return verb

    listing = add("list", "who has how many states, of which names, and when they were used", _list)
    listing.add_argument("--json", action="store_true", help="JSON instead of a table")
    add("encrypt", "encrypt the files that were written without a key, each at once", _encrypt)
    remove = add("rm", "delete what no given key reaches, or all", _remove)
    what = remove.add_mutually_exclusive_group(required=True)
    what.add_argument("--keep", nargs="+", metavar="WHO", help=f"whose states stay. {_KEYS}")
    what.add_argument("--all", action="store_true", help="no states stay")
    remove.add_argument(
        "--unread", action="store_true",
        help="delete what cannot be read too, whoever's it is: of another key, or damaged",
    )  # fmt: skip
    remove.add_argument("--yes", action="store_true", help="do not ask before")


def read_owners(text: str, option: str) -> set[str]:
    """Whose states are meant, as `key_owner` has them.

    Args:
        text: `none`; `file:PATH` or `env:NAME`, which have API keys. option: what errors call it.

    Raises:
        InventoryError: it is none of these, or there is no key. The text is not repeated, because
            it may be a key.
    """
    from lola_vllm.memory.sessions.inventory import InventoryError
    from lola_vllm.memory.sessions.owner import owner_of

    if text == "none":
        return {text}
    kind, _, place = text.partition(":")
    if kind == "file" and place:
        try:
            found = Path(place).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InventoryError(f"{option} = {text}: the key cannot be read ({error})") from None
    elif kind == "env" and place:
        if place not in os.environ:
            raise InventoryError(f"{option} = {text}: there is no such environment variable")
        found = os.environ[place]
    else:
        raise InventoryError(
            f"{option}: must be {_WHO}. A key itself is not taken, because other users see "
            "it in the list of processes"
        )
    keys = [line.strip() for line in found.splitlines() if line.strip()]
    if not keys:
        raise InventoryError(f"{option} = {text}: there is no key in it")
    return set(map(owner_of, keys))


def _key(args: argparse.Namespace) -> StateKey | None:
    from lola_vllm.memory.sessions.cipher import KEY_VARIABLE
    from lola_vllm.memory.sessions.settings import StoreSettings

    variable = KEY_VARIABLE if KEY_VARIABLE in os.environ else None
    return StoreSettings(key_file=args.lola_state_key_file, key_variable=variable).key()


def _open(args: argparse.Namespace) -> Inventory:
    """The states of the directory; what cannot be read is told."""
    from lola_vllm.memory.sessions.inventory import Inventory, unread_words

    key = _key(args)
    inventory = Inventory(_root(args), key)
    counts = {reason: len(files) for reason, files in inventory.unread.items()}
    for line in unread_words(counts, key is not None, inventory.root):
        print(f"lola-vllm: {line}", file=sys.stderr)
    return inventory


def _root(args: argparse.Namespace) -> Path:
    root: Path = args.lola_state_dir.expanduser().absolute()
    return root


def _list(args: argparse.Namespace) -> int:
    inventory = _open(args)
    rows = [_describe(owner, states) for owner, states in inventory.owners().items()]
    if args.json:
        print(json.dumps({"owners": rows}, indent=2))
        return 0
    if not rows:
        print("no states that can be read" if inventory.unread else "no states")
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used"]))
        print(
            f"{row['owner']}: {len(row['sessions'])} sessions, {row['states']} states, "
            f"{row['bytes'] / 2**20:.1f} MiB, {row['salts']} salts, last used {used}"
        )
        names = row["sessions"][:_NAMES]
        more = len(row["sessions"]) - len(names)
        print(f"    {', '.join(names)}" + (f" and {more} more" if more else ""))
    return 0


def _describe(owner: str, states: Sequence[Entry]) -> dict[str, Any]:
    used: dict[str, float] = {}
    for state in states:
        name = state.header.session
        used[name] = max(used.get(name, 0.0), state.used)
    return {
        # All of an owner would be enough to forge a salt.
        "owner": owner[:_SHOWN],
        "sessions": sorted(used, key=lambda name: -used[name]),
        "states": len(states),
        "bytes": sum(state.nbytes for state in states),
        "salts": len({state.header.salt for state in states}),
        "used": max(used.values()),
    }


def _encrypt(args: argparse.Namespace) -> int:
    from lola_vllm.memory.sessions.inventory import InventoryError, encrypt

    key = _key(args)
    if key is None:
        raise InventoryError(
            "no key to encrypt with: give --lola-state-key-file, a file that `openssl rand -hex "
            "32` wrote, for example"
        )
    files, before, failed = encrypt(_root(args), key)
    for text in failed:
        print(f"lola-vllm: not encrypted: {text}", file=sys.stderr)
    print(f"{files} files encrypted; {before} were encrypted before")
    return 2 if failed else 0


def _remove(args: argparse.Namespace) -> int:
    inventory = _open(args)
    kept = set[str]().union(*(read_owners(text, "--keep") for text in args.keep or ()))
    leaving = [state for state in inventory.states if state.owner not in kept]
    unread = sorted(itertools.chain(*inventory.unread.values()))
    for path in unread:
        fate = "it goes too" if args.unread else "it stays; --unread deletes it too"
        print(f"{path.relative_to(inventory.root)}: cannot be read; {fate}")
    also = unread if args.unread else []
    status = 2 if args.all and len(also) < len(unread) else 0
    if not leaving and not also:
        why = "no state can be read" if args.all else "the given keys reach all states"
        print(f"nothing to delete: {why}")
        return status
    mib = sum(state.nbytes for state in leaving) / 2**20
    names = sorted({state.header.session for state in leaving})
    what = f"{len(leaving)} states of {len(names)} names, {mib:.1f} MiB"
    what += f", and {len(also)} that cannot be read" if also else ""
    print(f"{what}: {', '.join(names[:_NAMES])}" + (", ..." if len(names) > _NAMES else ""))
    if not args.yes:
        if not sys.stdin.isatty():
            print("lola-vllm: nothing was deleted; --yes deletes without asking", file=sys.stderr)
            return 2
        if (
            input(f"delete them, and keep {len(inventory.states) - len(leaving)} states? [y/N] ")
            .strip()
            .lower()
            != "y"
        ):
            print("nothing was deleted")
            return 0
    inventory.delete(leaving, also)
    print(f"{len(leaving) + len(also)} states deleted")
    return status
