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


def test_every_connector_of_vllm_has_an_answer():
    known = {*connectors._REASONS, *connectors.ON_GPU, *connectors.IN_ALIGN_MODE}
    registry = set(KVConnectorFactory._registry)
    assert known - {"P2pNcclConnector"} <= registry
    for name in registry - known:
        assert "not known to move whole states" in connectors.unfit(name, config())


@pytest.mark.parametrize("cpu", [True, False])
def test_what_is_accepted(monkeypatch, cpu):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    assert bool(connectors.unfit("OffloadingConnector", config())) == cpu
    assert connectors.unfit("MooncakeStoreConnector", config()) is None
    assert "--enable-prefix-caching" in connectors.unfit("MooncakeStoreConnector", config(False))
    assert "convolution" in connectors.unfit("NixlConnector", config())
    lmcache = connectors.offloading_connector(config(backend="lmcache"))
    assert "hybrid memory" in connectors.unfit(lmcache, config())
    assert connectors.offloading_connector(config()) == "OffloadingConnector"
