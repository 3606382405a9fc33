"""Stage 2: train LoRA adapters and the maps, so that the whole model answers as its teacher.

LoLCATs (arXiv 2410.10254, section 3.2) fine-tunes with the next-token loss. The loss here is the
divergence from the teacher's distribution, which has far more information per token. The teacher is
the same model with adapters and LoLA switched off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.models.files import CheckpointError
from lola_vllm.training.distill.average import RunningMean
from lola_vllm.training.distill.data import TrainingRows
from lola_vllm.training.distill.loss import token_loss
from lola_vllm.training.distill.options import DistillOptions
from lola_vllm.training.distill.state import read_state, write_state
from lola_vllm.training.distill.student import (
    all_maps,
    decoder_layers,
    load_maps,
    lola_attention,
    map_groups,
    scale_rates,
)

STATE = "finetune"
SAVE_EVERY = 10  # steps between two training states


class Finetuned(NamedTuple):
    """The results of stage 2.

    Attributes:
        adapters: LoRA matrices under PEFT's names, float32; with `average`, their mean. The B are
            scaled by `lora_kept`.
        maps: feature maps and window factors under the names of a LoLA checkpoint, likewise.
        losses: of each step.
    """

    adapters: dict[str, Tensor]
    maps: dict[str, Tensor]
    losses: list[float]


def finetune(
    model: Any,
    parts: Sequence[TrainingRows],
    work: Path,
    options: DistillOptions,
    *,
    fingerprint: str,
    start: Mapping[str, Tensor] | None = None,
) -> Finetuned:
    """Train adapters on a model whose maps are trained.

    Args:
        model: from `load_base`, with maps; it is wrapped by PEFT and changed in place.
        parts: rows of token ids, and which tokens `answer_weight` is for. The rows of a part are
            trained on in an order that is drawn, and parts one after the other.
        work: directory of the training state, from which an interrupted run continues.
        options: of stage 2; each row draws one of their `configs`.
        fingerprint: of everything that the result depends on.
        start: adapters to begin with, under PEFT's names; None: those that add nothing.

    Raises:
        CheckpointError: a training state of another run, one that cannot be written, adapters
            to begin with that do not fit, a loss that is not finite, or an `average` out of range.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(options.seed)
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        target_modules=_targets(model),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # the base has no dropout that this could switch on, see _no_dropout
        _no_dropout(model)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    if start is not None:
        _begin_with(adapters, start)
    groups: list[dict[str, Any]] = [
        {"params": list(adapters.values()), "lr": options.lora_learning_rate}
    ]
    if options.map_learning_rate > 0:
        groups += map_groups(
            decoder_layers(model), options.map_learning_rate, options.window_factor_rate
        )
        for value in (value for group in groups[1:] for value in group["params"]):
            value.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = _in_order(parts, options.seed)
    steps = max(1, len(rows) // options.rows_per_step)
    mean = RunningMean(options.average, steps)

    configs = options.configs()
    losses: list[float] = []
    state = read_state(work, STATE, fingerprint)
    if state:
        losses = list(state.meta["losses"])
        _restore(model, adapters, optimizer, state.tensors)
        mean.restore(state.tensors)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    lengths = [len(tokens) for tokens, _ in rows]
    done = sum(lengths[: len(losses) * options.rows_per_step])
    # By tokens, as rows may differ in length.
    with tqdm(total=sum(lengths), initial=done, unit="tok", unit_scale=True, desc="LoRA") as bar:
        for step in range(len(losses), steps):
            # A generator per step, so that a resumed run draws what an uninterrupted one would.
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
            optimizer.zero_grad()
            total = 0.0
            first = step * options.rows_per_step
            for tokens, answers in rows[first : first + options.rows_per_step]:
                config = configs[int(torch.randint(len(configs), (), generator=generator))]
                compared = _compared(answers, options.loss_tokens, generator)
                loss = _loss(
                    model, tokens.to(model.device), answers, compared,
                    config, options,
                )  # fmt: skip
                # Gradient checkpointing computes activations again, with the same attention.
                with lola_attention(model, config):
                    (loss / options.rows_per_step).backward()
                total += loss.item() / options.rows_per_step
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update(len(tokens))
            if not math.isfinite(total):
                raise CheckpointError(
                    f"step {step}: the loss is {total}; try a smaller learning rate, and go on "
                    "from the last training state"
                )
            nn.utils.clip_grad_norm_(trained, 1.0)
            scale_rates(optimizer, _share(step, steps))
            optimizer.step()
            losses.append(total)
            mean.add(step, {**adapters, **all_maps(model)})
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                _save(work, fingerprint, model, adapters, optimizer, losses, mean)
    result = mean.of({name: value.detach().float().cpu() for name, value in adapters.items()})
    kept = {n: x * options.lora_kept if ".lora_B." in n else x for n, x in result.items()}
    return Finetuned(kept, mean.of(all_maps(model)), losses)


def _targets(model: Any) -> list[str]:
    """The linear layers of a decoder's attention: q, k, v and output, in one matrix or in four."""
    attention = decoder_layers(model)[0].self_attn
    return [name for name, part in attention.named_children() if isinstance(part, nn.Linear)]


def _share(step: int, steps: int) -> float:
    """Share of the learning rate: a warm-up of a twentieth, then half a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _in_order(parts: Sequence[TrainingRows], seed: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for part in parts:
        order = torch.randperm(len(part.tokens), generator=torch.Generator().manual_seed(seed))
        found += [(part.tokens[row], part.answers[row]) for row in order.tolist()]
    return found


def _compared(answers: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """The predictions that a step compares, `[n]` int64: prediction i is of token i + 1."""
    last = len(answers) - 1
    if not 0 < number < last:
        return torch.arange(last)
    chosen = answers[1:].clone()
    chosen[torch.randperm(last, generator=generator)[:number]] = True
    return chosen.nonzero().flatten()


def _loss(
    model: Any,
    row: Tensor,
    answers: Tensor,
    compared: Tensor,
    config: LolaConfig,
    options: DistillOptions,
) -> Tensor:
    ids = row.long()[None]
    base = model.get_base_model()
    with torch.no_grad(), model.disable_adapter(), _autocast(base):
        wanted = base.model(ids).last_hidden_state[0]
    with _autocast(base), lola_attention(model, config):
        hidden = base.model(ids).last_hidden_state[0]
        compared = compared.to(hidden.device)
        weights = 1 + (options.answer_weight - 1) * answers.to(hidden.device)[compared + 1].float()
        total = token_loss(base.lm_head, hidden[compared], wanted[compared], weights)
    return total / weights.sum()


def _autocast(base: Any) -> torch.autocast:
    """Products in bfloat16 where the base's weights are, with the adapters in float32."""
    return torch.autocast(
        base.device.type, dtype=torch.bfloat16, enabled=base.dtype == torch.bfloat16
    )


def _no_dropout(model: Any) -> None:
    """Set all dropout to 0: gradient checkpointing needs training mode, which enables dropout."""
    for layer in decoder_layers(model):
        layer.self_attn.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@torch.no_grad()
def _begin_with(adapters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]) -> None:
    for name, adapter in adapters.items():
        saved = start.get(name)
        if saved is None or saved.shape != adapter.shape:
            found = "is missing" if saved is None else f"is {list(saved.shape)}"
            raise CheckpointError(
                f"adapters to begin with: {name!r} {found}, and must be {list(adapter.shape)}; "
                "give the lora_rank that they were trained with, and their base"
            )
        adapter.copy_(saved)


def _save(
    work: Path,
    fingerprint: str,
    model: Any,
    adapters: dict[str, nn.Parameter],
    optimizer: Any,
    losses: list[float],
    mean: RunningMean,
) -> None:
    tensors: dict[str, Tensor] = {n: value.detach().cpu() for n, value in adapters.items()}
    tensors |= {**all_maps(model), **mean.saved()}
    for key, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{key}.{name}": value for name, value in values.items()}
    write_state(work, STATE, fingerprint, tensors, {"losses": losses})


def _restore(
    model: Any,
    adapters: dict[str, nn.Parameter],
    optimizer: Any,
    tensors: dict[str, Tensor],
) -> None:
    with torch.no_grad():
        for name, adapter in adapters.items():
            adapter.copy_(tensors[name])
    load_maps(model, tensors)
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, key, field = name.split(".")
            state["state"].setdefault(int(key), {})[field] = value
    optimizer.load_state_dict(state)
