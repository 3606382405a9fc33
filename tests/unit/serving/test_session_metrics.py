"""lola:session_* say what the store says, and counters only grow."""

from prometheus_client import CollectorRegistry

from lola_vllm.serving.session_metrics import COUNTERS, GAUGES, SessionMetrics
from tests.support.sessions import Server, size_of

LABELS = {"model_name": "m", "engine": "0"}


def test_what_the_store_counts_is_told(tmp_path):
    registry = CollectorRegistry()
    metrics = SessionMetrics(LABELS, registry=registry)
    server = Server(tmp_path, memory=3 * size_of(100), disk=1000 * size_of(100))

    def value(name, **labels):
        return registry.get_sample_value(f"lola:{name}", {**LABELS, **labels})

    for n in range(5):
        server.say([n] * 100)
    server.settle()
    assert server.restore([4] * 101) == 100 and server.restore([0] * 101) == 100
    server.store.directory.path.rename(tmp_path / "gone")
    server.tell([9] * 100)
    metrics.update(server.manager.stats())
    metrics.update(server.manager.stats())
    assert value("session_count") == value("session_states") == 6
    assert value("session_bytes", tier="memory") == 3 * size_of(100)
    assert value("session_budget_bytes", tier="disk") == 1000 * size_of(100)
    assert value("session_loads_total", tier="memory") == 1
    assert value("session_loads_total", tier="disk") == 1
    assert value("session_saves_total", tier="memory") == 6
    assert value("session_load_seconds_total", tier="disk") > 0
    assert value("session_evictions_total", tier="memory") == 4
    assert value("session_failures_total", reason="io") == 1
    before = value("session_saves_total", tier="memory")
    metrics.update(Server().manager.stats())  # an engine that was started anew
    assert value("session_saves_total", tier="memory") == before
    assert value("session_count") == 0
    assert all(f"lola:{name}" in registry._names_to_collectors for name in (*GAUGES, *COUNTERS))
    server.close()
