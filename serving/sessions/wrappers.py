"""What is put in front of the engine client's `generate`, the one method that all routes which
generate call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lola_vllm.serving.sessions.composed_start import composing
from lola_vllm.serving.sessions.owners import with_owners
from lola_vllm.serving.sessions.prefix_sharing import PrefixSharing
from lola_vllm.serving.sessions.reporting import Generate, with_report
from lola_vllm.serving.sessions.request_params import checking_params

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from lola_vllm.serving.engine import LolaEngine


def wrap_generate(
    client: EngineClient,
    shares: bool = False,
    stores: bool = False,
    engine: LolaEngine | None = None,
) -> None:
    """Replace `client.generate`, which then also does what the modules named here are for.

    Args:
        shares: whether prompts with a prefix in common share stored states (`prefix_sharing.py`).
        stores: whether there is a store, of which requests can ask what it refuses
            (`request_params.py`).
        engine: that has the store, of whose sessions several are composed for a request
            (`composed_start.py`); None: for none.
    """
    generate: Generate = client.generate
    if shares:
        generate = PrefixSharing(generate).generate
    if stores:
        generate = checking_params(generate)
    if engine is not None:
        generate = composing(generate, engine)
    generate = with_report(with_owners(generate, stores))
    client.generate = generate  # type: ignore[method-assign,assignment]
