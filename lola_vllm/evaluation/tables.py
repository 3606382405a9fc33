"""Results as Markdown tables for people."""

from __future__ import annotations

from lola_vllm.evaluation.copied import CopyCell, Triple, copy_cells_of
from lola_vllm.evaluation.copying import ASKED, FLOOR, GIVEN
from lola_vllm.evaluation.curves import Point, curves_of, distance_cells, lines_of
from lola_vllm.evaluation.repeats import DISTANCE, NGRAM
from lola_vllm.evaluation.results import (
    MIB,
    Cell,
    Reading,
    Record,
    cells_beyond_window,
    readings_of,
    recall_cells,
)
from lola_vllm.evaluation.settings import SequenceMemory
from lola_vllm.evaluation.stream import StreamPlan


def recall_table(records: list[Record]) -> str:
    """A Markdown table per task, settings by lengths, and one of the memory they take."""
    cells = [recall_cells(record.samples) for record in records]
    keys = list(dict.fromkeys(key for found in cells for key in found))
    lengths = sorted({length for _, length in keys})
    header = ["setting", *(f"{length:,}" for length in lengths)]
    beyond = [cells_beyond_window(record) for record in records]
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


def distance_table(records: list[Record]) -> str:
    """A Markdown table per task, settings by distances, and one of the memory they take."""
    cells = [distance_cells(record.samples) for record in records]
    keys = list(dict.fromkeys(key for found in cells for key in found))
    blocks = []
    for task in dict.fromkeys(task for task, _, _ in keys):
        for length, pairs in lines_of(keys, task).items():
            rows = [["setting", *(f"{distance:,}" for _, distance in pairs)]]
            for record, found in zip(records, cells, strict=True):
                shown = [_show(found.get((task, *pair))) for pair in pairs]
                rows.append([record.setting.name, *shown])
            title = task if length is None else f"{task}, {length:,} tokens"
            blocks.append(f"### {title}\n\n{markdown(rows)}")
    samples = {cell.samples for found in cells for cell in found.values()}
    blocks.append(
        f"Exact answers of {' or '.join(map(str, sorted(samples)))} by tokens from the needle to "
        "the prompt's end, as near as whole sentences come, Wilson's 95 % interval in brackets; "
        "parts: share of characters right. Prose is of held-out documents, one after the other."
    )
    lengths = sorted({length for _, length, _ in keys})
    if any(record.memory for record in records):
        rows = [["setting", *(f"{length:,}" for length in lengths)]]
        for record in records:
            shown = [_show_memory(record.memory, length) for length in lengths]
            rows.append([record.setting.name, *shown])
        blocks.append(f"### Memory per sequence\n\n{markdown(rows)}")
        blocks.append("By tokens of prompt and answer: MiB, and times a full KV cache's.")
    return "\n\n".join(blocks)


def copy_table(records: list[Record], reference: Record | None) -> str:
    """A Markdown table per kind and length of text: settings by distances."""
    found = [copy_cells_of(record, reference) for record in records]
    keys = list(dict.fromkeys(key for cells in found for key in cells))
    blocks = []
    for kind, length in dict.fromkeys((kind, length) for kind, length, _ in keys):
        distances = sorted({d for of, n, d in keys if (of, n) == (kind, length)})
        rows = [["setting", *(f"{distance:,}" for distance in distances)]]
        for record, cells in zip(records, found, strict=True):
            shown = [cells.get((kind, length, d)) for d in distances]
            rows.append([record.setting.name, *map(_show_copy, shown)])
            if any(cell and cell.floor_exact for cell in shown):
                rows.append(["- not read", *map(_show_floor, shown)])
        first = next(cells for cells in found if (kind, length, distances[0]) in cells)
        counts = [cell for (of, n, _), cell in first.items() if (of, n) == (kind, length)]
        asked = f"{min(c.passages for c in counts)} to {max(c.passages for c in counts)} passages"
        texts = max(cell.texts for cell in counts)
        title = f"{kind}, {length:,} tokens"
        blocks.append(f"### {title}\n\n{markdown(rows)}\n\n{texts} texts, {asked} a column.")
    blocks.append(
        f"By tokens from a passage to the question: exact ones of the {ASKED} tokens that follow "
        f"the passage's first {GIVEN}, mean log-probability of a token in parentheses, and the "
        "share of the reference's gain in log-probability with its 95 % interval over texts. The "
        f"gain is over what the reference says after the last {FLOOR} tokens alone (not read)."
    )
    return "\n\n".join(blocks)


def _show_copy(cell: CopyCell | None) -> str:
    if cell is None:
        return ""
    text = _show_exact(cell.exact, cell.logprob)
    if cell.gain is None:
        return text
    value, low, high = cell.gain
    interval = f"[{low:.2f}, {high:.2f}]" if cell.texts > 1 else "[-]"
    return f"{text}, {value:.2f}x {interval}"


def _show_floor(cell: CopyCell | None) -> str:
    if cell is None or cell.floor_exact is None or cell.floor_logprob is None:
        return ""
    return _show_exact(cell.floor_exact, cell.floor_logprob)


def _show_exact(exact: Triple, logprob: Triple) -> str:
    return f"{exact[0]:.0%} ({logprob[0]:.2f})"


STREAM_COLUMNS = 8


def stream_table(records: list[Record], reference: Record | None, plan: StreamPlan) -> str:
    """A Markdown table per kind of text: settings by tokens of the stream, and the trend."""
    found = [curves_of(record, reference) for record in records]
    blocks = []
    for kind in dict.fromkeys(kind for by_kind in found for kind in by_kind):
        lines = [(r, c[kind]) for r, c in zip(records, found, strict=True) if kind in c]
        longest = max((curve for _, curve in lines), key=lambda curve: len(curve.nats))
        stops = [point.stop for point in longest.points(STREAM_COLUMNS)]
        rows = [["setting", *(f"{s:,}" for s in stops), "last quarter / first", "per doubling"]]
        for record, curve in lines:
            shown = [_show_point(point) for point in curve.points(STREAM_COLUMNS)]
            shown += [""] * (len(stops) - len(shown))
            trend = curve.trend()
            change = f"{trend.change:.3f}x"
            if trend.low is not None:
                change += f" [{trend.low:.3f}, {trend.high:.3f}]"
            rows.append([record.setting.name, *shown, change, f"{trend.per_doubling:.3f}x"])
        documents = f"{longest.documents} documents, one after the other"
        blocks.append(f"### {kind}\n\n{markdown(rows)}\n\nComposed of {documents}.")
    note = (
        "Perplexity by tokens of the stream up to the column's end"
        + ("" if reference is None else ", and times the reference's on the same tokens")
        + f", blocks of {plan.block:,}"
        + (f", one of {plan.every} measured" if plan.every > 1 else "")
        + ". The trend is of "
        + ("perplexity" if reference is None else "that ratio, where there is one")
        + f". A softmax model sees the {plan.context:,} tokens before each block, read again for "
        "it; a LoLA model has one state from the first token on."
    )
    return "\n\n".join([*blocks, note])


def _show_point(point: Point) -> str:
    text = f"{point.perplexity:,.1f}"
    return text if point.ratio is None else f"{text}, {point.ratio:,.3f}x"


def perplexity_table(records: list[Record], reference: Record | None) -> str:
    """A Markdown table: kinds of text by settings."""
    found = [readings_of(record, reference) for record in records]
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
    return "\n\n".join([markdown(rows), note, *_repeats_table(kinds, found, records)])


def _repeats_table(
    kinds: list[str], found: list[dict[str, Reading]], records: list[Record]
) -> list[str]:
    """A table of what the texts say again, and its note; nothing where they do not."""
    rows = []
    for kind in kinds:
        of_kind = [by_kind[kind].repeats if kind in by_kind else None for by_kind in found]
        known = [recurrence for recurrence in of_kind if recurrence]
        if known:
            windows = max(by_kind[kind].windows for by_kind in found if kind in by_kind)
            cloze = [_show_share(r.cloze, r.cloze_ratio, windows) if r else "" for r in of_kind]
            again = [_show_ratio(r.perplexity[0], r.ratio, windows) if r else "" for r in of_kind]
            rows.append([f"{kind}: cloze", f"{known[0].words}", *cloze])
            rows.append([f"{kind}: repeated", f"{known[0].tokens}", *again])
    if not rows:
        return []
    head = ["said again", "places", *(record.setting.name for record in records)]
    note = (
        f"Places whose last time lies more than {DISTANCE} tokens back. Cloze: share of last words "
        "of sentences predicted whole. Repeated: perplexity of tokens that complete a repeated "
        f"{NGRAM}-gram. Both with times the reference's."
    )
    return [markdown([head, *rows]), note]


_Triple = tuple[float, float, float]


def _show_share(value: _Triple, ratio: _Triple | None, windows: int) -> str:
    return f"{value[0]:.1%}{_show_times(ratio, 2, windows)}"


def _show_ratio(value: float, ratio: _Triple | None, windows: int) -> str:
    return f"{value:.2f}{_show_times(ratio, 3, windows)}"


def _show_times(ratio: _Triple | None, digits: int, windows: int) -> str:
    """A ratio and its interval, which nothing says where one window alone can be resampled."""
    if ratio is None:
        return ""
    value, low, high = (f"{number:.{digits}f}" for number in ratio)
    return f", {value}x [{low}, {high}]" if windows > 1 else f", {value}x [-]"


def _show(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.rate:.0%} [{cell.low:.0%}, {cell.high:.0%}]"
    return text if cell.exact == cell.samples else f"{text} parts {cell.share:.0%}"


def _show_memory(memory: SequenceMemory | None, length: int) -> str:
    if memory is None:
        return "?"
    return f"{memory.bytes_at(length) / MIB:.1f}, {memory.saving_at(length):.1f}x"


def _show_reading(reading: Reading | None) -> str:
    if reading is None:
        return ""
    text = f"{reading.perplexity[0]:.2f}, {reading.bits_per_byte:.3f} b/B"
    return text + _show_times(reading.ratio, 3, reading.windows)


def markdown(rows: list[list[str]]) -> str:
    """A table whose columns also line up as plain text; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])])
