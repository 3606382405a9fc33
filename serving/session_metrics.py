"""The Prometheus metrics lola:session_*: what the store of states holds, gives and loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.samples import Sample

from lola_vllm.memory.sessions.orders import DISK, FAULTS, MEMORY

Stats = dict[str, Any]

# Name without "lola:" -> (help, label or None, label value -> number, or the number under None).
Read = Callable[[Stats], dict[str | None, float]]
TIERS = (MEMORY, DISK)


def _tiers(kind: str, name: str) -> Read:
    return lambda stats: {tier: stats[kind].get(f"{name}-{tier}", 0) for tier in TIERS}


GAUGES: dict[str, tuple[str, str | None, Read]] = {
    "session_count": ("Sessions that are stored", None, lambda stats: {None: stats["sessions"]}),
    "session_states": ("States that are stored", None, lambda stats: {None: stats["states"]}),
    "session_bytes": ("Bytes of stored states", "tier", lambda stats: stats["bytes"]),
    "session_budget_bytes": ("Most bytes of stored states", "tier", lambda stats: stats["budget"]),
}
COUNTERS: dict[str, tuple[str, str | None, Read]] = {
    "session_hits": (
        "Requests that started from a stored state",
        None,
        lambda stats: {None: stats["counts"].get("hits", 0)},
    ),
    "session_restored_tokens": (
        "Prompt tokens not computed because a stored state covered them",
        None,
        lambda stats: {None: stats["counts"].get("restored-tokens", 0)},
    ),
    "session_loads": ("States loaded, of all ranks", "tier", _tiers("counts", "loaded")),
    "session_load_seconds": ("Seconds of loads", "tier", _tiers("seconds", "loaded")),
    "session_saves": ("States saved, of all ranks", "tier", _tiers("counts", "saved")),
    "session_save_seconds": ("Seconds of saves", "tier", _tiers("seconds", "saved")),
    "session_evictions": ("States that left for others", "tier", _tiers("counts", "evicted")),
    "session_failures": (
        "States that could not be saved or loaded",
        "reason",
        # With 0 from the start: the first failure would not be seen as an increase otherwise.
        lambda stats: {fault: stats["failures"].get(fault, 0) for fault in FAULTS},
    ),
}


class _Counter(Counter):
    """A counter without the series of its creation time.

    Prometheus' client can omit that series only for all metrics of a process, including vLLM's.
    """

    def _child_samples(self) -> Iterable[Sample]:
        return [sample for sample in super()._child_samples() if sample.name != "_created"]


class SessionMetrics:
    """The metrics of one API server.

    Args:
        labels: of every series.
    """

    def __init__(
        self,
        labels: dict[str, str],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._labels = labels
        self._gauges = {
            name: Gauge(
                f"lola:{name}",
                text,
                (*labels, *([label] if label else [])),
                registry=registry,
                multiprocess_mode="mostrecent",
            )
            for name, (text, label, _) in GAUGES.items()
        }
        self._counters = {
            name: _Counter(
                f"lola:{name}", text, (*labels, *([label] if label else [])), registry=registry
            )
            for name, (text, label, _) in COUNTERS.items()
        }
        self._seen: dict[tuple[str, str | None], float] = {}

    def update(self, stats: Stats) -> None:
        """Take over what `SessionManager.stats` returned."""
        for name, (_, label, read) in GAUGES.items():
            for value, number in read(stats).items():
                self._of(self._gauges[name], label, value).set(number)
        for name, (_, label, read) in COUNTERS.items():
            for value, number in read(stats).items():
                before = self._seen.get((name, value), 0)
                # Of an engine that was started anew the count begins again.
                self._of(self._counters[name], label, value).inc(
                    number - before if number >= before else number
                )
                self._seen[name, value] = number

    def _of(self, metric: Any, label: str | None, value: str | None) -> Any:
        more = {label: value} if label else {}
        return metric.labels(**self._labels, **more)
