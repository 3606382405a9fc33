"""Results of an evaluation: one record per setting, JSON for machines, Markdown for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lola_vllm.eval.record import Record
from lola_vllm.eval.settings import Memory
from lola_vllm.eval.summary import Cell, Reading, beyond_window, readings, recall_cells

MIB = 2**20


def recall_json(records: list[Record]) -> list[dict[str, Any]]:
    """Per setting: its record, its cells, its samples."""
    rows = []
    for record in records:
        beyond = _beyond_window(record)
        cells = [
            {
                "task": task,
                "length": length,
                **cell.to_json(),
                "beyond_window": beyond[task, length].to_json()
                if (task, length) in beyond
                else None,
                "bytes_per_sequence": record.memory.bytes_at(length) if record.memory else None,
                "full_kv_over_bytes": record.memory.saving_at(length) if record.memory else None,
            }
            for (task, length), cell in recall_cells(record.samples).items()
        ]
        rows.append({**record.to_json(), "cells": cells, "samples": record.samples})
    return rows


def perplexity_json(records: list[Record], reference: Record | None) -> list[dict[str, Any]]:
    """Per setting: its record, perplexities by kind, its windows."""
    return [
        {
            **record.to_json(),
            "kinds": {kind: r.to_json() for kind, r in _readings(record, reference).items()},
            "samples": record.samples,
        }
        for record in records
    ]


def recall_table(records: list[Record]) -> str:
    """A Markdown table per task, settings by lengths, and one of the memory they take."""
    cells = [recall_cells(record.samples) for record in records]
    keys = list(dict.fromkeys(key for found in cells for key in found))
    lengths = sorted({length for _, length in keys})
    header = ["setting", *(f"{length:,}" for length in lengths)]
    beyond = [_beyond_window(record) for record in records]
    blocks = []
    for task in dict.fromkeys(task for task, _ in keys):
        rows = []
        for record, whole, part in zip(records, cells, beyond, strict=True):
            rows.append([record.setting.name, *(_show(whole.get((task, n))) for n in lengths)])
            if part:
                rows.append(["- beyond the window", *(_show(part.get((task, n))) for n in lengths)])
        blocks.append(f"### {task}\n\n{markdown([header, *rows])}")
    blocks.append(
        "Exact answers by tokens of prompt and answer, Wilson's 95 % interval in brackets; parts: "
        "share of characters right (vt: of names). Beyond the window: the samples whose needle "
        "is farther from the prompt's end than the window reaches."
    )
    if any(record.memory for record in records):
        rows = [
            [record.setting.name, *(_show_memory(record.memory, length) for length in lengths)]
            for record in records
        ]
        blocks.append(f"### Memory per sequence\n\n{markdown([header, *rows])}")
        blocks.append("MiB, and how many times larger a full KV cache is.")
    return "\n\n".join(blocks)


def _beyond_window(record: Record) -> dict[tuple[str, int], Cell]:
    if record.memory is None or record.memory.lola_config is None:
        return {}
    return recall_cells(beyond_window(record.samples, record.memory.lola_config))


def perplexity_table(records: list[Record], reference: Record | None) -> str:
    """A Markdown table: kinds of text by settings."""
    found = [_readings(record, reference) for record in records]
    kinds = list(dict.fromkeys(kind for by_kind in found for kind in by_kind))
    rows = [["text", "windows", *(record.setting.name for record in records)]]
    for kind in kinds:
        of_kind = [by_kind.get(kind) for by_kind in found]
        windows = max(reading.windows for reading in of_kind if reading)
        rows.append([kind, f"{windows}", *map(_show_reading, of_kind)])
    note = (
        "Perplexity per token, bits per byte (b/B)"
        + ("" if reference is None else ", and times the reference's with a 95 % interval")
        + "."
    )
    return f"{markdown(rows)}\n\n{note}"


def _readings(record: Record, reference: Record | None) -> dict[str, Reading]:
    if reference is None or reference is record or not reference.finished:
        return readings(record.samples, None)
    return readings(record.samples, reference.samples)


def _show(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.rate:.0%} [{cell.low:.0%}, {cell.high:.0%}]"
    return text if cell.exact == cell.samples else f"{text} parts {cell.share:.0%}"


def _show_memory(memory: Memory | None, length: int) -> str:
    if memory is None:
        return "?"
    return f"{memory.bytes_at(length) / MIB:.1f}, {memory.saving_at(length):.1f}x"


def _show_reading(reading: Reading | None) -> str:
    if reading is None:
        return ""
    text = f"{reading.perplexity[0]:.2f}, {reading.bits_per_byte:.3f} b/B"
    if reading.ratio is not None:
        value, low, high = reading.ratio
        text += f", {value:.3f}x [{low:.3f}, {high:.3f}]"
    return text


def markdown(rows: list[list[str]]) -> str:
    """A table whose columns also line up as plain text; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])])


def write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON in one step, so that an interrupted run leaves the last whole file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
