"""The options of `lola-vllm distill`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lola_vllm.core.cli_options import add_lola_config, add_recipe, summarize


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
        "--start", type=Path, metavar="DIR",
        help="go on with stage 2 from the maps and adapters of an earlier run: its --work-dir",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="train for the sizes and the importance that 'lola-vllm calibrate --save' wrote",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR",
        help="training states, maps, adapters and losses (default: OUT.training)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --work-dir")
    parser.add_argument("--force", action="store_true", help="replace a model at --out")
    add_lola_config(parser)
    add_recipe(parser, "as docs/distillation.md names them")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lola_vllm.training.distill.options import DistillOptions
    from lola_vllm.training.distill.run import distill
    from lola_vllm.training.recipe import read_recipe, settled

    options = settled(DistillOptions(lola_config=args.lola_config), read_recipe(args.recipe))
    config = distill(
        args.base,
        args.data,
        args.out,
        options,
        start=args.start,
        calibration=args.calibration,
        work=args.work_dir,
        resume=args.resume,
        force=args.force,
    )
    summarize(args.out, config, "distilled", "; LoRA merged" if options.lora_rows else "")
    return 0
