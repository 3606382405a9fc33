"""The options of a distillation: every field with its default and its help text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lola_vllm.core.cli_options import option

if TYPE_CHECKING:
    from lola_vllm.core.config import LolaConfig

# Parts of the options. Options of the second stage do not change the result of the first.
TRANSFER, FINETUNE, LOLA = "transfer", "finetune", "lola"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


@dataclass(frozen=True)
class DistillOptions:
    """All options except paths. Lengths are in tokens.

    Attributes:
        lola_config: the parameters of the checkpoint, and those trained for.
        state_heads: "kv" (Hs = Hkv) or "query" (Hs = Hq).
        train_windows, train_sparse_caches: train for every combination of these sizes instead.
        The others: see their help. In both stages a row must be so long that pairs are folded in
            it, for every setting trained for.
    """

    retrieval_fraction: float = option("share of rows that are synthetic retrieval prompts", 0.25)
    seed: int = option("of the order of rows and all else that is drawn", 0)
    dtype: Literal["bfloat16", "float32"] = option(
        "of the base's weights while training", "bfloat16"
    )
    window_factor_rate: float = option(
        "learning rate of the window factors, as a multiple of that of the feature maps", 10.0
    )

    rows: int = option(
        "rows of tokens; one pass is made over them in every layer", 256, part=TRANSFER
    )
    row_length: int = option("tokens of a row", 2048, part=TRANSFER)
    learning_rate: float = option(
        "AdamW's, falling to zero along half a cosine within each layer", 3e-2, part=TRANSFER
    )
    steps_per_row: int = option("optimizer steps on each row", 7, part=TRANSFER)
    queries_per_step: int = option("query tokens that a step compares", 512, part=TRANSFER)

    lora_rows: int = option("rows of tokens; 0 leaves the stage out", 512, part=FINETUNE)
    lora_row_length: int = option("tokens of a row", 1024, part=FINETUNE)
    lora_last_row_length: int = option(
        "tokens of the last row, to which rows grow by doubling, with as many tokens of each "
        "length; 0: all rows are alike",
        0,
        part=FINETUNE,
    )
    lora_rank: int = option("rank of the adapters on q, k, v and o", 16, part=FINETUNE)
    lora_learning_rate: float = option(
        "AdamW's for the adapters, after a warm-up falling to a tenth", 2e-3, part=FINETUNE
    )
    map_learning_rate: float = option(
        "for the maps, which are trained on; 0 freezes them", 3e-3, part=FINETUNE
    )
    answer_weight: float = option("weight of the tokens of synthetic answers", 4.0, part=FINETUNE)
    loss_tokens: int = option(
        "tokens of a row, drawn at random, whose predictions are compared, besides those of "
        "synthetic answers; 0: all",
        0,
        part=FINETUNE,
    )
    average: float = option(
        "share of the steps, the last ones, after which the weights are taken; their mean is the "
        "result. 0: the weights after the last step",
        0.5,
        part=FINETUNE,
    )
    lora_kept: float = option(
        "share of what the adapters add to the weights that the result keeps", 1.0, part=FINETUNE
    )
    rows_per_step: int = option("rows whose gradients make a step", 2, part=FINETUNE)
    gradient_checkpointing: bool = option(
        "compute activations twice, for less memory", False, part=FINETUNE
    )

    lola_config: Mapping[str, Any] = field(default_factory=dict)
    state_heads: str = "kv"
    train_windows: Sequence[int] = option(
        "train for each of these, so that the window size can be chosen later",
        (),
        part=LOLA,
        type=_numbers,
        metavar="N,N",
    )
    train_sparse_caches: Sequence[int] = option(
        "train for each of these, so that the sparse cache size can be chosen later",
        (),
        part=LOLA,
        type=_numbers,
        metavar="N,N",
    )

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
        from lola_vllm.core.config import LolaConfig

        own = LolaConfig(**self.lola_config)
        sizes: Sequence[Any] = self.train_sparse_caches or [own.sparse_cache_size]
        return [
            LolaConfig(**{**self.lola_config, "window_size": window, "sparse_cache_size": lam})
            for window in self.train_windows or [own.window_size]
            for lam in sizes
        ]
