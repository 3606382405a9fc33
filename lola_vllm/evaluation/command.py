"""`lola-vllm eval recall`, `copy` and `perplexity`: options, and what runs when."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lola_vllm.core.cli_options import add_fields, from_options, json_object
from lola_vllm.evaluation import EvalError, chats, copying
from lola_vllm.evaluation.chats import ChatPlan
from lola_vllm.evaluation.copying import CopyPlan
from lola_vllm.evaluation.facts import CHAT_FORMS
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.plan import Plan, at_least
from lola_vllm.evaluation.recall import RecallPlan, default_lengths
from lola_vllm.evaluation.settings import Setting, check, parse_settings, with_positions
from lola_vllm.evaluation.stream import StreamPlan

# Tokens that a small machine reads in a second, for the estimate before the first measured batch.
GUESSED_TOKENS_PER_S = 1000


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
            lengths = args.lengths or copying.default_lengths()
            distances = args.distances or chats.default_distances()
            return _evaluate(
                args,
                ChatPlan(args.tasks, lengths, distances, args.texts, args.samples, args.seed),
            )
        lengths = args.lengths or ([] if args.distances else default_lengths())
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
        "--stream", action="store_true", help="perplexity by blocks of one stream of each kind, "
        "a LoLA model's state carried from its first token to its last"
    )  # fmt: skip
    add_fields(group, StreamPlan, "stream")

    def run(args: argparse.Namespace) -> int:
        if args.stream:
            return _evaluate(args, from_options(StreamPlan, args, texts=args.texts))
        return _evaluate(args, from_options(PerplexityPlan, args))

    parser.set_defaults(run=run)


def _options(parser: argparse.ArgumentParser, plan: type[Plan]) -> None:
    """Add the options of a plan, and those that all plans have."""
    parser.add_argument(
        "--model", required=True, metavar="DIR|URL", help="a model directory, LoLA or not, or the "
        "address of an OpenAI-compatible server"
    )  # fmt: skip
    add_fields(parser, plan)
    parser.add_argument(
        "--out", type=Path, default=Path("eval-results"), metavar="DIR", help="for JSON and "
        "Markdown (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run at --out"
    )
    parser.add_argument("--force", action="store_true", help="replace results at --out")
    parser.add_argument(
        "--batch", type=at_least(1), default=8, metavar="N", help="sequences at once (default: "
        "%(default)s)"
    )  # fmt: skip
    group = parser.add_argument_group("settings to compare (model directories)")
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
        "--untrained-positions", action="store_true", help="let LoLA models whose positions end go "
        "on past max_position_embeddings, to see what becomes of them there"
    )  # fmt: skip
    group.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="more arguments of "
        "vllm.LLM, such as '{\"dtype\": \"float32\"}'"
    )  # fmt: skip
    group = parser.add_argument_group("a running server")
    group.add_argument("--served-model", metavar="NAME", help="needed if it serves several")
    group.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    group.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="of the model; default: the server's own, "
        "which vLLM offers over HTTP"
    )  # fmt: skip


def _evaluate(args: argparse.Namespace, plan: Plan) -> int:
    """Run all settings, report after each, print the table."""
    plan.check()
    served = args.model.startswith(("http://", "https://"))
    table = _evaluate_server(args, plan) if served else _evaluate_directories(args, plan)
    print(table)
    print(f"\nwritten to {args.out}", file=sys.stderr)
    return 0


def _evaluate_directories(args: argparse.Namespace, plan: Plan) -> str:
    from lola_vllm.evaluation.engine import dtype_of, run_directories
    from lola_vllm.evaluation.results import Record, fingerprint
    from lola_vllm.evaluation.session import EvaluationSession

    settings = parse_settings(
        Path(args.model), args.lola_config, args.sweep, args.reference, args.without
    )
    if args.untrained_positions:
        settings = [with_positions(setting, plan.max_length) for setting in settings]
    for setting in settings:
        check(setting, plan.max_length if setting.is_lola else plan.softmax_length)
    other = next((name for name in args.engine_args if name != "dtype"), None)
    if plan.read_in_pieces and other is not None:
        raise EvalError(
            f"--engine-args: {other} is of vLLM's engine, and this text is read in transformers, "
            "which takes dtype alone; leave it out"
        )
    prints = {model: fingerprint(model) for model in {setting.model for setting in settings}}
    records = [Record(setting, prints[setting.model]) for setting in settings]
    reference = records[0] if args.reference else None
    session = EvaluationSession(args.out, plan, records, reference, args.batch)
    session.begin(resume=args.resume, force=args.force)
    models = ", ".join(dict.fromkeys(setting.model.name for setting in settings))
    dtypes = " and ".join(dict.fromkeys(dtype_of(s, args.engine_args) for s in settings))
    loads = f"{models} on the {_device()} in {dtypes}, each loaded before its bar moves"
    _say(loads, plan, len(settings))
    return run_directories(session, args.batch, args.engine_args)


def _evaluate_server(args: argparse.Namespace, plan: Plan) -> str:
    from lola_vllm.evaluation.results import Record
    from lola_vllm.evaluation.server import ServerModel, run_server
    from lola_vllm.evaluation.session import EvaluationSession

    if plan.read_in_pieces:
        raise EvalError(
            f"--model {args.model}: a server carries no state from one request to the next; give "
            "--model a directory"
        )
    fixed = "lola_config", "sweep", "reference", "untrained_positions", "without", "engine_args"
    for option in fixed:
        if getattr(args, option):
            raise EvalError(
                f"--{option.replace('_', '-')}: a running server cannot be changed; start it "
                "with --hf-overrides, or give --model a directory"
            )
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    model = ServerModel(args.model, args.served_model, key, args.tokenizer, args.batch)
    record = Record(Setting(model.name, Path(model.name)))
    session = EvaluationSession(args.out, plan, [record], None, args.batch)
    session.begin(resume=args.resume, force=args.force)
    _say(f"{model.name} at {args.model}", plan, 1)
    return run_server(session, model)


def _say(models: str, plan: Plan, settings: int) -> None:
    """Tell what is about to run, in one line: an engine takes a minute until its bar moves."""
    minutes = settings * plan.tokens / GUESSED_TOKENS_PER_S / 60
    each = f" for each of {settings} settings" if settings > 1 else ""
    print(
        f"{models}: {plan.asked}{each}, about {minutes:,.0f} minutes at "
        f"{GUESSED_TOKENS_PER_S:,} tokens/s",
        file=sys.stderr,
    )


def _device() -> str:
    import torch

    return "GPU" if torch.cuda.is_available() else "CPU"
