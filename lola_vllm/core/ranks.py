"""How tensor-parallel ranks divide the heads of a model."""

from __future__ import annotations

from lola_vllm.core.lola_config import LolaConfig, LolaConfigError


def heads_divide(ranks: int, num_heads: int, num_kv_heads: int, num_state_heads: int) -> bool:
    """Whether ranks can divide the heads, as vLLM divides them.

    There may be more ranks than KV heads. Several ranks then hold the same KV head and its state
    head.
    """
    shared = ranks % num_kv_heads == 0
    return (
        num_heads % ranks == 0
        and (num_kv_heads % ranks == 0 or shared)
        and (num_state_heads % ranks == 0 or (shared and num_state_heads == num_kv_heads))
    )


def check_ranks(config: LolaConfig, ranks: int, num_kv_heads: int, num_state_heads: int) -> None:
    """Raise `LolaConfigError` if ranks would split the state heads that share a sparse set.

    Each rank would choose pairs by the mean over its own heads alone. Answers would then depend on
    the number of ranks.
    """
    shared = config.sparse_sharing == "kv_head" and num_state_heads != num_kv_heads
    if shared and num_kv_heads % ranks:
        raise LolaConfigError(
            "lola_config.sparse_sharing = 'kv_head': the state heads of a KV head choose "
            f"their sparse set together, and {ranks} tensor-parallel ranks would part them "
            f"({num_state_heads} state heads, {num_kv_heads} KV heads); use a "
            f"tensor-parallel size that divides {num_kv_heads}, or sparse_sharing = 'none'"
        )
