"""Which of vLLM's connectors are accepted, and that each name is one that vLLM has."""

from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.platforms import current_platform

from lola_vllm.engine.vllm import connectors


def config(caching=True, backend="native"):
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            enable_prefix_caching=caching, kv_offloading_backend=backend, kv_offloading_size=1.0
        )
    )


def test_connectors_are_those_of_vllm():
    known = {*connectors.ON_GPU, *connectors.IN_ALIGN_MODE}
    assert known < set(KVConnectorFactory._registry)
    for name in set(KVConnectorFactory._registry) - known:
        assert "not known to move whole states" in connectors.unfit(name, config())


@pytest.mark.parametrize("cpu", [True, False])
def test_what_is_accepted(monkeypatch, cpu):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    assert bool(connectors.unfit("OffloadingConnector", config())) == cpu
    assert connectors.unfit("MooncakeStoreConnector", config()) is None
    assert "--enable-prefix-caching" in connectors.unfit("MooncakeStoreConnector", config(False))
    assert connectors.offloading_connector(config(backend="lmcache")) == "LMCacheMPConnector"
    assert connectors.offloading_connector(config()) == "OffloadingConnector"
