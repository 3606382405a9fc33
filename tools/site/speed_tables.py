"""Tables of speed, memory and stored states: docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import MIB, table

Runs = Callable[[str], list[dict[str, Any]]]

CONTEXTS = (256, 2048, 8000)  # that the table of the engine shows


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def engine(runs: Runs) -> str:
    """LoLA beside stock vLLM, by tokens of context."""
    results = runs("engine")[0]["results"]  # the others are in the text
    stock, lola = results["stock"], results["lola"]
    held = lola["mib_per_sequence"]
    grows = f"grows: {stock_kib(runs):.0f} per 1,000 tokens"
    lines = [
        ["", "stock", "LoLA", "LoLA / stock"],
        ["memory per sequence, MiB", grows, f"{held:.1f}", ""],
    ]
    for context in CONTEXTS[1:]:
        ours, theirs = (of[f"sequences_that_fit/{context}"] for of in (lola, stock))
        room, ratio = f"{ours * held / 1024:.2g} GiB: {context:,} tokens", ours / theirs
        shown = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
        label = f"sequences that fit in the same {room}"
        lines.append([label, f"{theirs:.0f}", f"{ours:.0f}", shown])

    def compared(label: str, key: str) -> list[str]:
        return [label, _rate(stock[key]), _rate(lola[key]), f"{lola[key] / stock[key]:.2f}"]

    for context in CONTEXTS:
        label = f"prefill, tokens/s: {context:,}" if context == CONTEXTS[0] else f"{context:,}"
        lines.append(compared(label, f"prefill_tokens_per_s/{context}"))
    for context in CONTEXTS:
        start = f"decode_tokens_per_s/{context}/"
        keys = [key for key in lola if key.startswith(start)]
        label = f"decode, tokens/s at {context:,}: batch"
        for batch in sorted(int(key.removeprefix(start)) for key in keys):
            lines.append(compared(f"{label} {batch}", f"{start}{batch}"))
            label = "batch"
    return table(lines)


def stock_kib(runs: Runs) -> float:
    """MiB of 1,000 tokens in a full KV cache of the demo model."""
    size: float = runs("recall-tasks")[0]["settings"][0]["full_kv_bytes_per_token"]
    return size * 1000 / MIB


def llamacpp(runs: Runs) -> str:
    """LoLA and llama.cpp with fewer bits, of each model that was asked."""
    head, columns = [""], []
    for run in runs("llamacpp"):
        asked, found = run["settings"], run["results"]
        head += [f"{asked['lola']}, {asked['weights']}", f"llama.cpp, {asked['llama_format']}"]
        columns += [found["lola"], found["llama.cpp"]]
    lines = [head]
    for key in columns[0]:
        kind, *where = key.split("/")
        if kind not in ("decode_tokens_per_s", "prefill_tokens_per_s"):
            continue
        context = f"{int(where[0]):,} tokens"
        label = f"decode, {context}, batch {where[1]}" if len(where) > 1 else f"prompt of {context}"
        lines.append([label, *(_rate(column[key]) for column in columns)])
    return table(lines)


# Label, part and name of a value in the results, and how it is shown.
MANY = (
    ("conversations", "kill", "sessions before", "{:,.0f}"),
    ("GiB on the disk", "turns", "bytes on disk, GiB", "{:.1f}"),
    ("tokens computed over new ones, the most of all turns", "turns",
     "tokens computed over new, most", "{:.2f}"),
    ("restoring and one token, p50, ms", "turns", "restoring and one token, p50 ms", "{:.0f}"),
    ("p99", "turns", "restoring and one token, p99 ms", "{:.0f}"),
    ("first token of a turn of 60 tokens, p50, ms", "turns", "first token, p50 ms", "{:.0f}"),
    ("p99", "turns", "first token, p99 ms", "{:.0f}"),
    ("memory of all processes after a tenth of the turns, MiB", "turns",
     "memory after the first tenth, MiB", "{:,.0f}"),
    ("after all", "turns", "memory at last, MiB", "{:,.0f}"),
    ("conversations missing after `kill -9` in a turn", "kill", "sessions lost", "{:.0f}"),
    ("behind what was answered", "kill", "sessions behind, but for the one that was killed",
     "{:.0f}"),
    ("stock vLLM: first token of the same turn, p50, ms", "stock vLLM", "first token, p50 ms",
     "{:,.0f}"),
)  # fmt: skip


def many_sessions(runs: Runs) -> str:
    """Thousands of conversations on one machine."""
    results = runs("many-sessions")[0]["results"]
    shown = [
        [label, form.format(results[part][name])]
        for label, part, name, form in MANY
        if part in results  # stock vLLM only where it was asked for
    ]
    return table([["", ""], *shown])


TABLES = {
    "engine": engine,
    "llamacpp": llamacpp,
    "many-sessions": many_sessions,
}
