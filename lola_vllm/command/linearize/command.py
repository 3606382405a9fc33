"""The options of `lola-vllm linearize`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lola_vllm.core.cli_options import add_recipe, sparse_cache
from lola_vllm.models.families import BASE_NAMES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser and set its `run`."""
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR",
        help=f"a local {BASE_NAMES}, not quantized",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="LoLA checkpoint")
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="PATH",
        help="a text file or a directory of them: what the model should be good at",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X",
        help="of the tokens that are trained on; 1, the default, has those of the demo model",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, metavar="MIB",
        help="of a sequence of the model, whatever its length (default: 427 pairs in a KV head, or "
        "one for 16 tokens of the trained length)",
    )  # fmt: skip
    add_recipe(parser, "by stage as --dry-run prints them")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR",
        help="training states and calibrations (default: OUT.training)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --work-dir")
    parser.add_argument("--force", action="store_true", help="replace a model at --out")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the plan: tokens and all hyperparameters",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lola_vllm.command.linearize.run import linearize
    from lola_vllm.training.recipe import read_recipe

    config = linearize(
        args.base,
        args.texts,
        args.out,
        scale=args.scale,
        memory_mib=args.memory,
        overrides=read_recipe(args.recipe),
        work=args.work_dir,
        resume=args.resume,
        force=args.force,
        dry_run=args.dry_run,
    )
    if config is not None:
        print(f"{args.out}: a LoLA model with a sparse cache of {sparse_cache(config.lola)}")
        out, base = (shlex.quote(str(path)) for path in (args.out, args.base))
        print(f"next: lola-vllm serve {out}")
        print(f"or:   lola-vllm eval recall --model {out} --reference {base}")
    return 0
