"""The `lola-vllm` command.

A subcommand is one function that adds its options to a parser and sets `run`, and one line in
`COMMANDS`. Anything heavy is imported inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lola_vllm.command.client.command import add_chat, add_sessions
from lola_vllm.command.client.library import add_library
from lola_vllm.command.making import (
    add_calibrate,
    add_convert,
    add_demo_model,
    add_distill,
    add_init,
    add_linearize,
    add_quantize,
)
from lola_vllm.core.cli_options import add_lola_config
from lola_vllm.evaluation.command import add_options as _eval
from lola_vllm.memory.sessions.command import add_states

# Exit statuses as a shell gives them to a process that a signal ended: 128 + the signal's number.
INTERRUPTED, PIPE_CLOSED = 130, 141


def _estimate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        metavar="CONFIG|DIR",
        help="config.json of a LoLA model or a base, or its directory; no weights needed",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="N",
        help="room for states: how many sequences fit, and how many of stock vLLM",
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="numbers of one such rank"
    )
    add_lola_config(parser)

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.engine.estimate import estimate, format_table

        result = estimate(
            args.model, args.lola_config, tensor_parallel_size=args.tensor_parallel_size
        )
        print(format_table(result, args.memory_gib))
        return 0

    parser.set_defaults(run=run)


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="DIR", help="a LoLA model to look at too"
    )

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.command.doctor import doctor

        return doctor(args.model)

    parser.set_defaults(run=run)


def _serve(parser: argparse.ArgumentParser) -> None:
    from lola_vllm.serving.store_options import add_options

    parser.add_argument(
        "model", metavar="MODEL", help="directory of a LoLA model, or a name for vLLM to look up"
    )
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="OPTIONS",
        help="any of 'vllm serve --help=all'; what is given here is not chosen",
    )
    add_options(parser.add_argument_group("of this command", "docs/sessions.md says what is kept"))

    def run(args: argparse.Namespace) -> int:
        cpus = os.sched_getaffinity(0)  # before torch is imported
        from lola_vllm.serving.launch import serve

        given = vars(args)
        model, options = given.pop("model"), given.pop("options")
        return serve(model, options, given, cpus)

    parser.set_defaults(run=run)


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "init": (add_init, "make a LoLA checkpoint from a base, with untrained identity feature maps"),
    "convert": (add_convert, "make a LoLA checkpoint from a base and what LoLCATs trained for it"),
    "distill": (add_distill, "train feature maps and adapters for a base: a LoLA checkpoint"),
    "linearize": (
        add_linearize,
        "make a LoLA model of a base: texts, training, calibration and card",
    ),
    "demo-model": (
        add_demo_model,
        "make a small LoLA checkpoint to try (SmolLM2-135M-Instruct; window 64, sparse cache 128 "
        "and 4 sinks unless told otherwise)",
    ),
    "doctor": (_doctor, "look for what is wrong with an installation; exit status 1 if there is"),
    "estimate": (_estimate, "memory per sequence, from config.json alone"),
    "eval": (_eval, "measure recall in long prompts, or perplexity on held-out text"),
    "calibrate": (add_calibrate, "measure how many sparse pairs each layer should have"),
    "quantize": (add_quantize, "copy a model with the weights of its linear layers in 8 or 4 bits"),
    "serve": (
        _serve,
        "vllm serve with the routes under /v1/lola, and with sequences, block size and memory "
        "chosen for this machine",
    ),
    "sessions": (add_sessions, "what a server remembers: list, show, fork, export, import, rm"),
    "states": (
        add_states,
        "what a state directory holds, without a server: list by owner, move to a key, rm, encrypt",
    ),
    "library": (
        add_library,
        "documents that a server reads once, and questions to all of them: add, list, ask, remove",
    ),
    "chat": (add_chat, "talk to a server that keeps the conversation"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lola-vllm", description="LoLA attention for vLLM")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (add_options, text) in COMMANDS.items():
        add_options(subparsers.add_parser(name, help=text, description=text))
    return parser


def _nobody_reads() -> bool:
    """Whether standard output is a pipe without a reader. If so, buffered output is discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: arguments without the program's name; default `sys.argv[1:]`.

    Returns:
        0 on success; 2 after a user's error, reported in one message on stderr; 130 after Ctrl-C;
        141 if the reader of a pipe, such as `head`, has closed it.

    Raises:
        SystemExit: argparse's, for `--help` and for a malformed command line.
    """
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # names without values, because a value may be a secret key
        names = " ".join(part.partition("=")[0] for part in unknown)
        hint = "; options of 'vllm serve' go after the model" if "options" in args else ""
        parser.error(f"unrecognized arguments: {names}{hint}")
    try:
        status: int = args.run(args)
        sys.stdout.flush()  # a broken pipe shows here, or else when Python ends, with a traceback
    except KeyboardInterrupt:
        goes_on = "; go on with the same command and --resume" if hasattr(args, "resume") else ""
        print(f"\nlola-vllm: interrupted{goes_on}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return PIPE_CLOSED
        # A ValueError of another package is a bug in this one, so it keeps its traceback.
        ours = type(error).__module__.partition(".")[0] == "lola_vllm"
        if not ours and not isinstance(error, OSError):
            raise
        print(f"lola-vllm: error: {error}", file=sys.stderr)
        return 2
    return status
