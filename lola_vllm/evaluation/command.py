"""`lola-vllm eval recall`, `copy` and `perplexity`: options, and what runs when."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lola_vllm.core.cli_options import add_fields, from_options, json_object
from lola_vllm.evaluation import chats
from lola_vllm.evaluation.chats import ChatPlan
from lola_vllm.evaluation.copying import CopyPlan
from lola_vllm.evaluation.facts import CHAT_FORMS
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.plan import Plan, at_least
from lola_vllm.evaluation.recall import LENGTHS, RecallPlan
from lola_vllm.evaluation.settings import Setting, parse_settings
from lola_vllm.evaluation.stream import StreamPlan


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    subparsers = parser.add_subparsers(title="evaluations", required=True, metavar="EVALUATION")
    for name, add, text in (
        ("recall", _recall, "what a model finds again in long prompts, in RULER's form"),
        ("copy", _copy, "how well a model goes on word by word with passages that it read"),
        ("perplexity", _perplexity, "how well a model predicts real text it was not trained on"),
    ):
        add(subparsers.add_parser(name, help=text, description=text))


def _recall(parser: argparse.ArgumentParser) -> None:
    _options(parser, RecallPlan)
    parser.set_defaults(lengths=None, distances=None)  # with distances, lengths may be left out

    def run(args: argparse.Namespace) -> int:
        if CHAT_FORMS.keys() & args.tasks:
            lengths = args.lengths or chats.LENGTHS
            distances = args.distances or chats.DISTANCES
            return _evaluate(
                args,
                ChatPlan(args.tasks, lengths, distances, args.texts, args.samples, args.seed),
            )
        lengths = args.lengths or ([] if args.distances else LENGTHS)
        distances = args.distances or []
        return _evaluate(args, from_options(RecallPlan, args, lengths=lengths, distances=distances))

    parser.set_defaults(run=run)


def _copy(parser: argparse.ArgumentParser) -> None:
    _options(parser, CopyPlan)
    parser.set_defaults(run=lambda args: _evaluate(args, from_options(CopyPlan, args)))


def _perplexity(parser: argparse.ArgumentParser) -> None:
    _options(parser, PerplexityPlan)
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
        return _evaluate(args, from_options(PerplexityPlan, args))

    parser.set_defaults(run=run)


def _options(parser: argparse.ArgumentParser, plan: type[Plan]) -> None:
    """Add the options of a plan, and those that all plans have."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a model directory, LoLA or not"
    )
    add_fields(parser, plan)
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
    add_fields(group, Setting)
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
