"""The parameters of LoLA attention: the `lola_config` object of a checkpoint's `config.json`."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, model_validator
from pydantic import Field as PydanticField

from lola_vllm.core.sizes import Flags, Sizes, of_layer, read_flags, read_sizes

# What can differ from KV head to KV head.
HEAD_KEYS = ("sparse_cache_size", "recent_size", "hidden_state")
SEVERAL_TABLES = ("dynamic", "longrope")  # types of RoPE with a table by the length of a context


class LolaConfigError(ValueError):
    """A `lola_config` that cannot be used; the message names field, value and remedy."""


class LolaConfig(BaseModel):
    """Parameters of LoLA attention (arXiv 2505.23666).

    Attributes:
        window_size: eta, newest tokens whose pairs stay exact after every update (>= 1). A larger
            one predicts better and costs memory and time for every sequence.
        sink_size: first positions of a sequence that stay exact for ever (>= 0); not in the paper.
            A few of them cost nearly nothing and help recall a great deal.
        sparse_cache_size: lambda, older pairs per sparse set that are kept exact, those that the
            hidden state recalls worst (>= 0). More of them recall more and cost memory and time;
            0 keeps none, which is LoLCATs. A number is for every layer, as in the paper. A list
            has a number per layer, or in its place a list with a number per KV head, as
            `lola-vllm calibrate` finds them.
        recent_size: of the pairs in a sparse set, the newest so many stay whatever the hidden state
            recalls (>= 0; all where there are fewer). They let a model go on word by word with
            what it read last, and need no scores. They leave less room for what is older. A number
            or a list as there; 0 is the paper.
        hidden_state: whether a head has a hidden state. Without one it forgets the pairs for which
            its sparse cache has no room, keeps those of largest value norm (times importance), and
            its memory is for other pairs. A flag or a list as there; true is the paper.
        update_interval: C, tokens between two updates, counted from position 0 (>= 1). The page
            holds C pairs beside the window. A short one leaves memory for other pairs, and a long
            one updates less often. Default `window_size` (the authors' code); 1 is the paper's
            recurrence.
        sparse_dtype: how pairs are kept that have left the window. `"model"`: in the model's dtype,
            which is the paper; `"int8"`: rounded to 8 bits, with a float32 scale per key and per
            value, so that nearly twice as many fit the same memory.
        mixing: how exact pairs and hidden state are weighed in an answer. `"lola"` weighs exact
            pairs by `g exp(z)` and the hidden state by `1 - g`; `"lolcats"` by `g exp(z - max z)`
            and 1. Use the one that the feature maps were trained with.
        context_shift: D, positions by which a context shifts back whenever a sequence has used up
            the base's trained length P, `max_position_embeddings`; divides P. 0: never, so that
            contexts end at P. New checkpoints have a quarter of P, and contexts without end. At
            each shift the hidden state keeps `1 - D / P` of its weight.
        sparse_sharing: `"none"`: one sparse set per state head; `"kv_head"`: one per KV head,
            scored by the mean over its state heads of SRE over the value's norm. It saves memory
            where maps are per query head, and changes nothing where each KV head has one state
            head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    window_size: int = PydanticField(default=64, ge=1)
    sink_size: int = PydanticField(default=0, ge=0)
    sparse_cache_size: Annotated[Sizes, PlainValidator(read_sizes)] = 128
    recent_size: Annotated[Sizes, PlainValidator(read_sizes)] = 0
    hidden_state: Annotated[Flags, PlainValidator(read_flags)] = True
    update_interval: int = PydanticField(default=0, ge=1)
    sparse_dtype: Literal["model", "int8"] = "model"
    mixing: Literal["lola", "lolcats"] = "lola"
    context_shift: int = PydanticField(default=0, ge=0)
    sparse_sharing: Literal["none", "kv_head"] = "none"

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise LolaConfigError(_explain(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _interval_follows_window(cls, data: Any) -> Any:
        # `update_interval: null` must mean the same as leaving it out, so that a window changed by
        # --hf-overrides carries the interval along.
        if isinstance(data, dict) and data.get("update_interval") is None:
            window = data.get("window_size", cls.model_fields["window_size"].default)
            usable = type(window) is int and window >= 1  # else the window's own error is enough
            data = {**data, "update_interval": window if usable else 1}
        return data

    @property
    def sparse_pairs(self) -> int:
        """`sparse_cache_size` of one layer or head, or of all where they are equal.

        Raises:
            LolaConfigError: it is a list; take the parameters of a layer from `for_layer`, and
                those of its heads from `for_heads`.
        """
        return _only("sparse_cache_size", self.sparse_cache_size)

    @property
    def recent_pairs(self) -> int:
        """Recent pairs of one layer or head, or of all where they are equal: `recent_size`, at most
        `sparse_cache_size`.

        Raises:
            LolaConfigError: one of the two is a list.
        """
        return min(_only("recent_size", self.recent_size), self.sparse_pairs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All numbers of `sparse_cache_size`: of layers, and of the heads of layers that have a
        number for each."""
        found: list[int] = []
        layers = self.sparse_cache_size
        for size in (layers,) if isinstance(layers, int) else layers:
            found += [size] if isinstance(size, int) else size
        return tuple(found)

    def for_layer(self, index: int) -> LolaConfig:
        """The parameters of layer `index` alone.

        Each of `HEAD_KEYS` is a value, or a tuple with one tuple, of its KV heads' values.
        """
        own = {key: of_layer(getattr(self, key), index) for key in HEAD_KEYS}
        return self.model_copy(
            update={key: (x,) if isinstance(x, tuple) else x for key, x in own.items()}
        )

    def for_heads(self) -> tuple[LolaConfig, ...]:
        """The parameters of each KV head of one layer (`for_layer`), where they differ; else only
        itself, which is for all heads."""
        own = {key: of_layer(getattr(self, key), 0) for key in HEAD_KEYS}
        heads = max((len(x) for x in own.values() if isinstance(x, tuple)), default=1)
        of_heads = {key: x if isinstance(x, tuple) else (x,) * heads for key, x in own.items()}
        return tuple(
            self.model_copy(update={key: x[i] for key, x in of_heads.items()}) for i in range(heads)
        )

    def of_sets(self, num_sparse_heads: int) -> list[LolaConfig]:
        """The parameters of each of so many sparse sets of one layer."""
        heads = self.for_heads()
        return [head for head in heads for _ in range(num_sparse_heads // len(heads))]

    def check_layers(self, num_layers: int, num_kv_heads: int) -> None:
        """Raise `LolaConfigError` unless lists have as many values as the model has layers, lists
        in them as many as a layer has KV heads, and every head has pairs or a hidden state."""
        for name in HEAD_KEYS:
            values: Sizes | Flags = getattr(self, name)
            if not isinstance(values, tuple):
                continue
            if len(values) != num_layers:
                raise LolaConfigError(
                    f"lola_config.{name}: {len(values)} values for {num_layers} layers; give one "
                    "per layer, or one for all"
                )
            for index, value in enumerate(values):
                if isinstance(value, tuple) and len(value) != num_kv_heads:
                    raise LolaConfigError(
                        f"lola_config.{name}, layer {index}: {len(value)} values for "
                        f"{num_kv_heads} KV heads; give one per KV head, or one for all"
                    )
        for index in range(num_layers):
            heads = self.for_layer(index).for_heads()
            if any(not head.hidden_state and not head.sparse_pairs for head in heads):
                raise LolaConfigError(
                    f"lola_config.hidden_state, layer {index}: false for a head whose "
                    "sparse_cache_size is 0; give it pairs, or a hidden state"
                )

    def check_context_shift(self, length: int) -> None:
        """Raise `LolaConfigError` unless context shifts suit a base's trained length P.

        Args:
            length: P, the model's `max_position_embeddings`, in tokens.
        """
        interval = self.context_shift
        if interval and (length % interval or interval == length):
            raise LolaConfigError(
                f"lola_config.context_shift = {interval}: must divide max_position_embeddings = "
                f"{length} and be less; use {default_context_shift(length) or 1}, or 0 for "
                f"contexts that end at {length} tokens"
            )
        if interval and self.sink_size > length - interval:
            raise LolaConfigError(
                f"lola_config.sink_size = {self.sink_size}: sinks keep their RoPE positions, and "
                f"after a context shift new tokens have those from {length - interval} on "
                f"(max_position_embeddings - context_shift); use at most {length - interval} "
                "sinks, or context_shift = 0"
            )

    def num_sparse_heads(self, num_state_heads: int, num_kv_heads: int) -> int:
        """Sparse sets per layer: one per state head, or one per KV head where they are shared."""
        return num_kv_heads if self.sparse_sharing == "kv_head" else num_state_heads

    def check_heads(self, num_heads: int, num_kv_heads: int, num_state_heads: int) -> None:
        """Raise `LolaConfigError` unless Hkv divides Hs and Hs divides Hq."""
        if num_heads % num_kv_heads:
            raise LolaConfigError(
                f"num_attention_heads = {num_heads} is not a multiple of "
                f"num_key_value_heads = {num_kv_heads}"
            )
        if num_heads % num_state_heads or num_state_heads % num_kv_heads:
            raise LolaConfigError(
                f"feature_map_k has {num_state_heads} heads: it must have one "
                f"per query head ({num_heads}) or per KV head ({num_kv_heads})"
            )


def _only(key: str, sizes: Sizes) -> int:
    """The number of a key that could be a list; raises `LolaConfigError` where it is one."""
    if isinstance(sizes, int):
        return sizes
    plain = [size if isinstance(size, int) else list(size) for size in sizes]
    raise LolaConfigError(
        f"lola_config.{key} = {plain}: a number per layer or head; use for_layer(index) and "
        "for_heads() for their parameters"
    )


def importance_size(head_dim: int) -> int:
    """Numbers in a KV head's importance weights: of d // 2 lengths, of a value, and a constant."""
    return head_dim // 2 + head_dim + 1


def default_context_shift(length: int) -> int:
    """`context_shift` of a new checkpoint: a quarter of the trained length, 0 if it has none.

    Args:
        length: P, the base's `max_position_embeddings`, in tokens.
    """
    return 0 if length % 4 else length // 4


def no_one_table(rope: str) -> LolaConfigError:
    """The error for a RoPE, described in words, that has several tables (`SEVERAL_TABLES`)."""
    return LolaConfigError(
        f"lola_config.context_shift: {rope} has several tables, by the length of a context, and "
        "keys cannot be rotated from one to another; set it to 0"
    )


def _explain(error: ValidationError) -> str:
    """One line per fault: field, value, and the nearest valid name or the allowed values."""
    fields = LolaConfig.model_fields
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"]) or "lola_config"
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            lines.append(
                f"lola_config.{name}: unknown key; nearest valid name: {near[0]!r}; "
                f"all: {', '.join(fields)}"
            )
        else:
            allowed = fault["msg"].replace("Input should be", "must be")
            allowed = allowed.removeprefix("Value error, ")
            lines.append(f"lola_config.{name} = {fault['input']!r}: {allowed}")
    return "\n".join(lines)
