"""The options of `lola-vllm distill`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lola_vllm.cli_options import add_lola_options, add_state_heads, lola_config_of, summarize


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# Option, type, default, metavar, help; the names are those of DistillOptions.
_STAGE_1 = (
    ("rows", int, 256, "N", "rows of tokens; one pass is made over them in every layer"),
    ("row-length", int, 2048, "N", "tokens of a row"),
    ("learning-rate", float, 1e-2, "X", "AdamW's, falling to zero within each layer"),
    ("steps-per-row", int, 2, "N", "optimizer steps on each row"),
    ("queries-per-step", int, 512, "N", "query tokens that a step compares"),
)
_STAGE_2 = (
    ("lora-rows", int, 512, "N", "rows of tokens; 0 leaves the stage out"),
    ("lora-row-length", int, 1024, "N", "tokens of a row"),
    ("lora-rank", int, 8, "N", "rank of the adapters on q, k, v and o"),
    ("lora-learning-rate", float, 1e-3, "X", "AdamW's for the adapters"),
    ("map-learning-rate", float, 1e-3, "X", "for the maps, which are trained on; 0 freezes them"),
    ("answer-weight", float, 1.0, "X", "weight of the tokens of synthetic answers"),
    ("rows-per-step", int, 4, "N", "rows whose gradients make a step"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser and set its `run`."""
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR",
        help="a local Llama, Mistral, Qwen2 or Qwen3 decoder, not quantized",
    )  # fmt: skip
    parser.add_argument(
        "--data", action="append", required=True, metavar="SOURCE",
        help="text file, directory of them, JSONL of texts or chats, or the name of a dataset; "
        "may be given more than once",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="LoLA checkpoint")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR",
        help="training states, maps, adapters and loss curves (default: OUT.training)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --work-dir")
    parser.add_argument("--force", action="store_true", help="replace a model at --out")
    parser.add_argument(
        "--retrieval-fraction", type=float, default=0.2, metavar="X",
        help="share of rows that are synthetic retrieval prompts (default: 0.2)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"),
        help="of the base's weights while training (default: bfloat16)",
    )  # fmt: skip
    first = parser.add_argument_group("stage 1, attention transfer")
    second = parser.add_argument_group("stage 2, LoRA")
    for group, options in ((first, _STAGE_1), (second, _STAGE_2)):
        for name, kind, default, metavar, text in options:
            group.add_argument(
                f"--{name}", type=kind, default=default, metavar=metavar,
                help=f"{text} (default: {default:g})",
            )  # fmt: skip
    second.add_argument(
        "--lora-loss", choices=("teacher", "next-token"), default="teacher",
        help="divergence from the base model's distribution (default), or LoLCATs' own loss",
    )  # fmt: skip
    second.add_argument(
        "--gradient-checkpointing", action="store_true",
        help="compute activations twice, for less memory",
    )  # fmt: skip
    group = add_lola_options(parser, without=("feature_dim",))
    add_state_heads(group, "kv", "kv")
    for name, what in (("windows", "window size"), ("sparse-caches", "sparse cache size")):
        group.add_argument(
            f"--train-{name}", type=_numbers, default=(), metavar="N,N",
            help=f"train for each of these, so that the {what} can be chosen later",
        )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lola_vllm.distill.run import DistillOptions, distill

    names = [name.replace("-", "_") for name, *_ in (*_STAGE_1, *_STAGE_2)]
    names += ["retrieval_fraction", "seed", "dtype", "lora_loss", "gradient_checkpointing"]
    names += ["state_heads", "train_windows", "train_sparse_caches"]
    options = DistillOptions(
        lola_config=lola_config_of(args), **{name: getattr(args, name) for name in names}
    )
    config = distill(
        args.base,
        args.data,
        args.out,
        options,
        work=args.work_dir,
        resume=args.resume,
        force=args.force,
    )
    summarize(args.out, config, "distilled", "; LoRA merged" if args.lora_rows else "")
    return 0
