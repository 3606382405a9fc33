"""The options of a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lola_vllm.core.lola_config import LolaConfig

# Options of the second stage, which do not change the result of the first.
FINETUNE = (
    "lora_rows", "lora_row_length", "lora_last_row_length", "lora_rank", "lora_learning_rate",
    "map_learning_rate", "answer_weight", "loss_tokens", "average", "lora_kept", "rows_per_step",
    "gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class DistillOptions:
    """All options except paths. Lengths are in tokens.

    In both stages a row must be so long that pairs are folded in it, for every setting that is
    trained for.

    Attributes:
        retrieval_fraction: share of rows that are synthetic retrieval prompts.
        seed: of the order of rows and all else that is drawn.
        dtype: of the base's weights while training.
        window_factor_rate: learning rate of the window factors, as a multiple of that of the
            feature maps.
        rows: of stage 1, attention transfer; one pass is made over them in every layer.
        row_length: tokens of a row.
        learning_rate: AdamW's, falling to zero along half a cosine within each layer.
        steps_per_row: optimizer steps on each row.
        queries_per_step: query tokens that a step compares.
        lora_rows: of stage 2, LoRA; 0 leaves the stage out.
        lora_row_length: tokens of a row.
        lora_last_row_length: tokens of the last row, to which rows grow by doubling, with as many
            tokens of each length; 0: all rows are alike.
        lora_rank: of the adapters on q, k, v and o.
        lora_learning_rate: AdamW's for the adapters, after a warm-up falling to a tenth.
        map_learning_rate: for the maps, which are trained on; 0 freezes them.
        answer_weight: of the tokens of synthetic answers.
        loss_tokens: tokens of a row, drawn at random, whose predictions are compared, besides those
            of synthetic answers; 0: all.
        average: share of the steps, the last ones, after which the weights are taken; their mean is
            the result. 0: the weights after the last step.
        lora_kept: share of what the adapters add to the weights that the result keeps.
        rows_per_step: rows whose gradients make a step.
        gradient_checkpointing: compute activations twice, for less memory.
        lola_config: the parameters of the checkpoint, and those trained for.
        state_heads: "kv" (Hs = Hkv) or "query" (Hs = Hq).
        train_windows, train_sparse_caches: train for every combination of these sizes instead, so
            that they can be chosen later.
    """

    retrieval_fraction: float = 0.25
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    window_factor_rate: float = 10.0

    rows: int = 256
    row_length: int = 2048
    learning_rate: float = 3e-2
    steps_per_row: int = 7
    queries_per_step: int = 512

    lora_rows: int = 512
    lora_row_length: int = 1024
    lora_last_row_length: int = 0
    lora_rank: int = 16
    lora_learning_rate: float = 2e-3
    map_learning_rate: float = 3e-3
    answer_weight: float = 4.0
    loss_tokens: int = 0
    average: float = 0.5
    lora_kept: float = 1.0
    rows_per_step: int = 2
    gradient_checkpointing: bool = False

    lola_config: Mapping[str, Any] = field(default_factory=dict)
    state_heads: str = "kv"
    train_windows: tuple[int, ...] = ()
    train_sparse_caches: tuple[int, ...] = ()

    @property
    def lora_alpha(self) -> int:
        """The adapters' scale is this over their rank: 2, as LoLCATs trains."""
        return 2 * self.lora_rank

    def lora_lengths(self) -> list[tuple[int, int]]:
        """Tokens of a row of stage 2 and the number of such rows, in the order of training.

        Raises:
            CheckpointError: a last length that doubling does not reach, or too few rows.
        """
        from lola_vllm.models.files import CheckpointError

        length, last = self.lora_row_length, self.lora_last_row_length
        if not last:
            return [(length, self.lora_rows)]
        doublings = (last // length).bit_length() - 1
        if last < length or length << doublings != last:
            raise CheckpointError(
                f"lora_last_row_length = {last}: must be lora_row_length = {length} times a power "
                f"of two, such as {length << max(doublings, 1)}"
            )
        parts = 2 ** (doublings + 1) - 1  # twice as long rows are half as many
        counts = [self.lora_rows * 2**i // parts for i in range(doublings + 1)][::-1]
        if not counts[-1]:
            raise CheckpointError(
                f"lora_rows = {self.lora_rows}: rows that grow from {length} to {last} tokens are "
                f"{parts} or more"
            )
        counts[0] += self.lora_rows - sum(counts)
        return [(length << i, count) for i, count in enumerate(counts)]

    @property
    def lora_tokens(self) -> int:
        """Tokens that stage 2 reads."""
        return sum(length * number for length, number in self.lora_lengths())

    def configs(self) -> list[LolaConfig]:
        """The settings to train for."""
        from lola_vllm.core.lola_config import LolaConfig

        own = LolaConfig(**self.lola_config)
        sizes = self.train_sparse_caches or (own.sparse_cache_size,)
        return [
            LolaConfig(**{**self.lola_config, "window_size": window, "sparse_cache_size": lam})
            for window in self.train_windows or [own.window_size]
            for lam in sizes
        ]
