"""The parameters of LoLA attention, named once for JSON, Python, C++ and the docs.

Two classes: `LolaConfig` (pydantic) is the `lola_config` object of a checkpoint's `config.json`;
`LolaLlamaConfig` is the Hugging Face config around it. Neither imports vLLM.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, model_validator
from pydantic import Field as PydanticField
from transformers import LlamaConfig

from lola_vllm.core.compact_json import compact_lists

MODEL_TYPE = "lola_llama"
ARCHITECTURE = "LolaLlamaForCausalLM"
ENDLESS_LENGTH = 131_072  # tokens; 160 MiB of token ids for vLLM's 256 sequences

_FACTS = "_lola_facts"  # name of the attribute


class LolaConfigError(ValueError):
    """A `lola_config` that cannot be used; the message names field, value and remedy."""


Sizes = int | tuple[int | tuple[int, ...], ...]


def _sizes(value: Any) -> Sizes:
    """Sizes as `LolaConfig.sparse_cache_size` has them; lists become tuples."""

    def is_size(x: Any) -> bool:
        return type(x) is int and x >= 0

    if is_size(value):
        return int(value)
    layers: list[int | tuple[int, ...]] = []
    for layer in value if isinstance(value, (list, tuple)) else ():
        heads = isinstance(layer, (list, tuple)) and len(layer) > 0 and all(map(is_size, layer))
        if not (heads or is_size(layer)):
            layers = []
            break
        layers.append(tuple(layer) if heads else layer)
    if not layers:
        raise ValueError(
            "must be an integer of at least 0, or a list with one for each layer, or with a list "
            "of one for each KV head of a layer"
        )
    return tuple(layers)


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
    sparse_cache_size: Annotated[Sizes, PlainValidator(_sizes)] = 128
    recent_size: Annotated[Sizes, PlainValidator(_sizes)] = 0
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

        Its `sparse_cache_size` and `recent_size` are a number each, or a tuple with one tuple, of
        its KV heads' numbers.
        """
        own = (_of_layer(sizes, index) for sizes in (self.sparse_cache_size, self.recent_size))
        size, recent = (x if isinstance(x, int) else (x,) for x in own)
        return self.model_copy(update={"sparse_cache_size": size, "recent_size": recent})

    def for_heads(self) -> tuple[LolaConfig, ...]:
        """The parameters of each KV head of one layer (`for_layer`), where they differ in their
        sizes; else only itself, which is for all heads."""
        both = self.sparse_cache_size, self.recent_size
        if all(isinstance(x, int) for x in both):
            return (self,)
        own = [_of_layer(x, 0) for x in both]
        heads = max(len(x) for x in own if isinstance(x, tuple))
        sizes, recents = ((x,) * heads if isinstance(x, int) else x for x in own)
        return tuple(
            self.model_copy(update={"sparse_cache_size": size, "recent_size": recent})
            for size, recent in zip(sizes, recents, strict=True)
        )

    def of_sets(self, num_sparse_heads: int) -> list[LolaConfig]:
        """The parameters of each of so many sparse sets of one layer."""
        heads = self.for_heads()
        return [head for head in heads for _ in range(num_sparse_heads // len(heads))]

    def check_layers(self, num_layers: int, num_kv_heads: int) -> None:
        """Raise `LolaConfigError` unless lists have as many numbers as the model has layers, lists
        in them as many as a layer has KV heads."""
        for name in ("sparse_cache_size", "recent_size"):
            sizes: Sizes = getattr(self, name)
            if isinstance(sizes, int):
                continue
            if len(sizes) != num_layers:
                raise LolaConfigError(
                    f"lola_config.{name}: {len(sizes)} numbers for {num_layers} layers; give one "
                    "per layer, or one number for all"
                )
            for index, size in enumerate(sizes):
                if not isinstance(size, int) and len(size) != num_kv_heads:
                    raise LolaConfigError(
                        f"lola_config.{name}, layer {index}: {len(size)} numbers for "
                        f"{num_kv_heads} KV heads; give one per KV head, or one number for all"
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

    def check_ranks(self, ranks: int, num_kv_heads: int, num_state_heads: int) -> None:
        """Raise `LolaConfigError` if ranks would split the state heads that share a sparse set.

        Each rank would choose pairs by the mean over its own heads alone. Answers would then
        depend on the number of ranks.
        """
        shared = self.sparse_sharing == "kv_head" and num_state_heads != num_kv_heads
        if shared and num_kv_heads % ranks:
            raise LolaConfigError(
                "lola_config.sparse_sharing = 'kv_head': the state heads of a KV head choose "
                f"their sparse set together, and {ranks} tensor-parallel ranks would part them "
                f"({num_state_heads} state heads, {num_kv_heads} KV heads); use a "
                f"tensor-parallel size that divides {num_kv_heads}, or sparse_sharing = 'none'"
            )


def _of_layer(sizes: Sizes, index: int) -> int | tuple[int, ...]:
    """The number of a layer, or those of its KV heads where they differ."""
    size = sizes if isinstance(sizes, int) else sizes[index]
    return size if isinstance(size, int) or len(set(size)) > 1 else size[0]


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


def heads_divide(ranks: int, num_heads: int, num_kv_heads: int, num_state_heads: int) -> bool:
    """Whether tensor-parallel ranks can divide the heads, as vLLM divides them.

    There may be more ranks than KV heads. Several ranks then hold the same KV head and its state
    head.
    """
    shared = ranks % num_kv_heads == 0
    return (
        num_heads % ranks == 0
        and (num_kv_heads % ranks == 0 or shared)
        and (num_state_heads % ranks == 0 or (shared and num_state_heads == num_kv_heads))
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


def explain_field(error: Exception) -> str:
    """What transformers says of a field of `config.json`: its name, its value, and its type."""
    found = re.search(r"Field '(\w+)' expected (.+), got \w+ \(value: (.+)\)", str(error))
    return f"{found[1]} = {found[3]}: must be of type {found[2]}" if found else str(error)


@dataclass(frozen=True)
class TensorFacts:
    """What a checkpoint's tensors say, so that `config.json` need not repeat it.

    Attributes:
        feature_dim: F, columns of a feature map; the map's output has 2F entries.
        num_state_heads: Hs, heads of `feature_map_k`: the number of query heads (LoLCATs) or of KV
            heads (maps tied inside a group).
        importance: whether each layer has a tensor `importance`.
    """

    feature_dim: int
    num_state_heads: int
    importance: bool = False


class LolaLlamaConfig(LlamaConfig):
    """`config.json` of a LoLA model: Llama's fields unchanged plus three.

    `lola_config`: the parameters of the attention. `qkv_bias`: whether the q, k and v projections
    have biases (Qwen2); None: as `attention_bias` says, which is of all four. `qk_norm`: whether
    each head's q and k are RMS-normalized before RoPE (Qwen3).

    Assigning `lola_config` merges into what is there, so `--hf-overrides
    '{"lola_config": {"window_size": 32}}'` changes one parameter and keeps the others.

    `facts` is what the tensors say. It is no part of `config.json`: who reads the tensors sets it.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        lola_config: dict[str, Any] | None = None,
        qkv_bias: bool | None = None,
        qk_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        self.lola_config = dict(lola_config or {})
        super().__init__(**kwargs)
        # vLLM's Llama reads this name, and prefers it to attention_bias.
        self.qkv_bias = self.attention_bias if qkv_bias is None else qkv_bias
        self.qk_norm = qk_norm

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lola_config":
            if not isinstance(value, dict):
                raise LolaConfigError(f"lola_config = {value!r}: must be an object")
            value = {**self.__dict__.get("lola_config", {}), **value}
            LolaConfig(**value)  # refuse bad values here, where the user's input is known
        elif name in ("qkv_bias", "qk_norm") and not isinstance(value, bool):
            raise LolaConfigError(f"{name} = {value!r}: must be true or false")
        super().__setattr__(name, value)

    @property
    def facts(self) -> TensorFacts:
        """What the tensors say; until they are read, what `lola-vllm init` would write."""
        found = self.__dict__.get(_FACTS)
        if found is None:
            kv_heads, d = self.num_key_value_heads, self.head_dim
            assert isinstance(kv_heads, int) and isinstance(d, int)  # LlamaConfig fills both in
            return TensorFacts(d, kv_heads)
        assert isinstance(found, TensorFacts)
        return found

    @facts.setter
    def facts(self, found: TensorFacts) -> None:
        self.__dict__[_FACTS] = found

    @property
    def has_facts(self) -> bool:
        """Whether somebody has set `facts`."""
        return _FACTS in self.__dict__

    def to_dict(self) -> dict[str, Any]:
        """The parameters as `config.json` has them."""
        return {key: value for key, value in super().to_dict().items() if key != _FACTS}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of `config.json`."""
        return compact_lists(super().to_json_string(use_diff))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: transformers would then copy this module into every saved directory,
        where a file that imports it (`models/remote_code.py`) stands already."""

    def check_sizes(self) -> None:
        """Raise `LolaConfigError` unless lists of sizes fit the model's layers and KV heads."""
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        self.lola.check_layers(self.num_hidden_layers, kv_heads)

    @property
    def default_length(self) -> int:
        """Tokens that a server lets a context have unless it is told otherwise.

        vLLM keeps five bytes for each token of `--max-model-len` times `--max-num-seqs`, used or
        not. So contexts without end have a default that is long, but costs little.
        """
        length: int = self.max_position_embeddings
        return max(length, ENDLESS_LENGTH) if self.lola.context_shift else length

    @property
    def lola(self) -> LolaConfig:
        """The validated parameters."""
        return LolaConfig(**self.lola_config)
