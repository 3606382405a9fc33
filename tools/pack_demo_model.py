#!/usr/bin/env python3
"""From runs of `lola-vllm distill` or `linearize` to the package data of a demo model.

    python tools/pack_demo_model.py WORK [WORK ...]
    python tools/pack_demo_model.py --linearized MODEL --out lola_vllm/models/qwen2_5_coder

MODEL is what `lola-vllm linearize` wrote, with its working directory beside it. Its last maps and
adapters, its last calibration and the end of its card are packed.

WORK is the work directory of a run, or a directory that this program wrote. Of several runs of
stage 2, which began alike or one where another ended, it packs the mean: of the maps and window
factors, and of what the adapters add to the weights. That mean has as many ranks as all adapters
together; it is cut back to the rank of one by its singular values, and what this loses is printed.
Maps and adapters are stored as bfloat16, window factors as float32.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lola_vllm.command.linearize.run import ON, SECOND, TITLE
from lola_vllm.training.distill.state import default_work

ROOT = Path(__file__).parents[1]


def mean_adapters(runs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, float]:
    """The adapter of one run's rank that is nearest to the mean of several.

    Args:
        runs: A `[r, in]` and B `[out, r]` of each.

    Returns:
        A, B, and the share of the mean's squares that they miss.
    """
    if len(runs) == 1:
        return *runs[0], 0.0
    rank = runs[0][0].shape[0]
    products = [B.double() @ A.double() for A, B in runs]
    mean = torch.stack(products).mean(0)
    U, S, V = torch.linalg.svd(mean, full_matrices=False)
    root = S[:rank].sqrt()
    lost = float((S[rank:] ** 2).sum() / (S**2).sum())
    return (root[:, None] * V[:rank]).float(), (U[:, :rank] * root).float(), lost


def pack(works: list[Path], out: Path) -> None:
    """Write `maps.safetensors` and `lora.safetensors` to a directory."""
    # Maps of stage 2, if they are there, replace those of stage 1.
    runs = [load_file(w / "maps.safetensors") | load_file(w / "lora.safetensors") for w in works]
    for work, run in zip(works, runs, strict=True):
        if run.keys() != runs[0].keys():
            raise SystemExit(f"{work}: holds other tensors than {works[0]}")
    maps: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    lost = []
    for name in runs[0]:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            A, B, missing = mean_adapters([(run[name], run[other]) for run in runs])
            lora[name], lora[other] = (x.bfloat16().contiguous() for x in (A, B))
            lost.append(missing)
        elif ".lora_B." not in name:
            mean = torch.stack([run[name].float() for run in runs]).mean(0)
            maps[name] = mean if name.endswith("window_factors") else mean.bfloat16()
    out.mkdir(parents=True, exist_ok=True)
    save_file(maps, out / "maps.safetensors")
    save_file(lora, out / "lora.safetensors")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(
        f"{len(maps)} maps and factors, {len(lora)} adapters, {size / 1e6:.1f} MB; "
        f"of the mean's squares {sum(lost) / len(lost):.1%} are lost, at most {max(lost):.1%}"
    )


def pack_linearized(model: Path, out: Path) -> None:
    """Write all that `checkpoint.shipped` reads to a directory.

    Args:
        model: of `lola-vllm linearize`, with its working directory beside it.
    """
    work = default_work(model)
    card = model / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    calibration = work / SECOND
    if TITLE not in text or not calibration.is_file():
        raise SystemExit(f"{model}: not finished by lola-vllm linearize with {work}")
    pack([work / ON], out)
    shutil.copyfile(calibration, out / "calibration.safetensors")
    (out / "CARD.md").write_text(text[text.index(TITLE) :], encoding="utf-8")


def main() -> None:
    """Parse and pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", type=Path, nargs="*", metavar="WORK", help="work directories")
    parser.add_argument("--linearized", type=Path, metavar="MODEL", help="instead of WORK")
    parser.add_argument("--out", type=Path, default=ROOT / "lola_vllm/models/smollm2")
    args = parser.parse_args()
    if bool(args.works) == bool(args.linearized):
        parser.error("give WORK or --linearized MODEL")
    if args.linearized:
        pack_linearized(args.linearized, args.out)
    else:
        pack(args.works, args.out)


if __name__ == "__main__":
    main()
