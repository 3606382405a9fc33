"""Registration: cheap, repeatable, never in the way of other models."""

import inspect
import logging
import queue
import select
from types import SimpleNamespace

import pytest
import zmq

from lola_vllm.engine.vllm import compat
from lola_vllm.engine.vllm.compat import SUPPORTED, UnsupportedVllmError, check_vllm_version


def test_registering_twice_does_no_harm_and_keeps_vllms_own_specs():
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST

    import lola_vllm.engine.vllm.cache

    lola_vllm.register()
    lola_vllm.register()
    assert "LolaLlamaForCausalLM" in ModelRegistry.get_supported_archs()
    assert "LOLA" in MambaAttentionBackendEnum.__members__
    names = [spec.__name__ for spec in _REGISTRY_KVCACHESPEC_LIST]
    assert {"FullAttentionSpec", "MambaSpec"} <= set(names) and names.count("LolaStateSpec") == 1


def test_a_busy_reader_of_vllms_queue_looks_at_its_wake_ups():
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    if hasattr(shm_broadcast, "SHM_NOTIFY_POLL_INTERVAL_S"):
        pytest.skip("this vLLM looks by itself")
    compat.look_at_wake_ups()
    compat.look_at_wake_ups()  # as a second `register()` does
    path = get_open_zmq_ipc_path()
    with zmq.Context() as mine, zmq.Context() as theirs:
        writer = SpinCondition(False, theirs, path)
        reader = SpinCondition(True, mine, path)
        socket = reader.local_notify_socket
        while not socket.poll(10):  # a wake-up sent before they are connected is lost
            writer.notify()
        while socket.poll(500):
            socket.recv()
        writer.notify()
        # Its descriptor is readable while libzmq holds what the socket has not looked at.
        assert select.select([socket.FD], [], [], 30)[0]
        for _ in range(compat.READS_PER_LOOK - 1):
            reader.record_read()
        assert select.select([socket.FD], [], [], 0)[0]
        reader.record_read()
        assert not select.select([socket.FD], [], [], 0)[0]
        reader.last_read -= 10  # idle: now the wake-up that it kept ends the wait
        reader.wait(timeout_ms=None)
        assert not socket.poll(0)
        mine.destroy(linger=0)
        theirs.destroy(linger=0)


def test_versions_that_are_not_supported_are_named_with_the_range():
    for version in ("0.32.0", "0.32.0+cpu", "0.32.1", "0.33.0"):
        check_vllm_version(version)
    for version in ("0.31.0", "0.34.0", "1.0"):
        with pytest.raises(UnsupportedVllmError) as error:
            check_vllm_version(version)
        assert version in str(error.value) and str(SUPPORTED) in str(error.value)


def test_an_unsupported_version_is_logged_and_breaks_no_other_model(monkeypatch, caplog):
    import vllm

    import lola_vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    lola_vllm.register()
    assert "lola-vllm is not active: lola-vllm supports vLLM" in caplog.text
    assert "0.99.0" in caplog.text


@pytest.mark.parametrize(("version", "warned"), [("0.32.1+cpu", False), ("0.33.0", True)])
def test_an_untested_version_is_said_to_be_one(monkeypatch, caplog, version, warned):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    compat.warn_of_untested_vllm()
    assert (f"vLLM {version} has not been tested with this lola-vllm" in caplog.text) == warned


@pytest.mark.parametrize(("value", "warned"), [("0", False), ("1", True)])
def test_a_server_in_rust_is_said_to_lack_the_routes(monkeypatch, caplog, value, warned):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    compat.warn_of_rust_frontend()
    assert ("so the routes under /v1/lola" in caplog.text) == warned


def test_an_idle_engine_is_woken_by_a_message():
    """In vLLM's own queue; an engine in this process has none, and looks by itself."""
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    assert "self.input_queue = queue.Queue" in inspect.getsource(EngineCoreProc.__init__)
    engine = SimpleNamespace(input_queue=queue.Queue())
    compat.wake(engine)
    assert engine.input_queue.get_nowait() == (EngineCoreRequestType.WAKEUP, None)
    compat.wake(object.__new__(EngineCore))


def test_a_vllm_that_looks_at_its_wake_ups_is_left_alone(monkeypatch):
    from vllm.distributed.device_communicators import shm_broadcast

    class Reader:
        def record_read(self):
            pass

    record_read = Reader.record_read
    monkeypatch.setattr(shm_broadcast, "SpinCondition", Reader)
    monkeypatch.setattr(shm_broadcast, "SHM_NOTIFY_POLL_INTERVAL_S", 2.0, raising=False)
    compat.look_at_wake_ups()
    assert Reader.record_read is record_read
