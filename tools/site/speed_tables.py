"""Tables of speed, memory and endurance: docs/performance.md and docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import table

Runs = Callable[[str], list[dict[str, Any]]]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


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
            if kind == "sequences_that_fit" and context != "256":
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
    contexts = sorted(int(key.split("/")[1]) for key in lola if key.startswith("prefill"))
    for context in contexts:
        key = f"prefill_tokens_per_s/{context}"
        label = f"prefill, tokens/s: {context:,}" if context == contexts[0] else f"{context:,}"
        lines.append([label, _rate(stock[key]), _rate(lola[key]), f"{lola[key] / stock[key]:.2f}"])
    for context in contexts:
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


def cache_cost(runs: Runs) -> str:
    """What the cache costs a whole model."""
    (run,) = runs("cache-cost")
    best, ratios = run["results"]["best"], run["results"]["ratios"]
    size = run["settings"]["sparse_cache_size"]
    first = [best[f"first_token_s/lam {n}"] for n in (size, 0)]
    lines = [["", ""]]
    prompt = int(run["settings"]["prompt"])
    label = f"first token of {prompt:,}, `sparse_cache_size` {size} over 0"
    lines.append([label, f"{first[0]:.2f} s / {first[1]:.2f} s = {first[0] / first[1]:.2f}"])
    for key, value in ratios.items():
        if key.startswith("step"):
            interval, batch, context = (part.split()[-1] for part in key.split(", ")[2].split("/"))
            lines.append(
                [
                    f"average decode step over one that rescores nothing, batch {batch}, "
                    f"`update_interval` {interval}, after {int(context):,} tokens",
                    f"{value:.2f}",
                ]
            )
    return table(lines)


# Rows of the page: batch, lam, C.
OPS = (
    (1, 128, 64),
    (8, 0, 64),
    (8, 128, 64),
    (8, 512, 64),
    (32, 0, 64),
    (32, 128, 64),
    (32, 512, 64),
)


def ops(runs: Runs) -> str:
    """The decode op beside the memory bus."""
    found = {(r["batch"], r["lam"], r["interval"]): r for r in runs("ops")[0]["results"]}
    lines = [
        [
            "batch",
            "lam",
            "C",
            "step, us",
            "over the same step without rescoring",
            "GB/s read",
            "of a read as long",
            "of a large read",
            "of a copy",
        ]
    ]
    for key in OPS:
        row = found[key]
        lines.append(
            [
                *map(str, key),
                f"{row['step_us']:.0f}",
                f"{row['step_over_frozen']:.2f}",
                f"{row['gb_per_s']:.1f}",
                *_ratios(row),
            ]
        )
    return table(lines)


def _ratios(row: dict[str, float]) -> list[str]:
    return [f"{row[key]:.2f}" for key in ("of_short_read", "of_read", "of_copy")]


def ops_active(runs: Runs) -> str:
    """The same with threads that stay awake."""
    lines = [["batch", "lam", "GB/s read", "of a read as long", "of a large read", "of a copy"]]
    for row in runs("ops")[1]["results"]:
        lines.append([str(row["batch"]), str(row["lam"]), f"{row['gb_per_s']:.1f}", *_ratios(row)])
    return table(lines)


def prefix(runs: Runs) -> str:
    """What a shared prefix saves."""
    (run,) = runs("prefix")
    stock, lola = run["results"]["stock"], run["results"]["lola"]
    of = run["settings"]["prompts"]
    lines = [["", "stock", "LoLA"]]
    for label, show in {
        "without caching, ms to the first token, median": lambda r: f"{r['miss_ms']:,.0f}",
        "a hit": lambda r: f"{r['hit_ms']:,.0f}",
        "tokens found": lambda r: f"{r['hit_rate_percent']:.1f} %",
        "first tokens that a hit changed": lambda r: f"{r['answers_that_differ']} of {of}",
    }.items():
        lines.append([label, show(stock), show(lola)])
    return table(lines)


SESSIONS = {
    "same process": "LoLA, the state in the store's memory",
    "new process": "LoLA, another process, which reads the file: first turn",
    "prefix caching": "LoLA, no store, prefix caching",
    "stock": "stock vLLM, prefix caching, same process",
    "llama.cpp": "llama.cpp, same process",
    "llama.cpp, new process": "llama.cpp, another process, which loads its slot's file",
}


def _sessions(results: dict[str, dict[str, float]]) -> str:
    lines = [["", "turn", "alone", "ratio", "everything computed again"]]
    for name, label in SESSIONS.items():
        row = results[name]
        first = "the first turn" if name == "new process" else "a turn"
        alone, whole = f"{row['its tokens alone, ms']:,.0f}", f"{row['from nothing, ms']:,.0f}"
        ratio = f"{row[f'{first}, of its tokens alone']:.2f}"
        lines.append([label, f"{row[f'{first}, ms']:,.0f}", alone, ratio, whole])
        if name == "new process":
            lines.append(
                [
                    "its further turns",
                    f"{row['a turn, ms']:,.0f}",
                    alone,
                    f"{row['a turn, of its tokens alone']:.2f}",
                    "",
                ]
            )
    return table(lines)


def sessions(runs: Runs) -> str:
    """A turn of a stored conversation, sizes by layer."""
    return _sessions(runs("sessions")[0]["results"])


def sessions_by_head(runs: Runs) -> str:
    """The same with sizes per KV head."""
    return _sessions(runs("sessions")[1]["results"])


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


def long_sequence(runs: Runs) -> str:
    """Memory and time along a million tokens in vLLM."""
    shipped = runs("long-sequence")[0]["long"]["prefill"]
    at = [shipped[0], shipped[len(shipped) // 2], shipped[-1]]
    return table(
        [
            ["tokens", *(f"{sample['tokens']:,}" for sample in at)],
            ["memory of the process, MiB", *(f"{sample['memory_mib']:,.2f}" for sample in at)],
            ["processor time per token, ms", *(f"{s['us_per_token'] / 1000:.2f}" for s in at)],
        ]
    )


def long_sequences(runs: Runs) -> str:
    """Memory and time along two sequences whose positions run on."""
    lines = [["", "SmolLM2-135M", "tiny random model"]]
    both = [run for run in runs("long-sequence") if not run["settings"].get("lola_config")][-2:]

    def row(label: str, show: Callable[[dict[str, Any]], str]) -> None:
        lines.append([label, *(show(run) for run in both)])

    def times(run: dict[str, Any]) -> str:
        found = [sample["us_per_token"] for sample in run["long"]["prefill"]]
        return f"{min(found):.3g} to {max(found):.3g}"

    row("tokens", lambda run: f"{run['settings']['tokens']:,}")
    row(
        "memory of the process, MiB: at first, at the end",
        lambda run: ", ".join(f"{run['long']['prefill'][i]['memory_mib']:,.1f}" for i in (0, -1)),
    )
    row("processor time per token, us", times)
    row(
        "a decode step, ms: after 1,000 tokens, at the end",
        lambda run: (
            f"{run['short']['decode_ms_per_token']:.3g}, {run['long']['decode_ms_per_token']:.3g}"
        ),
    )
    return table(lines)


def soak(runs: Runs) -> str:
    """Hours under load."""
    quiet, full, _ = runs("soak")
    lines = [["", "clients that pause", "clients that do not pause"]]
    both = [quiet, full]

    def row(label: str, show: Callable[[dict[str, Any]], str]) -> None:
        lines.append([label, *(show(run) for run in both)])

    def memory(sample: dict[str, Any]) -> str:
        return f"{sum(sample['memory_mib'].values()):,.0f}"

    row("minutes", lambda run: f"{run['settings']['minutes']:.0f}")
    for label, names in {
        "answered whole": ("whole",),
        "with a known answer": ("known",),
        "retried": ("retried",),
        "abandoned in prefill or decode": ("leaves in prefill", "leaves in decode"),
    }.items():
        row(label, lambda run, names=names: f"{sum(run['requests'][n] for n in names):,}")
    row("faults", lambda run: f"{len(run['faults'])}")
    row(
        "states in use in a pause, at most",
        lambda run: f"{max(sample['states_used_idle'] for sample in run['samples'])}",
    )
    row(
        "memory of all processes, MiB: at first, at the end",
        lambda run: f"{memory(run['samples'][0])}, {memory(run['samples'][-1])}",
    )
    row(
        "p99 of the first token, ms: at first, at the end",
        lambda run: ", ".join(
            f"{run['samples'][i]['first_token_ms']['p99']:,.0f}" for i in (0, -1)
        ),
    )
    return table(lines)


SEEN = {
    "goes on": "turns that go on with a session",
    "restored": "of these, from a stored state",
    "no name": "requests without a name",
    "restored without a name": "of all, found by their tokens",
    "forks": "forks",
    "deletes": "deletions",
    "leaves": "abandoned",
    "compared": "answers compared with those computed from nothing",
}


def soak_sessions(runs: Runs) -> str:
    """The same with stored sessions and a server that is killed."""
    run = runs("soak")[2]
    seen, samples = run["seen"], run["samples"]
    lines = [
        ["", ""],
        ["minutes", f"{run['settings']['minutes']:.0f}"],
        ["SIGKILLs", f"{run['lives'] - 1}"],
    ]
    lines += [[label, f"{seen[name]:,}"] for name, label in SEEN.items()]
    sizes = [sample["memory_mib"] for sample in samples]
    lines.append(["faults", f"{len(run['faults'])}"])
    lines.append(
        ["memory of all processes, MiB: least, most", f"{min(sizes):,.0f}, {max(sizes):,.0f}"]
    )
    return table(lines)


TABLES = {
    "engine": engine,
    "cache-cost": cache_cost,
    "ops": ops,
    "ops-active": ops_active,
    "prefix": prefix,
    "sessions": sessions,
    "sessions-by-head": sessions_by_head,
    "llamacpp": llamacpp,
    "long-sequence": long_sequence,
    "long-sequences": long_sequences,
    "soak": soak,
    "soak-sessions": soak_sessions,
}
