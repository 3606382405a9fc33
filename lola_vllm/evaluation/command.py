"""`lola-vllm eval recall`, `copy` and `perplexity`: options, and what runs when."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.core.cli_options import add_fields, from_options
from lola_vllm.evaluation import EvalError, chats, copying
from lola_vllm.evaluation.chat_facts import CHAT_TASKS
from lola_vllm.evaluation.chats import ChatPlan
from lola_vllm.evaluation.copying import CopyPlan
from lola_vllm.evaluation.distance import check_tasks, grid
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.recall import RecallPlan, default_lengths
from lola_vllm.evaluation.settings import Setting, check, parse_settings, with_positions
from lola_vllm.evaluation.stream import LEAST_BLOCKS, StreamPlan, check_reader
from lola_vllm.evaluation.tasks import find_tasks

if TYPE_CHECKING:
    from lola_vllm.evaluation.session import Plan

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
        words = _words(args.tasks)
        if CHAT_TASKS.keys() & words:
            return _evaluate(args, _chat_plan(args, words))
        tasks = find_tasks(words)
        distances = _numbers_or("--distances", args.distances, [])
        lengths = _numbers_or("--lengths", args.lengths, [] if distances else default_lengths())
        if distances:
            check_tasks(tasks)
            grid(lengths, distances)  # refuses those that no length holds
        plan = from_options(
            RecallPlan,
            args,
            tasks=[task.name for task in tasks],
            lengths=lengths,
            distances=distances,
            samples=_positive("--samples", args.samples),
            texts=None if args.texts is None else str(args.texts),
        )
        for task in tasks:
            if task.needs is not None and args.texts is None:
                raise EvalError(
                    f"--tasks {task.name}: needs real text; give --texts, or other tasks"
                )
        return _evaluate(args, plan)

    parser.set_defaults(run=run)


def _chat_plan(args: argparse.Namespace, words: list[str]) -> ChatPlan:
    """What `eval recall` asks of conversations."""
    others = [word for word in words if word not in CHAT_TASKS]
    if others:
        raise EvalError(
            f"--tasks {', '.join(others)}: the tasks of conversations are "
            f"{', '.join(CHAT_TASKS)}, which share their text; give others a call of their own"
        )
    if args.texts is None:
        raise EvalError(f"--tasks {words[0]}: needs real text; give --texts")
    _refuse_server(args)
    plan = ChatPlan(
        list(dict.fromkeys(words)),
        _numbers_or("--lengths", args.lengths, copying.default_lengths()),
        _numbers_or("--distances", args.distances, chats.default_distances()),
        str(args.texts),
        _positive("--samples", args.samples),
        args.seed,
    )
    plan.check()
    return plan


def _copy(parser: argparse.ArgumentParser) -> None:
    _options(parser, CopyPlan)

    def run(args: argparse.Namespace) -> int:
        _refuse_server(args)
        plan = from_options(
            CopyPlan,
            args,
            texts=str(args.texts),
            kinds=_words(args.kinds),
            lengths=_numbers("--lengths", args.lengths),
            distances=_numbers("--distances", args.distances),
            samples=_positive("--samples", args.samples),
            stops=_positive("--stops", args.stops),
            passages=_positive("--passages", args.passages),
        )
        plan.check()
        return _evaluate(args, plan)

    parser.set_defaults(run=run)


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
            block = _positive("--block", args.block, least=8)
            every = _positive("--every", args.every)
            least = LEAST_BLOCKS * block * every
            stream = from_options(
                StreamPlan,
                args,
                texts=str(args.texts),
                stream_length=_positive("--stream-length", args.stream_length, least=least),
                context=_positive("--context", args.context),
            )
            return _evaluate(args, stream)
        plan = from_options(
            PerplexityPlan,
            args,
            texts=str(args.texts),
            windows=_positive("--windows", args.windows),
            window_length=_positive("--window-length", args.window_length, least=8),
        )
        return _evaluate(args, plan)

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
        "--batch", type=int, default=8, metavar="N", help="sequences at once (default: %(default)s)"
    )
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
        "--engine-args", default="{}", metavar="JSON", help="more arguments of vllm.LLM, such as "
        "'{\"dtype\": \"float32\"}'"
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
    _positive("--batch", args.batch)
    served = _is_address(args.model)
    table = _evaluate_server(args, plan) if served else _evaluate_directories(args, plan)
    print(table)
    print(f"\nwritten to {args.out}", file=sys.stderr)
    return 0


def _is_address(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _refuse_server(args: argparse.Namespace) -> None:
    """Raise `EvalError` where a server cannot be asked."""
    if _is_address(args.model):
        raise EvalError(
            f"--model {args.model}: a server reads a text anew for every question; give "
            "--model a directory"
        )


def _evaluate_directories(args: argparse.Namespace, plan: Plan) -> str:
    from lola_vllm.evaluation.engine import dtype_of, run_directories
    from lola_vllm.evaluation.results import Record, fingerprint
    from lola_vllm.evaluation.session import EvaluationSession

    engine_args = _json_object("--engine-args", args.engine_args)
    settings = parse_settings(
        Path(args.model), args.lola_config, args.sweep, args.reference, args.without
    )
    if args.untrained_positions:
        settings = [with_positions(setting, plan.max_length) for setting in settings]
    for setting in settings:
        check(setting, _longest(plan, setting))
        if isinstance(plan, StreamPlan | CopyPlan | ChatPlan):
            check_reader(engine_args)
    prints = {model: fingerprint(model) for model in {setting.model for setting in settings}}
    records = [Record(setting, prints[setting.model]) for setting in settings]
    reference = records[0] if args.reference else None
    session = EvaluationSession(args.out, plan, records, reference, args.batch)
    session.begin(resume=args.resume, force=args.force)
    models = ", ".join(dict.fromkeys(setting.model.name for setting in settings))
    dtypes = " and ".join(dict.fromkeys(dtype_of(s, engine_args) for s in settings))
    loads = f"{models} on the {_device()} in {dtypes}, each loaded before its bar moves"
    _say(loads, plan, len(settings))
    return run_directories(session, args.batch, engine_args)


def _evaluate_server(args: argparse.Namespace, plan: Plan) -> str:
    from lola_vllm.evaluation.results import Record
    from lola_vllm.evaluation.server import ServerModel, run_server
    from lola_vllm.evaluation.session import EvaluationSession

    for option in ("lola_config", "sweep", "reference", "untrained_positions", "without"):
        if getattr(args, option):
            raise EvalError(
                f"--{option.replace('_', '-')}: a running server cannot be changed; start it "
                "with --hf-overrides, or give --model a directory"
            )
    if args.engine_args != "{}":
        raise EvalError("--engine-args: for model directories, not for a server")
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    model = ServerModel(args.model, args.served_model, key, args.tokenizer, args.batch)
    record = Record(Setting(model.name, Path(model.name)))
    session = EvaluationSession(args.out, plan, [record], None, args.batch)
    session.begin(resume=args.resume, force=args.force)
    _say(f"{model.name} at {args.model}", plan, 1)
    return run_server(session, model)


def _longest(plan: Plan, setting: Setting) -> int:
    """Longest sequence in tokens that a plan gives to a setting's model."""
    if isinstance(plan, StreamPlan | CopyPlan) and not setting.is_lola:
        return plan.softmax_length
    return plan.max_length


def _say(models: str, plan: Plan, settings: int) -> None:
    """Tell what is about to run, in one line: an engine takes a minute until its bar moves."""
    minutes = settings * plan.tokens / GUESSED_TOKENS_PER_S / 60
    each = f" for each of {settings} settings" if settings > 1 else ""
    print(
        f"{models}: {_asked(plan)}{each}, about {minutes:,.0f} minutes at "
        f"{GUESSED_TOKENS_PER_S:,} tokens/s",
        file=sys.stderr,
    )


def _asked(plan: Plan) -> str:
    """What a setting is asked, in words."""
    if isinstance(plan, RecallPlan):
        questions = len(plan.cells) * len(plan.tasks) * plan.samples
        what, lengths = f"{questions:,} questions", [length for length, _ in plan.cells]
    elif isinstance(plan, PerplexityPlan):
        what, lengths = f"up to {plan.windows} windows of each text", [plan.window_length]
    elif isinstance(plan, StreamPlan):
        what, lengths = "a stream of each text", [plan.stream_length]
    elif isinstance(plan, ChatPlan):
        what, lengths = f"{plan.samples} conversations of each length", plan.lengths
    else:
        what, lengths = f"up to {plan.samples} texts of each kind and length", plan.lengths
    return f"{what} ({', '.join(f'{n:,}' for n in lengths)} tokens)"


def _device() -> str:
    import torch

    return "GPU" if torch.cuda.is_available() else "CPU"


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in _words(text)]
    except ValueError:
        raise EvalError(f"{option} {text}: must be whole numbers with commas between") from None
    if not numbers or min(numbers) < 1:
        raise EvalError(f"{option} {text}: must be one or more positive numbers")
    return sorted(set(numbers))


def _numbers_or(option: str, text: str | None, default: list[int]) -> list[int]:
    return default if text is None else _numbers(option, text)


def _positive(option: str, value: int, least: int = 1) -> int:
    if value < least:
        raise EvalError(f"{option} {value}: must be at least {least}")
    return value


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise EvalError(f"{option} {text!r}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise EvalError(f"{option} {text!r}: must be a JSON object")
    return value
