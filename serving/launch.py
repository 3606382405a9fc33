"""`lola-vllm serve`: `vllm serve` with options that fit the machine, each with its reason.

All choices are options and environment variables that a user could also give to vLLM. They are
printed before vLLM replaces this process. They stand before the user's options, and what the user
names is not chosen. Sizes of memory are settled in vLLM, by the config hook.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from lola_vllm.core import cpu
from lola_vllm.core.model_types import LOLA_TYPES
from lola_vllm.engine.vllm import compat
from lola_vllm.models.files import CheckpointError, read_json
from lola_vllm.serving.options import named_options
from lola_vllm.serving.store_options import StoreOptions

PLUGIN = "lola"
# Address to listen on without --host; the images set it.
HOST_ENV = "LOLA_VLLM_HOST"
# Limits of sequences per core and per machine. More sequences would only wait for each other.
SEQUENCES_PER_CORE = 32
MAX_SEQUENCES = 256
# How often a waiting thread looks before it sleeps, some 50 us: nearly as fast as spinning for ever
# on an idle machine. Beside two busy processes on two cores a step takes 57 ms with it, 32 without
# spinning and 91 with OpenMP's default.
SPINS = 20_000
STORE_REASON = (
    "what is stored: states of conversations, in memory unless a directory is given;\n"
    "      --lola-state-dir keeps those with a name for the next start,\n"
    "      --lola-store none keeps nothing (docs/privacy.md)"
)
IDLE = 0.15  # share of the cores that others may use on a machine that counts as idle

# Options of vLLM that say something about prefix caching, or with which a store does not do the
# same: its engine is one of several, or it stores nothing.
_OF_CACHING = {
    "enable-prefix-caching",
    "no-enable-prefix-caching",
    "block-size",
    "mamba-block-size",
    "prefix-cache-retention-interval",
    "kv-events-config",
    "data-parallel-size",
    "data-parallel-size-local",
    "pipeline-parallel-size",
    "runner",
}
# Options of vLLM that take the store's place.
_CONNECTORS = {"kv-transfer-config", "kv-offloading-size"}
# Options of vLLM with which --enforce-eager is not chosen: vLLM's stages on a CPU need
# torch.compile, see `refusals`.
_OF_COMPILING = {
    "enforce-eager",
    "no-enforce-eager",
    "compilation-config",
    "optimization-level",
    "pipeline-parallel-size",
}
_PLUGIN_GROUPS = ("general", "platform", "io_processor", "stat_logger")


class Machine(NamedTuple):
    """Facts for the choices: "cpu" or "cuda", cores, and how many of them others use now."""

    device: str
    cores: int
    busy: float = 0.0


class ChosenOption(NamedTuple):
    """An option or environment variable that was chosen, its value, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Launch:
    """The command that `lola-vllm serve` runs.

    Attributes:
        model: as for `vllm serve`. options, env: the choices; a flag has the value "".
        theirs: the user's options, which may hold keys and are not printed.
        notes: remarks to print.
    """

    model: str
    options: list[ChosenOption]
    env: list[ChosenOption]
    theirs: list[str]
    notes: list[str]

    @property
    def command(self) -> list[str]:
        """The program and its arguments."""
        return [_vllm(), *self._arguments, *self.theirs]

    @property
    def _arguments(self) -> list[str]:
        flags = [part for c in self.options for part in (c.name, c.value) if part]
        return ["serve", self.model, *flags]

    def __str__(self) -> str:
        chosen = [(f"{c.name} {c.value}".rstrip(), c.reason) for c in self.options]
        chosen += [(f"{c.name}={c.value}", c.reason) for c in self.env]
        lines = (f"  {setting}\n      {reason}" for setting, reason in chosen)
        running = f"running: vllm {shlex.join(self._arguments)}"
        if self.theirs:
            running += " and your options"
        return "\n".join([*self.notes, *lines, running])


def this_machine(cpus: Set[int]) -> Machine:
    """The machine, of which vLLM may use `cpus`. Without a GPU it looks at them for half a
    second."""
    if torch.cuda.is_available():
        return Machine("cuda", len(cpus))
    used = psutil.cpu_percent(interval=0.5, percpu=True)
    return Machine("cpu", len(cpus), sum(used[cpu] for cpu in cpus if cpu < len(used)) / 100)


def plan(
    model: str, store: StoreOptions, machine: Machine, env: Mapping[str, str] = os.environ
) -> Launch:
    """Choose the options that the user has not given.

    Args:
        model: as for `vllm serve`. store: the command line, taken apart.

    Raises:
        CheckpointError: a directory that holds no LoLA model, options that cannot be read, or an
            environment without LoLA's routes.
    """
    named = named_options(store.rest)
    directory = Path(model)
    chosen = _front(directory, named, env)
    notes = [f"{model} is no directory here: the numbers are left to vLLM"]
    if directory.is_dir():
        config = _config(directory)
        notes = [f"{model}: on {machine.device} with {machine.cores} cores"]
        if machine.device == "cpu":
            chosen += _quick(config, named, env)
        if "max-num-seqs" not in named:
            chosen.append(_sequences(machine))
    in_place = directory.is_dir() and not named & _CONNECTORS
    stored = store.value(default=in_place)
    if stored is not None:
        if in_place and store.keeps and not named & _OF_CACHING:
            reason = (
                "the store keeps states at any token, and a running sequence takes half the memory;"
                "\n      --enable-prefix-caching has both"
            )
            chosen.append(ChosenOption("--no-enable-prefix-caching", "", reason))
        chosen.append(ChosenOption("--additional-config", stored, STORE_REASON))
    return Launch(model, chosen, _environment(machine, env), store.rest, notes)


def run(launch: Launch, cpus: Set[int]) -> None:
    """Replace this process by vLLM, on these CPUs; does not return."""
    os.sched_setaffinity(0, cpus)
    environment = {**os.environ, **{choice.name: choice.value for choice in launch.env}}
    sys.stdout.flush()
    command = launch.command
    os.execve(command[0], command, environment)


def _front(directory: Path, named: Set[str], env: Mapping[str, str]) -> list[ChosenOption]:
    chosen = []
    if "served-model-name" not in named and directory.is_dir() and directory.resolve().name:
        reason = "the directory's name, for requests and metrics"
        chosen.append(ChosenOption("--served-model-name", directory.resolve().name, reason))
    if not {"host", "uds"} & named:
        if HOST_ENV in env:
            chosen.append(ChosenOption("--host", env[HOST_ENV], HOST_ENV))
        else:
            reason = "this machine only; --host 0.0.0.0 is for all that can reach it"
            chosen.append(ChosenOption("--host", "127.0.0.1", reason))
    details = "enable-prompt-tokens-details"
    if not {details, f"no-{details}"} & named:
        reason = "answers tell how many tokens of a prompt came from cached states"
        chosen.append(ChosenOption(f"--{details}", "", reason))
    return chosen


def _config(model: Path) -> dict[str, Any]:
    config = read_json(model / "config.json")
    if config.get("model_type") not in LOLA_TYPES:
        raise CheckpointError(
            f"{model}: not a LoLA model (model_type is not {LOLA_TYPES[0]!r}); make one with "
            "lola-vllm init, convert or distill, or use 'vllm serve' for this one"
        )
    return config


def _quick(
    config: Mapping[str, Any], named: Set[str], env: Mapping[str, str]
) -> list[ChosenOption]:
    chosen = []
    dtype = cpu.preferred_dtype(config, env)
    if dtype and not {"dtype", "quantization"} & named:
        flag = cpu.bfloat16_flag(env)
        reason = f"this CPU multiplies it fast ({flag})"
        if flag is None:
            reason = "this CPU has no bfloat16 instructions, and is several times faster so"
        chosen.append(ChosenOption("--dtype", dtype, reason))
    missing = cpu.missing_for_compiling(env)
    if missing and not named & _OF_COMPILING:
        needed = next(iter(missing))
        reason = f"torch.compile, which decodes up to two fifths faster, needs {needed}"
        chosen.append(ChosenOption("--enforce-eager", "", reason))
    return chosen


def _sequences(machine: Machine) -> ChosenOption:
    per_core, number = "", MAX_SEQUENCES
    if machine.device == "cpu":
        per_core = f"{SEQUENCES_PER_CORE} per core; "
        number = min(MAX_SEQUENCES, SEQUENCES_PER_CORE * machine.cores)
    reason = f"{per_core}more would only wait for each other"
    return ChosenOption("--max-num-seqs", str(number), reason)


def _environment(machine: Machine, env: Mapping[str, str]) -> list[ChosenOption]:
    if (rust := compat.rust_frontend(env)) is not None:
        raise CheckpointError(
            f"{compat.RUST_FRONTEND} = {rust}: {compat.NOT_IN_RUST}, or do without by 'vllm serve'"
        )
    chosen = []
    if "VLLM_PLUGINS" not in env:
        # Without this variable, vLLM loads all plugins except those that add routes. With it, vLLM
        # loads only the named ones, so all are named.
        names = {e.name for g in _PLUGIN_GROUPS for e in entry_points(group=f"vllm.{g}_plugins")}
        plugins = ",".join([PLUGIN, *sorted(names - {PLUGIN})])
        chosen.append(ChosenOption("VLLM_PLUGINS", plugins, "routes /v1/lola and metrics lola:*"))
    elif PLUGIN not in env["VLLM_PLUGINS"].split(","):
        raise CheckpointError(
            f"VLLM_PLUGINS = {env['VLLM_PLUGINS']!r} leaves LoLA out; add {PLUGIN!r} or unset it"
        )
    if machine.device == "cpu":
        if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & env.keys():
            chosen.append(_waiting(machine))
        if "VLLM_CPU_OMP_THREADS_BIND" not in env:
            why = "two servers would bind to the same cores"
            chosen.append(ChosenOption("VLLM_CPU_OMP_THREADS_BIND", "nobind", why))
    return chosen


def _waiting(machine: Machine) -> ChosenOption:
    """How threads wait for each other, some 250 times in a step."""
    if machine.busy <= IDLE * machine.cores:
        why = (
            "no other work here, so threads look for some 50 us before they sleep;\n"
            "      OMP_WAIT_POLICY=PASSIVE is for a machine that others use too"
        )
        return ChosenOption("GOMP_SPINCOUNT", str(SPINS), why)
    why = (
        f"other programs use {machine.busy:.1f} of {machine.cores} cores, and threads that spin "
        f"would slow each other\n      down; GOMP_SPINCOUNT={SPINS} is for an idle machine"
    )
    return ChosenOption("OMP_WAIT_POLICY", "PASSIVE", why)


def _vllm() -> str:
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise CheckpointError(
            "the command 'vllm' is not installed; run 'lola-vllm doctor' to see what is missing"
        )
    return found


def serve(model: str, options: Sequence[str], before: Mapping[str, Any], cpus: Set[int]) -> int:
    """What the command `lola-vllm serve` does.

    Args:
        options: what follows the model. before: options of this command that stand before it.
        cpus: those on which this process was started. With OMP_NUM_THREADS set, importing torch
            reduces them, and vLLM would inherit the reduced set.
    """
    store = StoreOptions.parse(options, before)
    launch = plan(model, store, this_machine(cpus))
    print(launch)
    if not store.dry_run:
        run(launch, cpus)
    return 0
