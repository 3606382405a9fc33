"""`lola-vllm eval recall`, `copy` and `perplexity`: options, and what runs when."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lola_vllm.core.cli_options import json_object
from lola_vllm.evaluation import chats, copying
from lola_vllm.evaluation.chats import ChatPlan
from lola_vllm.evaluation.copying import CopyPlan
from lola_vllm.evaluation.facts import CHAT_FORMS
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.plan import Plan, at_least, numbers, words
from lola_vllm.evaluation.prompts import PRECEDING, SPREAD
from lola_vllm.evaluation.recall import DEFAULT_TASKS, LENGTHS, RecallPlan
from lola_vllm.evaluation.settings import parse_settings
from lola_vllm.evaluation.stream import StreamPlan
from lola_vllm.evaluation.tasks import TASKS

TEXTS = "a text file or a directory of them; held-out documents are read"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    subparsers = parser.add_subparsers(title="evaluations", required=True, metavar="EVALUATION")
    for name, add, text in (
        ("recall", _recall, "what a model finds again in long prompts, in RULER's form"),
        ("copy", _copy, "how well a model goes on word by word with passages that it read"),
        ("perplexity", _perplexity, "how well a model predicts real text it was not trained on"),
    ):
        one = subparsers.add_parser(name, help=text, description=text)
        one.add_argument(
            "--model", type=Path, required=True, metavar="DIR", help="a model directory, LoLA or "
            "not"
        )  # fmt: skip
        add(one)
        one.add_argument(
            "--seed", type=int, default=0, metavar="N", help="of all choices (default: 0)"
        )
        _add_settings(one)


def _list(values: Sequence[object]) -> str:
    """Values as a command line has them."""
    return ",".join(map(str, values))


def _recall(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tasks", type=words, default=list(DEFAULT_TASKS), metavar="LIST", help="of "
        f"{', '.join([*TASKS, *CHAT_FORMS])} (default: {_list(DEFAULT_TASKS)})"
    )  # fmt: skip
    add(
        "--lengths", type=numbers, metavar="LIST", help="tokens of prompt and answer together "
        f"(default: {_list(LENGTHS)})"
    )  # fmt: skip
    add(
        "--samples", type=at_least(1), default=RecallPlan.samples, metavar="N", help="per task and "
        "length (default: %(default)s)"
    )  # fmt: skip
    add(
        "--texts", metavar="PATH", help="real text, for tasks that hide something in prose or "
        "code: a directory of text files, or a file"
    )  # fmt: skip
    add(
        "--distances", type=numbers, metavar="LIST", help="tokens of text from the needle to the "
        f"question, in place of random depths; a prompt then has its distance and {PRECEDING:,} to "
        f"{PRECEDING + SPREAD:,} tokens more, or each of --lengths that holds it"
    )  # fmt: skip

    def run(args: argparse.Namespace) -> int:
        asked, seed = args.tasks, args.seed
        if CHAT_FORMS.keys() & asked:
            lengths = args.lengths or chats.LENGTHS
            distances = args.distances or chats.DISTANCES
            chat = ChatPlan(asked, lengths, distances, args.texts, args.samples, seed)
            return _evaluate(args, chat)
        distances = args.distances or []
        lengths = args.lengths or ([] if distances else LENGTHS)
        plan = RecallPlan(asked, lengths, args.samples, seed, args.texts, distances)
        return _evaluate(args, plan)

    parser.set_defaults(run=run)


def _copy(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--texts", required=True, metavar="PATH", help=TEXTS)
    add(
        "--kinds", type=words, default=[], metavar="LIST", help="of prose, documentation and code, "
        "or names of files (default: all that the texts have)"
    )  # fmt: skip
    add(
        "--lengths", type=numbers, default=copying.LENGTHS, metavar="LIST", help="tokens of a text "
        f"(default: {_list(copying.LENGTHS)})"
    )  # fmt: skip
    add(
        "--distances", type=numbers, default=copying.DISTANCES, metavar="LIST", help="tokens from "
        "a passage to the end of what was read, within a tenth; a text is asked for those that it "
        f"holds (default: {_list(copying.DISTANCES)})"
    )  # fmt: skip
    add(
        "--samples", type=at_least(1), default=CopyPlan.samples, metavar="N", help="texts of each "
        "kind and length, at most (default: %(default)s)"
    )  # fmt: skip

    def run(args: argparse.Namespace) -> int:
        asked = args.kinds, args.lengths, args.distances
        return _evaluate(args, CopyPlan(args.texts, *asked, args.samples, args.seed))

    parser.set_defaults(run=run)


def _perplexity(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--texts", required=True, metavar="PATH", help=f"{TEXTS}; each file is a kind")
    add(
        "--windows", type=at_least(1), default=PerplexityPlan.windows, metavar="N", help="per kind "
        "of text, at most (default: %(default)s)"
    )  # fmt: skip
    add(
        "--window-length", type=at_least(8), default=PerplexityPlan.window_length, metavar="N",
        help="in tokens (default: %(default)s)"
    )  # fmt: skip
    group = parser.add_argument_group("one long text instead of windows")
    group.add_argument(
        "--stream", type=at_least(1), metavar="N", help="perplexity by blocks of one stream of "
        "each kind, of so many tokens at most, a LoLA model's state carried from its first token "
        "to its last"
    )  # fmt: skip
    group.add_argument(
        "--every", type=at_least(1), default=1, metavar="N", help="measure one block of so many, "
        "the last of them; a state reads the others as well, and a softmax model leaves them out "
        "(default: %(default)s)"
    )  # fmt: skip

    def run(args: argparse.Namespace) -> int:
        if args.stream:
            return _evaluate(args, StreamPlan(args.texts, args.stream, args.every))
        windows = PerplexityPlan(args.texts, args.windows, args.window_length, args.seed)
        return _evaluate(args, windows)

    parser.set_defaults(run=run)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what all evaluations have: where results go, and the settings to compare."""
    parser.add_argument(
        "--out", type=Path, default=Path("eval-results"), metavar="DIR", help="for JSON and "
        "Markdown (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run at --out"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=8, metavar="N", help="sequences at once (default: "
        "%(default)s)"
    )  # fmt: skip
    group = parser.add_argument_group("settings to compare")
    group.add_argument(
        "--lola-config", action="append", default=[], metavar="[NAME=]JSON", help="keys of "
        "lola_config that replace the checkpoint's; several times: a row each"
    )  # fmt: skip
    group.add_argument(
        "--sweep", type=Path, metavar="FILE", help="JSON list of rows: name, and optionally model, "
        "lola_config, without"
    )  # fmt: skip
    group.add_argument(
        "--reference", type=Path, metavar="DIR", help="a model to compare with, such as the plain "
        "base"
    )  # fmt: skip
    group.add_argument(
        "--without", default="", metavar="NAME", help="ablation: leave out hidden-state, "
        "importance, or both with a comma"
    )  # fmt: skip
    group.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="more arguments of "
        "vllm.LLM, such as '{\"dtype\": \"float32\"}'"
    )  # fmt: skip


def _evaluate(args: argparse.Namespace, plan: Plan) -> int:
    """Run all settings, report after each, print the table."""
    from lola_vllm.evaluation.comparison import evaluate

    settings = parse_settings(
        args.model, args.lola_config, args.sweep, args.reference, args.without
    )
    table = evaluate(
        plan,
        settings,
        args.out,
        batch=args.batch,
        engine_args=args.engine_args,
        resume=args.resume,
    )
    print(table)
    print(f"\nwritten to {args.out}", file=sys.stderr)
    return 0
