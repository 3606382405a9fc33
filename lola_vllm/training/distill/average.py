"""The mean of the weights along a run of stage 2.

Steps of a run lie around what they approach, and their mean is nearer to it than the last one is
(stochastic weight averaging, arXiv 1803.05407). Adapters of one run share their beginning, so the
mean of their factors stands for the mean of their products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lola_vllm.models.files import CheckpointError

_PREFIX = "average."


class RunningMean:
    """The mean of tensors over the last steps of a run.

    Args:
        share: of the steps, from 0 to 1; above 0 at least the last step counts.
        steps: of the run.

    Attributes:
        first: the first step that counts, from 0; `steps` if none does.
        tensors: the mean so far by name, float32 on the CPU; empty before `first`.

    Raises:
        CheckpointError: `share` is out of range.
    """

    def __init__(self, share: float, steps: int) -> None:
        if not 0 <= share <= 1:
            raise CheckpointError(f"average = {share:g}: must be from 0 to 1")
        self.first = steps - (max(1, round(share * steps)) if share else 0)
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take in the weights after a step; steps come in order, each once."""
        if step < self.first:
            return
        count = step - self.first + 1
        for name, value in tensors.items():
            new = value.detach().float().cpu()
            if count == 1:
                self.tensors[name] = new.clone()
            else:
                self.tensors[name] += (new - self.tensors[name]) / count

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of those of these tensors that have one, the others as they are."""
        return {name: self.tensors.get(name, value) for name, value in tensors.items()}

    def saved(self) -> dict[str, Tensor]:
        """The mean under the names of a training state."""
        return {_PREFIX + name: value for name, value in self.tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `saved` gave."""
        self.tensors = {
            name.removeprefix(_PREFIX): value
            for name, value in state.items()
            if name.startswith(_PREFIX)
        }
