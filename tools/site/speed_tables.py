"""Tables of speed, memory and stored states: docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import table

Runs = Callable[[str], list[dict[str, Any]]]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


CONTEXTS = (256, 2048, 8000)  # that the table of the engine shows


def engine(runs: Runs) -> str:
    """LoLA beside stock vLLM, by tokens of context."""
    found: dict[str, dict[str, float]] = {"stock": {}, "lola": {}}
    fits: list[tuple[str, float, float]] = []
    for run in runs("engine")[:1]:  # the others are in the text
        results = run["results"]
        sizes = results["lola"]
        held = sizes["mib_per_sequence"]
        for key, value in sizes.items():
            kind, _, context = key.partition("/")
            if kind == "sequences_that_fit" and int(context) in CONTEXTS[1:]:
                room = f"{value * held / 1024:.2g} GiB: {int(context):,} tokens"
                fits.append((room, results["stock"][key], value))
        for name in found:
            found[name].update(results[name])
    stock, lola = found["stock"], found["lola"]
    kib = stock_kib(runs)
    lines = [["", "stock", "LoLA", "LoLA / stock"]]
    lines.append(
        [
            "memory per sequence, MiB",
            f"grows: {kib:.0f} per 1,000 tokens",
            f"{lola['mib_per_sequence']:.1f}",
            "",
        ]
    )
    for room, a, b in fits:
        lines.append(
            [
                f"sequences that fit in the same {room}",
                f"{a:.0f}",
                f"{b:.0f}",
                f"{b / a:.1f}" if b < 10 * a else f"{b / a:.0f}",
            ]
        )
    for context in CONTEXTS:
        key = f"prefill_tokens_per_s/{context}"
        label = f"prefill, tokens/s: {context:,}" if context == CONTEXTS[0] else f"{context:,}"
        lines.append([label, _rate(stock[key]), _rate(lola[key]), f"{lola[key] / stock[key]:.2f}"])
    for context in CONTEXTS:
        batches = sorted(
            int(key.split("/")[2])
            for key in lola
            if key.startswith(f"decode_tokens_per_s/{context}/")
        )
        for batch in batches:
            key = f"decode_tokens_per_s/{context}/{batch}"
            label = f"batch {batch}"
            if batch == batches[0]:
                label = f"decode, tokens/s at {context:,}: {label}"
            ratio = f"{lola[key] / stock[key]:.2f}"
            lines.append([label, _rate(stock[key]), _rate(lola[key]), ratio])
    return table(lines)


def stock_kib(runs: Runs) -> float:
    """MiB of 1,000 tokens in a full KV cache of the demo model."""
    for run in runs("recall-tasks"):
        for setting in run["settings"]:
            size: float = setting["full_kv_bytes_per_token"] * 1000 / 2**20
            return size
    raise ValueError("recall-tasks.json has no setting")


def llamacpp(runs: Runs) -> str:
    """LoLA, llama.cpp and stock vLLM with fewer bits."""
    int8, q4 = (run["results"] for run in runs("llamacpp"))
    columns = {
        "LoLA": int8["lola"],
        "llama.cpp Q4_1": int8["llama.cpp"],
        "llama.cpp Q4_0": q4["llama.cpp"],
        "stock vLLM": int8["stock"],
    }
    lines = [["", *columns]]
    for key in int8["lola"]:
        kind, *where = key.split("/")
        if kind not in ("decode_tokens_per_s", "prefill_tokens_per_s"):
            continue
        context = f"{int(where[0]):,} tokens"
        label = f"decode, {context}, batch {where[1]}" if len(where) > 1 else f"prompt of {context}"
        lines.append([label, *(f"{column[key]:,.0f}" for column in columns.values())])
    return table(lines)


# Part and name of a value in the results -> its label and how it is shown.
MANY = {
    ("kill", "sessions before"): ("conversations", "{:,.0f}"),
    ("turns", "bytes on disk, GiB"): ("GiB on the disk", "{:.1f}"),
    ("turns", "tokens computed over new, most"): (
        "tokens computed over new ones, the most of all turns",
        "{:.2f}",
    ),
    ("turns", "restoring and one token, p50 ms"): ("restoring and one token, p50, ms", "{:.0f}"),
    ("turns", "restoring and one token, p99 ms"): ("p99", "{:.0f}"),
    ("turns", "first token, p50 ms"): ("first token of a turn of 60 tokens, p50, ms", "{:.0f}"),
    ("turns", "first token, p99 ms"): ("p99", "{:.0f}"),
    ("turns", "memory after the first tenth, MiB"): (
        "memory of all processes after a tenth of the turns, MiB",
        "{:,.0f}",
    ),
    ("turns", "memory at last, MiB"): ("after all", "{:,.0f}"),
    ("kill", "sessions lost"): ("conversations missing after `kill -9` in a turn", "{:.0f}"),
    ("kill", "sessions behind, but for the one that was killed"): (
        "behind what was answered",
        "{:.0f}",
    ),
    ("stock vLLM", "first token, p50 ms"): (
        "stock vLLM: first token of the same turn, p50, ms",
        "{:,.0f}",
    ),
}


def many_sessions(runs: Runs) -> str:
    """Thousands of conversations on one machine."""
    results = runs("many-sessions")[0]["results"]
    lines = [["", ""]]
    for (part, name), (label, form) in MANY.items():
        if part in results:  # stock vLLM only where it was asked for
            lines.append([label, form.format(results[part][name])])
    return table(lines)


TABLES = {
    "engine": engine,
    "llamacpp": llamacpp,
    "many-sessions": many_sessions,
}
