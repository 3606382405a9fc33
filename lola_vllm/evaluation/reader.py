"""A model directory in transformers that reads a text in pieces, its state carried over.

vLLM has one request per sequence and keeps what it says of every token of a prompt until the last
one is read. Here a text of any length takes the memory of one piece, and several questions are
asked from one state. The ops are those that serve (`lola_vllm.engine.hf`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.ablation import leave_out
from lola_vllm.evaluation.models import Answers, Prediction, Stop, Tokenizer
from lola_vllm.evaluation.settings import Setting

PIECE = 512  # tokens of a forward; their logits take a row of the vocabulary each


class Reader:
    """A model that reads streams, and that is asked several questions from one state.

    Args:
        setting: model directory and LoLA parameters.
        dtype: "float32", "bfloat16" and so on, or "auto" for the checkpoint's own.
        batch: questions at once.

    Attributes:
        tokenizer, dtype: the model's.

    Raises:
        EvalError: the model cannot be loaded.
    """

    def __init__(self, setting: Setting, dtype: str, batch: int = 8) -> None:
        self.tokenizer = Tokenizer(setting.model)
        self.is_lola, self.batch = setting.is_lola, batch
        self._model = load(setting, dtype)
        if setting.without:
            leave_out(self._model, setting.without)
        self.dtype = str(self._model.dtype).removeprefix("torch.")

    def read_blocks(
        self, prefix: list[int], ids: list[int], block: int, context: int, wanted: Collection[int]
    ) -> Iterator[tuple[int, list[Prediction]]]:
        """How well the tokens of some blocks of a stream are predicted.

        Args:
            prefix: tokens before the stream, which are not predicted.
            ids: of the stream, a multiple of `block` tokens.
            context: tokens that a softmax model sees before each block. wanted: numbers of blocks.

        Yields:
            Each wanted block's number and a prediction per token, in order. Without a prefix the
            stream's first token has none.
        """
        run = Run(self._model)
        run.read(prefix)
        for index in range(max(wanted) + 1):
            start, stop = index * block, (index + 1) * block
            if not self.is_lola:
                if index not in wanted:
                    continue
                run = Run(self._model)
                run.read(prefix + ids[max(0, start - context) : start])
            if index in wanted:
                yield index, run.predict(ids[start:stop])
            else:
                run.read(ids[start:stop])

    def ask(self, ids: list[int], stops: Sequence[Stop], floor: int = 0) -> list[Answers]:
        """How well right answers are predicted, stop by stop.

        A softmax model sees of a text as many tokens as its positions leave room for, the last.

        Args:
            ids: of the text. stops: ascending places in it, with their questions.
            floor: tokens before a stop after which a softmax model is asked too; 0: it is not.
        """
        at = 0
        if not self.is_lola:
            longest = max((len(q) for stop in stops for q, _ in stop.questions), default=0)
            at = max(0, stops[-1].at - self._model.config.max_position_embeddings + longest)
        run, begin = Run(self._model), at
        found = []
        for stop in stops:
            run.read(ids[at : stop.at])
            at = stop.at
            alone = None
            if floor and not self.is_lola:
                last = Run(self._model)
                last.read(ids[max(0, at - floor) : at])
                alone = last.ask(stop.questions, self.batch)
            found.append(Answers(run.ask(stop.questions, self.batch), alone, at - begin))
        return found


class Run:
    """One sequence of a model, which goes on with every call.

    Args:
        model: of `load`.

    Attributes:
        cache: its LoLA state, or its keys and values.
    """

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        from lola_vllm.core.model_types import MODEL_TYPE
        from lola_vllm.engine.hf import LolaCache

        self._model = model
        is_lola = model.config.model_type == MODEL_TYPE
        self.cache: Any = LolaCache(model.config) if is_lola else DynamicCache()
        # A softmax model is asked alone: keys and values of a long text are too large for copies.
        self._forks = is_lola
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

    def ask(self, questions: list[tuple[list[int], int]], batch: int) -> list[list[Prediction]]:
        """How well the answer at the end of each question is predicted, if it came next.

        The sequence stays as it is.

        Args:
            questions: see `Stop`. batch: questions of equally many tokens at once.
        """
        found: list[list[Prediction]] = []
        size = batch if self._forks else 1
        for (_, last), same in itertools.groupby(questions, lambda one: (len(one[0]), one[1])):
            rows = [ids for ids, _ in same]
            for at in range(0, len(rows), size):
                part = torch.tensor(rows[at : at + size], device=self._model.device)
                for logits, ids in zip(self._ask_rows(part, last), part, strict=True):
                    found.append(_predictions(logits.float(), ids[-last:]))
        return found

    @torch.no_grad()
    def _ask_rows(self, questions: Tensor, last: int) -> Tensor:
        """Logits `[B, last, V]` of questions `[B, Q]`, each with a copy of the state."""
        if self._forks:
            fork = self.cache.fork(len(questions))
        else:  # forwards replace the keys and values of a softmax model
            fork = copy.copy(self.cache)
            fork.layers = [copy.copy(layer) for layer in self.cache.layers]
        output = self._model(
            questions, past_key_values=fork, use_cache=True, logits_to_keep=last + 1
        )
        logits: Tensor = output.logits[:, :-1]
        return logits

    @torch.no_grad()
    def _forward(self, ids: list[int], keep: int) -> Tensor:
        """Logits `[len(ids) or keep, V]`."""
        row = torch.tensor([ids], device=self._model.device)
        output = self._model(row, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
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

    import lola_vllm.engine.hf  # noqa: F401  (makes transformers know LoLA models)

    try:
        config = AutoConfig.from_pretrained(
            setting.model, local_files_only=True, trust_remote_code=False
        )
        if setting.lola_config:
            config.lola_config = setting.lola_config
        model: Any = AutoModelForCausalLM.from_pretrained(
            setting.model, config=config, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EvalError(f"{setting.model}: transformers cannot load it ({error})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
