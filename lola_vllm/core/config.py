"""The parameters of LoLA attention, named once for JSON, Python, C++ and the docs.

Two classes: `LolaConfig` (pydantic) is the `lola_config` object of a checkpoint's `config.json`;
`DecoderConfig` is the Hugging Face config around it. Neither imports vLLM.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, model_validator
from pydantic import Field as PydanticField
from transformers import PreTrainedConfig

from lola_vllm.core.compact_json import compact_lists
from lola_vllm.core.model_types import (
    FULL_ATTENTION,
    LLAMA_ARCHITECTURE,
    LOLA_TYPES,
    MODEL_TYPE,
    architecture_of,
    base_type_of,
    windows_of,
)
from lola_vllm.core.sizes import Flags, Sizes, of_layer, read_flags, read_sizes

ENDLESS_LENGTH = 131_072  # tokens; 160 MiB of token ids for vLLM's 256 sequences

_FACTS, _LOLA = "_lola_facts", "_lola"  # names of attributes that are no part of a file
_DERIVED = ("model_type", "base_model_type", "qkv_bias", "qk_norm")  # told by the class
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


class DecoderConfig(PreTrainedConfig):
    """`config.json` of a LoLA model: all fields of its base, which keep their names and defaults,
    with three changes. `model_type` is "lola", `base_model_type` is the base's, and `lola_config`
    has the parameters of the attention.

    It is read as a subclass of the base's own config class (`config_class`), so whatever is true of
    a base's config is true of its LoLA model's. Its own `model_type` makes a program that does not
    know LoLA refuse the model. By the base's it would run softmax attention, and say nothing.

    Assigning `lola_config` merges into what is there, so `--hf-overrides
    '{"lola_config": {"window_size": 32}}'` changes one parameter and keeps the others.

    `facts` is what the tensors say. It is no part of `config.json`: who reads the tensors sets it.
    """

    model_type = MODEL_TYPE
    base_class: type[PreTrainedConfig]  # of the subclasses that `config_class` makes

    if TYPE_CHECKING:  # fields of every base; here alone, as transformers makes fields of what it
        # sees in a class
        base_model_type: str
        lola_config: dict[str, Any]
        vocab_size: int
        hidden_size: int
        intermediate_size: int
        num_hidden_layers: int
        num_attention_heads: int
        num_key_value_heads: int
        head_dim: int
        max_position_embeddings: int
        tie_word_embeddings: bool
        rms_norm_eps: float

    def __init__(self, lola_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.lola_config = dict(lola_config or {})
        super().__init__(**{key: x for key, x in kwargs.items() if key not in _DERIVED})
        self.base_model_type = self.base_class.model_type
        heads = self.num_attention_heads
        if not getattr(self, "num_key_value_heads", None):
            self.num_key_value_heads = heads
        if not getattr(self, "head_dim", None):
            self.head_dim = self.hidden_size // heads

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that `config.json` holds, of the class that suits its base.

        Raises:
            LolaConfigError: transformers knows no such base, or `lola_config` is not valid.
        """
        if cls.__dict__.get("base_class") is None:
            return config_class(base_type_of(config_dict)).from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies in other processes: the class is made there again."""
        return _restore, (self.base_class.model_type, dict(self.__dict__))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lola_config":
            if not isinstance(value, dict):
                raise LolaConfigError(f"lola_config = {value!r}: must be an object")
            value = {**self.__dict__.get("lola_config", {}), **value}
            # Bad values are refused here, where the user's input is known, and checked once.
            self.__dict__[_LOLA] = LolaConfig(**value)
        super().__setattr__(name, value)

    @property
    def base_config(self) -> PreTrainedConfig:
        """The config of the base, of its own class."""
        own = ("lola_config", "base_model_type", "model_type", "architectures", "auto_map")
        fields = {key: value for key, value in self.to_dict().items() if key not in own}
        if types := fields.get("layer_types"):  # vLLM's side renames some
            fields["layer_types"] = [FULL_ATTENTION if x == MODEL_TYPE else x for x in types]
        return self.base_class(**fields)

    @property
    def is_llama(self) -> bool:
        """Whether the base is a Llama but for biases of q, k, v or for norms of q and k."""
        return architecture_of(self, self.base_model_type) == LLAMA_ARCHITECTURE

    @property
    def qkv_bias(self) -> bool:
        """Of a Llama (`is_llama`): whether the projections of q, k and v have biases. vLLM's Llama
        reads this name, and prefers it to `attention_bias`."""
        return self.base_model_type == "qwen2" or getattr(self, "attention_bias", False)

    @property
    def qk_norm(self) -> bool:
        """Of a Llama (`is_llama`): whether each head's q and k are normalized before RoPE."""
        return self.base_model_type == "qwen3"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Tokens that each layer's softmax attention sees, the query's own included; None: all."""
        return windows_of(self)

    def for_layer(self, index: int) -> tuple[LolaConfig, TensorFacts]:
        """The parameters of layer `index` alone, and what its tensors say.

        A sliding layer is a window that moves with each token, without sinks, sparse cache and
        hidden state (F = 0).
        """
        window = self.windows[index]
        if window is None:
            return self.lola.for_layer(index), self.facts
        own = {"window_size": window - 1, "update_interval": 1}  # the query's own pair is one more
        own |= {"sink_size": 0, "sparse_cache_size": 0, "recent_size": 0}
        return self.lola.model_copy(update=own), TensorFacts(0, self.num_key_value_heads)

    @property
    def facts(self) -> TensorFacts:
        """What the tensors say; until they are read, what `lola-vllm init` would write."""
        found = self.__dict__.get(_FACTS)
        if found is None:
            return TensorFacts(self.head_dim, self.num_key_value_heads)
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
        """The parameters as `config.json` has them; `architectures` names vLLM's class."""
        own = _FACTS, _LOLA
        fields = {key: value for key, value in super().to_dict().items() if key not in own}
        return {**fields, "architectures": [architecture_of(self, self.base_class.model_type)]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of `config.json`."""
        return compact_lists(super().to_json_string(use_diff))

    @classmethod
    def register(cls) -> None:
        """Let transformers read LoLA models' configs."""
        from transformers import CONFIG_MAPPING

        for model_type in LOLA_TYPES:
            CONFIG_MAPPING.register(model_type, cls, exist_ok=True)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: transformers would then copy this module into every saved directory,
        where a file that imports it (`models/remote_code.py`) stands already."""

    def check_sizes(self) -> None:
        """Raise `LolaConfigError` unless lists of sizes fit the model's layers and KV heads."""
        self.lola.check_layers(self.num_hidden_layers, self.num_key_value_heads)

    @property
    def default_length(self) -> int:
        """Tokens that a server lets a context have unless it is told otherwise.

        vLLM keeps five bytes for each token of `--max-model-len` times `--max-num-seqs`, used or
        not. So contexts without end have a default that is long, but costs little.
        """
        length = self.max_position_embeddings
        return max(length, ENDLESS_LENGTH) if self.lola.context_shift else length

    @property
    def lola(self) -> LolaConfig:
        """The validated parameters."""
        found: LolaConfig = self.__dict__[_LOLA]
        return found


@functools.cache
def config_class(base_model_type: str) -> type[DecoderConfig]:
    """The class of LoLA configs of a base: the base's own config class, and `DecoderConfig`.

    Raises:
        LolaConfigError: transformers knows no such base.
    """
    from transformers import CONFIG_MAPPING

    if base_model_type not in CONFIG_MAPPING:
        raise LolaConfigError(
            f"base_model_type = {base_model_type!r}: transformers knows no such model; a newer one "
            "may, and a LoLA model is made by lola-vllm init, convert or linearize"
        )
    base = CONFIG_MAPPING[base_model_type]
    members = {
        "__init__": DecoderConfig.__init__,  # else transformers would make one of the fields
        "__module__": __name__,
        "base_class": base,
        "model_type": MODEL_TYPE,
    }
    made: type[DecoderConfig] = type(f"Lola{base.__name__}", (DecoderConfig, base), members)
    for use in CLASS_HOOKS:
        use(made)
    return made


# What is called with every class that `config_class` makes: a model for transformers to load.
CLASS_HOOKS: list[Callable[[type[DecoderConfig]], None]] = []


def _restore(base_model_type: str, fields: dict[str, Any]) -> DecoderConfig:
    cls = config_class(base_model_type)
    config = cls.__new__(cls)
    config.__dict__.update(fields)
    return config
