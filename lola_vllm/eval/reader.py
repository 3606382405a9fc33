"""A model directory in transformers that reads a stream in pieces, its state carried over.

vLLM has one request per sequence and keeps what it says of every token of a prompt until the last
one is read. Here a stream of any length takes the memory of one piece. The ops are those that serve
(`lola_vllm.hf`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lola_vllm.eval import EvalError
from lola_vllm.eval.models import LocalTokenizer, Prediction, Tokenizer
from lola_vllm.eval.settings import Setting

PIECE = 512  # tokens of a forward; their logits take a row of the vocabulary each


class Reader:
    """See `stream.StreamModel`.

    Args:
        setting: model directory and LoLA parameters.
        context: tokens that a softmax model sees before each block.
        dtype: "float32", "bfloat16" and so on, or "auto" for the checkpoint's own.

    Raises:
        EvalError: the model cannot be loaded.
    """

    def __init__(self, setting: Setting, context: int, dtype: str) -> None:
        self.tokenizer: Tokenizer = LocalTokenizer(setting.model)
        self.is_lola, self.context = setting.is_lola, context
        self._model = load(setting, dtype)
        self.dtype = str(self._model.dtype).removeprefix("torch.")

    def read_blocks(
        self, opening: list[int], ids: list[int], block: int, wanted: Collection[int]
    ) -> Iterator[tuple[int, list[Prediction]]]:
        """See `stream.StreamModel.read_blocks`."""
        run = Run(self._model)
        run.read(opening)
        for index in range(max(wanted) + 1):
            start, stop = index * block, (index + 1) * block
            if not self.is_lola:
                if index not in wanted:
                    continue
                run = Run(self._model)
                run.read(opening + ids[max(0, start - self.context) : start])
            if index in wanted:
                yield index, run.predict(ids[start:stop])
            else:
                run.read(ids[start:stop])


class Run:
    """One sequence of a model, which goes on with every call.

    Attributes:
        cache: its LoLA state, or its keys and values. seen: tokens read.
    """

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        from lola_vllm.config import MODEL_TYPE
        from lola_vllm.hf import LolaCache

        self._model = model
        is_lola = model.config.model_type == MODEL_TYPE
        self.cache: Any = LolaCache(model.config) if is_lola else DynamicCache()
        self.seen = 0
        self._next: Tensor | None = None  # [V], logits of the token that comes next

    def read(self, ids: list[int]) -> None:
        """Read tokens without saying how well they are predicted."""
        for at in range(0, len(ids), PIECE):
            self._next = self._forward(ids[at : at + PIECE], 1)[-1]

    def predict(self, ids: list[int]) -> list[Prediction]:
        """Read tokens; a prediction of each, but for the first one of a sequence."""
        found: list[Prediction] = []
        for at in range(0, len(ids), PIECE):
            piece = ids[at : at + PIECE]
            logits = self._forward(piece, 0)
            before = logits[:-1]
            targets = torch.tensor(piece[1:], device=logits.device)
            if self._next is not None:
                before = torch.cat([self._next[None], before])
                targets = torch.tensor(piece, device=logits.device)
            # A copy, or the next piece would keep all logits of this one.
            self._next = logits[-1].clone()
            found += _predictions(before.float(), targets)
        return found

    def copy(self) -> Run:
        """Another sequence that has read the same so far."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def answer(self, tokens: int) -> list[int]:
        """The most likely `tokens` tokens from here on, which are read as well.

        Raises:
            ValueError: nothing was read.
        """
        if self._next is None:
            raise ValueError("nothing was read that an answer could follow")
        found: list[int] = []
        for _ in range(tokens):
            found.append(int(self._next.argmax()))
            self.read(found[-1:])
        return found

    @torch.no_grad()
    def _forward(self, ids: list[int], keep: int) -> Tensor:
        """Logits `[len(ids) or keep, V]`."""
        row = torch.tensor([ids], device=self._model.device)
        output = self._model(row, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        self.seen += len(ids)
        logits: Tensor = output.logits[0]
        return logits


def _predictions(logits: Tensor, targets: Tensor) -> list[Prediction]:
    logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    first = logits.argmax(-1) == targets
    return [Prediction(*pair) for pair in zip(logprobs.tolist(), first.tolist(), strict=True)]


def load(setting: Setting, dtype: str) -> Any:
    """A model with the setting's parameters, on the GPU if there is one.

    Raises:
        EvalError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import lola_vllm.hf  # noqa: F401  (makes transformers know LoLA models)

    try:
        config = AutoConfig.from_pretrained(
            setting.model, local_files_only=True, trust_remote_code=False
        )
        if setting.lola_config:
            config.lola_config = setting.lola_config
        if setting.positions is not None:
            config.max_position_embeddings = setting.positions
        model: Any = AutoModelForCausalLM.from_pretrained(
            setting.model, config=config, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EvalError(f"{setting.model}: transformers cannot load it ({error})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
