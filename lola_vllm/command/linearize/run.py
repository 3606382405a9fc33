"""`lola-vllm linearize`: from a base to a LoLA model, stage by stage, resumable at any point."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.command.linearize import plan, recipe
from lola_vllm.command.linearize.plan import STAGES, Speed
from lola_vllm.command.linearize.recipe import Recipe
from lola_vllm.core import cpu
from lola_vllm.models.base import fingerprint_base, parse_config, read_base_config
from lola_vllm.models.files import CheckpointError, read_json
from lola_vllm.models.staging import check_output, staged_directory
from lola_vllm.training.distill.state import default_work, open_work
from lola_vllm.training.texts import MANIFEST

if TYPE_CHECKING:
    from lola_vllm.core.config import DecoderConfig
    from lola_vllm.training.calibrate.options import CalibrateOptions
    from lola_vllm.training.distill.options import DistillOptions

TRAINING, ON = "training", "training-on"
FIRST, SECOND = "calibration-1.safetensors", "calibration-2.safetensors"
# Checkpoints of stages, which go when the model is written.
MAPPED, TRAINED, TRAINED_ON, CALIBRATED = "mapped", "trained", "trained-on", "calibrated"
REPORT = "calibration.txt"
NAME = "linearize.json"  # what is done already
TITLE = "## How it was made"  # in the card


def linearize(
    base: Path,
    texts: Path,
    out: Path,
    *,
    hours: float | None = None,
    memory_mib: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    work: Path | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> DecoderConfig | None:
    """Make a LoLA model of a base.

    Args:
        base: a local Hugging Face directory (Llama, Mistral, Qwen2 or Qwen3).
        texts: a text file or a directory of them.
        out: where the model goes; it is written completely or not at all.
        hours: for all stages, by which the tokens that are trained on are scaled; None: those of
            the demo model.
        memory_mib: of a sequence of the model, in MiB; see `Recipe`.
        overrides: options that replace what follows from the base, by part of `Recipe` and name.
        work: keeps what is done; default: `out` with ".training" added.
        resume: go on with the run in `work`; without it a `work` that holds something is refused.
        force: replace a model that is already at `out`.
        dry_run: say what would be done, and do nothing. The speed of the machine is measured.
        say: is given lines for people.

    Returns:
        The config of the model; None after a dry run.

    Raises:
        CheckpointError: a base, texts, options or a directory that cannot be used.
        DataError, TextsError: texts that cannot be read.
    """
    if hours is not None and not hours > 0:
        raise CheckpointError(f"--hours {hours:g}: must be above 0")
    parse_config(base, read_base_config(base))  # refuses what is no base
    work = work or default_work(out)
    check_output(out, force=force, inputs=[base, texts])
    size = _size_of(texts)
    inputs = {
        "base": hashlib.sha256(fingerprint_base(base)).hexdigest()[:16],
        "texts": texts.name,
        "hours": hours,
        "memory": memory_mib,
        "recipe": dict(overrides or {}),
    }
    if dry_run:
        state = WorkState(work, inputs)
    else:
        state = open_state(work, inputs, resume=resume)
        state.save()
    if not state.recipe:
        made, speed = _plan(base, size, hours, memory_mib, overrides or {}, say)
        state.recipe, state.speed = asdict(made), asdict(speed)
        if not dry_run:
            state.save()
    made, speed = recipe.from_json(state.recipe), Speed(**state.speed)
    say(plan.format_plan(base, made, speed))
    if dry_run:
        return None
    run = _Run(base, texts, out, made, work, state, force)
    for name, action in run.actions().items():
        _stage(state, name, say, action)
    _clean(work)
    return parse_config(out, read_json(out / "config.json"))


def _plan(
    base: Path,
    text_bytes: int,
    hours: float | None,
    memory_mib: float | None,
    overrides: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[Recipe, Speed]:
    """A recipe that takes so many hours on this machine, and the machine's speed."""
    from lola_vllm.command.linearize.timing import measure_speed, measure_transfer

    def derived(scale: float) -> Recipe:
        made = recipe.derive(
            base,
            text_bytes=text_bytes,
            memory_mib=memory_mib,
            scale=scale,
            dtype=_fast_dtype(base),
            free_bytes=_free_memory(),
            overrides=overrides,
        )
        recipe.check(made)
        return made

    made = derived(1.0)
    say("timing a row of each kind")
    speed = measure_speed(base, made)
    if hours is None:
        return made, speed

    def scaled() -> Recipe:
        def seconds_of(scale: float) -> float:
            return sum(plan.stage_seconds(derived(scale), speed).values())

        return derived(plan.scale_to(hours, seconds_of))

    timed, made = made, scaled()
    if made.train.row_length != timed.train.row_length:
        say(f"timing rows of {made.train.row_length:,} tokens, whose tokens take less time")
        speed = replace(speed, transfer=measure_transfer(base, made))
        made = scaled()
    return made, speed


def _stage(
    state: WorkState, name: str, say: Callable[[str], None], action: Callable[[], None]
) -> None:
    """Run a stage unless it is done, and note its time also where it fails."""
    if name in state.done:
        return
    started = time.monotonic()
    try:
        action()
        state.done.append(name)
    finally:
        spent = state.seconds.get(name, 0.0) + time.monotonic() - started
        state.seconds[name] = round(spent, 1)
        state.save()
    say(f"{STAGES[name]}: done after {spent / 3600:.2f} hours")


@dataclass
class WorkState:
    """A run that can be gone on with.

    Attributes:
        work: its directory.
        inputs: what the user gave: base, texts and options. Another run has others.
        recipe: as JSON, once derived. speed: of this machine, once measured.
        done: stages that are finished.
        seconds: spent in each stage, in interrupted runs too.
    """

    work: Path
    inputs: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file, completely or not at all.

        Raises:
            OSError: it cannot be written.
        """
        values = {key: value for key, value in vars(self).items() if key != "work"}
        part = self.work / f"{NAME}.part"
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")
        part.replace(self.work / NAME)


def open_state(work: Path, inputs: Mapping[str, Any], *, resume: bool) -> WorkState:
    """The state of a working directory, or a new one.

    Raises:
        CheckpointError: a directory in use without `resume`, a run with other inputs, or a file
            that is damaged.
    """
    path = work / NAME
    open_work(work, resume=resume)
    if not path.is_file():
        return WorkState(work, dict(inputs))
    try:
        state = WorkState(work=work, **json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete {work} to start again") from None
    for key, value in inputs.items():
        if state.inputs.get(key) != value:
            raise CheckpointError(
                f"{path}: of a run with {key} = {state.inputs.get(key)!r}, not {value!r}; give "
                "the same options, or another --work-dir"
            )
    return state


class _Run:
    """The stages of one run, each of which goes on where it was interrupted."""

    def __init__(
        self,
        base: Path,
        texts: Path,
        out: Path,
        made: Recipe,
        work: Path,
        state: WorkState,
        force: bool,
    ) -> None:
        self.base, self.texts, self.out, self.recipe = base, texts, out, made
        self.work, self.state, self.force = work, state, force

    def actions(self) -> dict[str, Callable[[], None]]:
        """By the names of `plan.STAGES`, in their order."""
        return {
            "transfer": self._transfer,
            "lora": self._lora,
            "calibrate": self._first_calibration,
            "train-on": self._train_on,
            "recalibrate": self._recalibrate,
            "card": self._card,
        }

    def _transfer(self) -> None:
        self._distill(MAPPED, TRAINING, replace(self.recipe.train, lora_rows=0))

    def _lora(self) -> None:
        self._distill(TRAINED, TRAINING, self.recipe.train)
        shutil.rmtree(self.work / MAPPED, ignore_errors=True)

    def _train_on(self) -> None:
        self._distill(
            TRAINED_ON,
            ON,
            self.recipe.train_on,
            start=self.work / TRAINING,
            calibration=self.work / FIRST,
        )

    def _distill(self, out: str, work: str, options: DistillOptions, **more: Path) -> None:
        from lola_vllm.training.distill.run import distill

        distill(
            self.base, [str(self.texts)], self.work / out, options, work=self.work / work,
            resume=True, force=True, **more,
        )  # fmt: skip

    def _first_calibration(self) -> None:
        # Training on is with all hidden states: maps are trained in all heads, whichever is tried.
        all_states = replace(self.recipe.calibrate, state_worth=0.0)
        self._calibrate(self.work / TRAINED, FIRST, all_states)

    def _calibrate(self, model: Path, name: str, options: CalibrateOptions) -> None:
        from lola_vllm.models.calibration import importance_tensors, save_calibration
        from lola_vllm.training.calibrate.run import calibrate, report

        found = calibrate(self.base, self.texts, options, model)
        save_calibration(self.work / name, found.keys, importance_tensors(found.importance))
        (self.work / REPORT).write_text(report(found), encoding="utf-8")

    def _recalibrate(self) -> None:
        from lola_vllm.models.calibration import load_calibration, write_calibrated

        self._calibrate(self.work / TRAINED_ON, SECOND, self.recipe.calibrate)
        sizes, importance = load_calibration(self.work / SECOND)
        write_calibrated(
            self.work / TRAINED_ON, self.work / CALIBRATED, sizes, importance, force=True
        )

    def _card(self) -> None:
        summary = (self.work / REPORT).read_text(encoding="utf-8").splitlines()
        held = next((line for line in summary if line.startswith("all heads hold")), "")
        source = self.work / CALIBRATED
        with staged_directory(self.out, force=self.force, inputs=[self.base]) as staging:
            shutil.copytree(source, staging, dirs_exist_ok=True)
            card = staging / "README.md"
            text = card.read_text(encoding="utf-8")
            card.write_text(f"{text}\n{self._notes(held)}", encoding="utf-8")

    def _notes(self, held: str) -> str:
        """How the model was made, for the end of its card."""
        tokens, seconds = plan.stage_tokens(self.recipe), self.state.seconds
        rows = "\n".join(
            f"| {title} | {tokens[name]:,} | {seconds.get(name, 0.0) / 3600:.2f} |"
            for name, title in STAGES.items()
            if name in tokens
        )
        return f"""{TITLE}

`lola-vllm linearize` trained feature maps, window factors and LoRA adapters (rank
{self.recipe.train.lora_rank}, on q, k, v and o). The teacher is the base itself, so nothing of
another model is in them.

| stage | tokens | hours |
|---|---|---|
{rows}

In prompts that it did not see, {held}.

**Text.** {_sources(self.texts)} About one document in twenty, chosen by hash, was never trained on.

## Recipe

    {json.dumps(asdict(self.recipe))}
"""


def _sources(texts: Path) -> str:
    """The names and the licences of texts, as far as they say them."""
    manifest = texts / MANIFEST
    if not manifest.is_file():
        return f"{texts.name}."
    found = json.loads(manifest.read_text(encoding="utf-8"))
    return "; ".join(f"{entry['name']} ({entry['licence']})" for entry in found) + "."


def _size_of(texts: Path) -> int:
    if not texts.exists():
        raise CheckpointError(f"--texts {texts}: no such file or directory")
    files = [texts] if texts.is_file() else sorted(texts.glob("*.txt"))
    if not files:
        raise CheckpointError(f"--texts {texts}: no .txt file there")
    return sum(file.stat().st_size for file in files)


def _fast_dtype(base: Path) -> str:
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    return cpu.preferred_dtype(read_json(base / "config.json")) or "float32"


def _free_memory() -> int:
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def _clean(work: Path) -> None:
    """Delete the checkpoints of stages; maps, adapters and calibrations stay."""
    for name in (MAPPED, TRAINED, TRAINED_ON, CALIBRATED):
        shutil.rmtree(work / name, ignore_errors=True)
