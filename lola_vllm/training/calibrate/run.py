"""`lola-vllm calibrate`: how many sparse pairs each KV head should have, and which it should keep.

A model reads back what it has read before in a few of its heads. The others need few exact pairs.
Calibration reads prompts with softmax attention, and notes what each head reads from far behind
(`importance.py`). Plain text seldom asks for a detail from far back, so most prompts hide facts and
ask for them (`prompts.py`).

Which pairs a cache should hold depends on its size, and what a size is worth on which pairs it
holds. So importance is fitted twice: roughly to caches of one size, by which the model's
predictions say what pairs of each head are worth (`losses.py`, `sizes.py`), and then to caches of
the sizes that follow.

With `recent` some heads have recent pairs besides: those that go on with a passage word by word
(`copying.py`). Divisions of them are tried (`trials.py`).

With `state_worth` heads lose their hidden state that do without (`states.py`). The memory goes to
pairs, and these are divided once more.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.layers import SequenceLayout, layer_layouts
from lola_vllm.core.lola_config import HEAD_KEYS
from lola_vllm.core.model_types import windows_of
from lola_vllm.core.state import PART_ALIGNMENT
from lola_vllm.engine.hf.attention import attentions, order_heads
from lola_vllm.models.base import read_base_config
from lola_vllm.models.files import CheckpointError, open_weights, read_json, weight_files
from lola_vllm.training.calibrate.copying import (
    ENOUGH,
    LEAST_DISTANCE,
    PASSAGE,
    REPEATED,
    CopyingAttention,
    divide_recent,
    repeat_passages,
)
from lola_vllm.training.calibrate.importance import (
    EPOCHS,
    JUDGED_ONE_IN,
    LAST_TOKENS,
    SKIPPED_TOKENS,
    LongRangeAttention,
    PromptReads,
    fit,
    held,
    parted,
    without_states,
)
from lola_vllm.training.calibrate.losses import Losses, pair_losses
from lola_vllm.training.calibrate.options import CalibrateOptions
from lola_vllm.training.calibrate.prompts import CalibrationPrompt, draw_plain, draw_prompts
from lola_vllm.training.calibrate.reader import ATTENTION, attention, read
from lola_vllm.training.calibrate.sizes import cost_at, divide_among, scaled
from lola_vllm.training.calibrate.states import PROMPTS, state_worths
from lola_vllm.training.calibrate.trials import (
    RECENT_ATTENTION,
    passage_log_probs,
    recent_attention,
)

# Of eight prompts, those that say what pairs are worth: one of plain text where there is any, and
# two more, all of full length.
TRIED_OF_EIGHT = (4, 5, 6)
# Of the first fit, whose importance only serves to find sizes.
FIRST_EPOCHS = EPOCHS // 3
COPYING_PROMPTS = 8  # that find the heads which copy
TRIED_PROMPTS = 4  # of them that divisions of recent pairs are tried with


class Held(NamedTuple):
    """How much of each KV head's long-range attention the caches of a layer would hold, in prompts
    that the fit did not see.

    Attributes:
        total: `[Hkv]`, all of it, by prompt. alone: `[Hkv]`, what is held if the error alone
            chooses. weighted: `[Hkv]`, with importance.
    """

    total: Tensor
    alone: Tensor
    weighted: Tensor


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        sizes: pairs per layer and KV head: a `lola_config.sparse_cache_size`, the recent ones
            included. Sliding layers have none.
        recent: likewise: a `lola_config.recent_size`.
        states: likewise, whether a head has a hidden state: a `lola_config.hidden_state`.
        importance: by layer that does not slide `[Hkv, d // 2 + d + 1]`, its tensor `importance`.
        held: likewise, what the pairs that are not recent would hold.
    """

    sizes: list[list[int]]
    recent: list[list[int]]
    states: list[list[bool]]
    importance: dict[int, Tensor]
    held: dict[int, Held]

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of `lola_config` that it settles, `HEAD_KEYS`."""
        states = True if all(map(all, self.states)) else self.states
        return dict(zip(HEAD_KEYS, (self.sizes, self.recent, states), strict=True))


def calibrate(
    base: Path, texts: Path, options: CalibrateOptions, model: Path | None = None
) -> Calibration:
    """Read prompts with softmax attention, divide the pairs, and fit importance.

    Args:
        base: a local directory of the softmax model.
        texts: a file or a directory of files. Held-out documents are not read, so that they stay
            for measuring.
        model: a LoLA model made of `base`. Importance is fitted to its keys, values and maps.
            Without it, to the base's with identity maps. Its linear layers must not be quantized.

    Raises:
        CheckpointError: a model or options that cannot be used, or texts that are too short.
        TextsError: files that cannot be read.
    """
    if options.pairs < options.least:
        raise CheckpointError(f"pairs = {options.pairs}: must be at least least = {options.least}")
    if not 0 <= options.facts <= 1:
        raise CheckpointError(f"facts = {options.facts:g}: must be between 0 and 1")
    if options.prompts < JUDGED_ONE_IN:
        raise CheckpointError(f"prompts = {options.prompts}: must be at least {JUDGED_ONE_IN}")
    if options.state_worth:
        _check_states(options, model)
    import transformers

    read_base_config(base)  # refuses families that could not be served
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    prompts = draw_prompts(texts, tokenizer, options)
    if min(len(prompt.ids) for prompt in prompts) <= SKIPPED_TOKENS + LAST_TOKENS:
        raise CheckpointError(
            f"prompt_length = {options.prompt_length}: too short for anything to leave the "
            "window; use prompts of 300 tokens or more"
        )
    transformers.AttentionInterface.register(ATTENTION, attention)
    transformers.AttentionInterface.register(RECENT_ATTENTION, recent_attention)
    softmax, maps = _open(base, model, options.dtype)
    recent = _find_recent(softmax, tokenizer, texts, options)
    # Beyond more recent pairs than this the prompts would show too little to fit to.
    most = options.prompt_length // 2
    near = [[min(size, most) for size in of_heads] for of_heads in recent]
    # What heads that copy do not need goes to the pairs that scores choose.
    mean = sum(map(sum, recent)) / sum(map(len, recent))
    pairs = options.pairs + max(0, options.recent - math.ceil(mean))
    recorder = LongRangeAttention(prompts, maps, near)
    read(softmax, [prompt.ids for prompt in prompts], recorder, "reading")
    losses = _losses(softmax, prompts, recorder.reads, maps, recent, pairs, options)
    states = [[True] * len(of_heads) for of_heads in recent]
    sizes = divide_among(losses, pairs, options.least, options.prompt_length)
    found = _fit(softmax.config, recorder.reads, sizes, recent, states, options)
    if options.state_worth and model is not None:
        length = min(2 * options.prompt_length, softmax.config.max_position_embeddings)
        plain = draw_plain(texts, tokenizer, length, PROMPTS, options.seed)
        softmax.set_attn_implementation(RECENT_ATTENTION)
        student = _student(model, found, options)
        worths = torch.stack(state_worths(student, softmax, plain))
        losses = scaled(losses, sizes, worths, options.state_worth)

        def divided(states: Tensor) -> list[list[int]]:
            freed = _pairs_for_states(student.config, states.tolist())
            return divide_among(losses, pairs + freed, options.least, options.prompt_length)

        never = worths.isinf()  # tried
        lost = cost_at(losses.plain, divided(never))
        needed = never | (worths.minimum(lost) > options.state_worth)
        sizes, states = divided(needed), needed.tolist()
        found = _fit(softmax.config, recorder.reads, sizes, recent, states, options)
    return found


def _check_states(options: CalibrateOptions, model: Path | None) -> None:
    which = f"state_worth = {options.state_worth:g}"
    if model is None:
        raise CheckpointError(f"{which}: heads are tried in a LoLA model; give one, or use 0")
    if options.least < 1:
        raise CheckpointError(
            f"{which}: least = {options.least}, but a head without a hidden state needs pairs; "
            "use least = 1 or more"
        )
    if (mixing := DecoderConfig.from_pretrained(model).lola.mixing) != "lola":
        raise CheckpointError(
            f"{which}: mixing = {mixing!r} counts the hidden state whatever the gate is; use 0"
        )


def _losses(
    softmax: Any,
    prompts: Sequence[CalibrationPrompt],
    reads: Sequence[Sequence[PromptReads]],
    maps: Sequence[Tensor],
    recent: list[list[int]],
    pairs: int,
    options: CalibrateOptions,
) -> Losses:
    """What pairs cost, ranked by an importance that is fitted roughly.

    Args:
        reads, maps, recent: by layer that does not slide. pairs: of a KV head, on average.
    """
    has_states = not options.state_worth  # with it most heads lose theirs
    heads = len(recent[0])
    importance = []
    for of_layer in tqdm(reads, desc="first fit", unit="layer"):
        fitted, _ = parted([without_states(read, [has_states] * heads) for read in of_layer])
        importance.append(fit(fitted, [pairs] * heads, options.seed, FIRST_EPOCHS))
    tried = [prompt for i, prompt in enumerate(prompts) if i % 8 in TRIED_OF_EIGHT]
    return pair_losses(softmax, tried, importance, maps, recent, has_states, options.seed)


def _fit(
    config: Any,
    reads: Sequence[Sequence[PromptReads]],
    sizes: list[list[int]],
    recent: list[list[int]],
    states: list[list[bool]],
    options: CalibrateOptions,
) -> Calibration:
    """Fit importance to caches of so many pairs besides the recent ones.

    Args:
        config: of the base. reads, sizes, recent, states: by layer that does not slide.
    """
    found = Calibration([], [], [], {}, {})
    heads = config.num_key_value_heads
    for _ in range(config.num_hidden_layers):
        found.sizes.append([0] * heads)
        found.recent.append([0] * heads)
        found.states.append([True] * heads)
    fits = zip(_full_layers(config), reads, sizes, recent, states, strict=True)
    for layer, of_layer, own, newest, has_state in tqdm(
        list(fits), desc="importance", unit="layer"
    ):
        fitted, judged = parted([without_states(read, has_state) for read in of_layer])
        found.importance[layer] = weights = fit(fitted, own, options.seed)
        alone, total = (x / len(judged) for x in held(judged, own, None))
        weighted = held(judged, own, weights)[0] / len(judged)
        found.held[layer] = Held(total, alone, weighted)
        found.sizes[layer] = [x + y for x, y in zip(own, newest, strict=True)]
        found.recent[layer], found.states[layer] = newest, has_state
    return found


def _student(model: Path, found: Calibration, options: CalibrateOptions) -> Any:
    """A LoLA model in transformers with a calibration."""
    import transformers

    student: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, options.dtype)
    ).eval()
    student.config.lola_config = found.keys
    student.config.facts = replace(student.config.facts, importance=True)
    for layer, weights in found.importance.items():
        attentions(student)[layer].importance = torch.nn.Parameter(weights)
    return student


def _pairs_for_states(config: DecoderConfig, states: list[list[bool]]) -> int:
    """Pairs of a KV head, on average over all layers that do not slide, for which there is room
    without some hidden states in a model that is served in bfloat16.

    Args:
        config: with sizes, and all hidden states. states: by layer that does not slide.
    """
    full = _full_layers(config)
    flags = [[True] * config.num_key_value_heads for _ in range(config.num_hidden_layers)]
    for layer, own in zip(full, states, strict=True):
        flags[layer] = own

    def size(**keys: Any) -> int:
        other = copy.deepcopy(config)
        other.lola_config = keys
        return SequenceLayout(layer_layouts(other, torch.bfloat16)).row_bytes

    sizes: list[list[int]] = config.lola_config["sparse_cache_size"]
    many = PART_ALIGNMENT  # of which no page is padded more or less
    more = [[x + many * (i in full) for x in own] for i, own in enumerate(sizes)]
    whole = size()
    return (whole - size(hidden_state=flags)) * many // (size(sparse_cache_size=more) - whole)


def _full_layers(config: Any) -> list[int]:
    return [layer for layer, window in enumerate(windows_of(config)) if window is None]


def _find_recent(
    softmax: Any, tokenizer: Any, texts: Path, options: CalibrateOptions
) -> list[list[int]]:
    config = softmax.config
    layers = len(_full_layers(config))
    if not options.recent:
        return [[0] * config.num_key_value_heads for _ in range(layers)]
    length = min(2 * options.prompt_length, config.max_position_embeddings - REPEATED)
    if length <= LEAST_DISTANCE + PASSAGE:
        raise CheckpointError(
            f"recent = {options.recent}: max_position_embeddings = "
            f"{config.max_position_embeddings} of the base leaves no room to repeat passages; "
            "use recent = 0"
        )
    rng = random.Random(f"{options.seed}/passages")
    plain = draw_plain(texts, tokenizer, length, COPYING_PROMPTS, options.seed)
    prompts = [repeat_passages(ids, rng) for ids in plain]
    recorder = CopyingAttention([starts for _, starts in prompts], length, layers)
    read(softmax, [ids for ids, _ in prompts], recorder, "heads that copy")
    longest = length + REPEATED  # the last repeat stands after all the others
    return _best_division(
        softmax,
        [ids for ids, _ in prompts[:TRIED_PROMPTS]],
        [divide_recent(recorder.attention, options.recent, longest, share) for share in ENOUGH],
    )


def _best_division(
    softmax: Any, prompts: list[list[int]], divisions: list[list[list[int]]]
) -> list[list[int]]:
    distinct = [x for i, x in enumerate(divisions) if x not in divisions[:i]]
    if len(distinct) == 1:
        return distinct[0]
    softmax.set_attn_implementation(RECENT_ATTENTION)
    found = passage_log_probs(softmax, prompts, distinct)
    softmax.set_attn_implementation(ATTENTION)
    return distinct[int(found.argmax())]


def _open(base: Path, model: Path | None, dtype: str) -> tuple[Any, list[Tensor]]:
    """The softmax model, with the weights of a LoLA model of it where there is one, and the key
    maps of its layers that do not slide, in float32.

    Raises:
        CheckpointError: a model of other weights, or one whose linear layers are quantized.
    """
    import transformers

    source = model or base
    config: Any = transformers.AutoConfig.from_pretrained(base)
    if "quantization_config" in read_json(source / "config.json"):
        raise CheckpointError(f"{source}: calibrate a model before it is quantized")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
    )
    softmax, found = loaded
    for name, has, wanted in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"{source}: {name!r} is {list(has)}, the base's {list(wanted)}; was it made of this "
            "base?"
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{source}: no tensor {missing[0]!r}; was it made of this base?")
    order_heads(softmax.eval())
    layers = _full_layers(config)
    if model is None:
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return softmax, [torch.eye(d).repeat(config.num_key_value_heads, 1, 1)] * len(layers)
    maps = {}
    for path in weight_files(model):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(".feature_map_k"):
                    maps[int(name.split(".")[2])] = file.get_tensor(name).float()
    if sorted(maps) != layers:
        raise CheckpointError(
            f"{model}: maps of the layers {sorted(maps)}, but those that need them are {layers}"
        )
    return softmax, [maps[layer] for layer in layers]


def report(found: Calibration) -> str:
    """What the caches hold of the long-range attention in a prompt, with the error alone and with
    importance; the sizes as JSON."""
    columns = zip(*found.held.values(), strict=True)
    total, alone, weighted = (sum(float(x.sum()) for x in column) for column in columns)
    total = max(total, 1e-9)
    flags = [flag for layer in found.held for flag in found.states[layer]]  # none slides
    have, every = sum(flags), len(flags)
    return (
        f"all heads hold {alone / total:.0%} of the long-range attention by error, "
        f"{weighted / total:.0%} with importance; {have} of {every} have a hidden state\n\n"
        f"{json.dumps(found.keys)}"
    )
