"""A model directory in a vLLM engine: one child process per setting of a comparison.

Streams, conversations and texts of which passages are asked are read in transformers (`reader.py`),
in such a process too.

A separate process returns all memory when it ends, and can have environment variables that are
read only at start-up. `python -m lola_vllm.evaluation.engine` reads the arguments of `answers`,
pickled, on its standard input and answers with lines on its standard output, each a JSON object. It
ends when its input does, as it does when its parent is killed. vLLM's output is kept apart. It is
shown if the child fails without a message of this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import ValidationError

from lola_vllm.core import cpu
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Prediction, Tokenizer
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.settings import Setting, measure

# Tokens of one step. Log-probabilities of a prompt take a row of the vocabulary per token.
STEP_TOKENS = 2048
# Arguments that the evaluation sets itself. With other values its results would be wrong.
FIXED_ARGS = ("model", "hf_overrides", "max_model_len", "max_num_seqs", "enable_prefix_caching")
LAST_LINES = 30  # of a child's output, shown if it fails
USER_ERROR = 2  # exit status if the message explains the failure

Event = dict[str, Any]


# --- in the child


class EngineModel:
    """vLLM in this process.

    Args:
        setting: model directory and LoLA parameters.
        max_length: longest prompt and answer together, in tokens.
        batch: sequences that run at once.
        engine_args: more arguments of `vllm.LLM`.

    Attributes:
        tokenizer: the model's. batch: number of prompts to give in one call. dtype: the model's.

    Raises:
        EvalError: an argument that is fixed.
    """

    def __init__(
        self, setting: Setting, max_length: int, batch: int, engine_args: Mapping[str, Any]
    ) -> None:
        for name in FIXED_ARGS:
            if name in engine_args:
                raise EvalError(f"--engine-args: {name} is set by the evaluation; leave it out")
        # vLLM reads these when it is imported. The engine can run in this process, which has no
        # other work.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        dtype = dtype_of(setting, engine_args)
        self.tokenizer, self.batch = Tokenizer(setting.model), batch
        args: dict[str, Any] = {
            "enforce_eager": True,  # compiling takes longer than it saves here
            "max_num_batched_tokens": max(STEP_TOKENS, batch),
            **_cache_args(setting, max_length, batch, dtype),
            "dtype": dtype,
            **engine_args,
        }
        self._llm = LLM(
            str(setting.model),
            hf_overrides={"lola_config": setting.lola_config} if setting.lola_config else {},
            max_model_len=max_length,
            max_num_seqs=batch,
            # A hit would skip the prompt whose recall or likelihood is measured, and a sequence
            # would hold two states.
            enable_prefix_caching=False,
            **args,
        )
        if setting.without:
            from lola_vllm.evaluation.ablation import leave_out

            self._llm.apply_model(partial(leave_out, without=setting.without))
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """Greedy continuations, at most `max_tokens` tokens each, without special tokens."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return [output.outputs[0].text for output in self._generate(prompts, params)]

    def predictions(self, windows: list[list[int]]) -> list[list[Prediction]]:
        """How well every token of each window is predicted from those before it.

        Returns:
            Per window of n tokens n - 1 predictions: the first token has none.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._generate(windows, params)
        return [
            [
                Prediction(entry[token].logprob, entry[token].rank == 1)
                for token, entry in zip(ids[1:], o.prompt_logprobs[1:], strict=True)
            ]
            for ids, o in zip(windows, outputs, strict=True)
        ]

    def _generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        requests: Any = [{"prompt_token_ids": ids} for ids in prompts]
        return list(self._llm.generate(requests, params, use_tqdm=False))


def dtype_of(setting: Setting, engine_args: Mapping[str, Any]) -> str:
    """The dtype that is asked for, or the choice of `lola-vllm serve`.

    That is the fast dtype of a CPU, and "auto" on other devices, where vLLM chooses.
    """
    import torch

    if "dtype" in engine_args:
        return str(engine_args["dtype"])
    if torch.cuda.is_available():
        return "auto"
    return cpu.preferred_dtype(setting.config) or "auto"


def _cache_args(setting: Setting, max_length: int, batch: int, dtype: str) -> dict[str, int]:
    """A KV cache of the right size for softmax attention on a CPU.

    In other cases vLLM's default is right. LoLA's pool follows `max_num_seqs`, and vLLM may use all
    memory of a GPU. On a CPU it would take nearly all memory of the machine.
    """
    import psutil
    import torch

    if setting.is_lola or torch.cuda.is_available():
        return {}
    memory = measure(setting, dtype if dtype in ("float32", "float16") else "bfloat16")
    room = psutil.virtual_memory().available // 2
    if memory is None:
        return {"kv_cache_memory_bytes": min(room, 4 * 2**30)}
    # More tokens, for a partly filled block and the null block.
    one = memory.full_kv_bytes_per_token * (max_length + 256)
    return {"kv_cache_memory_bytes": min(room, one * batch)}


def answers(
    plan: Plan,
    setting: Setting,
    done: Collection[tuple[Any, ...]],
    batch: int,
    engine_args: Mapping[str, Any],
) -> Iterator[Event]:
    """Ask a setting in this process; see `ask`."""
    model: Any
    if plan.read_in_pieces:
        from lola_vllm.evaluation.reader import Reader

        model = Reader(setting, dtype_of(setting, engine_args), batch)
    else:
        model = EngineModel(setting, plan.max_length, batch, engine_args)
    yield {"dtype": model.dtype}
    for rows in plan.run(model, done):
        yield {"rows": rows}


def main() -> int:
    """Run the job on standard input."""
    # Libraries print to file descriptor 1, so this protocol's lines need a descriptor of their own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def emit(event: Event) -> None:
            out.write(json.dumps(event) + "\n")
            out.flush()

        try:
            job = pickle.load(sys.stdin.buffer)
            threading.Thread(target=_end_with_input, daemon=True).start()
            for event in answers(*job):
                emit(event)
        except EvalError as error:
            emit({"error": str(error)})
            return USER_ERROR
        except ValidationError as error:  # vLLM's refusal of an option
            emit({"error": "; ".join(e["msg"] for e in error.errors())})
            return USER_ERROR
        except Exception as error:
            emit({"error": f"{type(error).__name__}: {error}"})
            raise
    return 0


def _end_with_input() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(USER_ERROR)  # nobody is left to answer


# --- in the parent


def ask(
    plan: Plan,
    setting: Setting,
    done: Collection[tuple[Any, ...]],
    batch: int,
    engine_args: Mapping[str, Any],
) -> Iterator[Event]:
    """Ask a setting in a child process.

    Args:
        plan: what to ask. setting: of the row. done: what is not asked, see `Plan.done`.
        batch: sequences at once. engine_args: more arguments of `vllm.LLM`.

    Yields:
        `{"dtype": name}`, then `{"rows": rows}` after every few questions.

    Raises:
        EvalError: the setting failed; has the child's message or its exit status.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    failure = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "lola_vllm.evaluation.engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        assert child.stdin and child.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # the exit status of the child says more
                child.stdin.write(pickle.dumps((plan, setting, done, batch, engine_args)))
                child.stdin.flush()
            for line in child.stdout:
                if not line.endswith(b"\n"):
                    break  # the child died while writing
                event = json.loads(line)
                failure = event.get("error")
                if failure is None:
                    yield event
            status = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        if status not in (0, USER_ERROR):
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-LAST_LINES:])
    if failure is None and status != 0:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        failure = f"its process {how}; if memory ran out, lower --batch or --lengths"
    if failure is not None:
        raise EvalError(f"setting {setting.name!r}: {failure}")


if __name__ == "__main__":
    sys.exit(main())
