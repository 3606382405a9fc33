"""The command: `python -m tools.texts --out DIR [--only NAME ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lola_vllm.training.texts import TextsError
from tools.texts import fetch_texts


def main() -> None:
    """Fetch what the command line names.

    Raises:
        SystemExit: a text that cannot be fetched; the others have been written.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.texts")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="one file a text")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME",
        help="some of them (default: all but python_code and debian_handbook_fr)",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        fetch_texts(args.out, args.only, report=lambda line: print(line, flush=True))
    except TextsError as error:
        sys.exit(f"tools.texts: {error}")


if __name__ == "__main__":
    main()
