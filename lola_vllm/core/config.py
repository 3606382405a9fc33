"""The config of a LoLA model for transformers: its base's, with the parameters of the attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from lola_vllm.core.compact_json import compact_lists
from lola_vllm.core.lola_config import LolaConfig, LolaConfigError
from lola_vllm.core.model_types import (
    FULL_ATTENTION,
    LLAMA_ARCHITECTURE,
    LOLA_TYPES,
    MODEL_TYPE,
    architecture_of,
    base_type_of,
    windows_of,
)

ENDLESS_LENGTH = 131_072  # tokens; 160 MiB of token ids for vLLM's 256 sequences

_FACTS, _LOLA = "_lola_facts", "_lola"  # names of attributes that are no part of a file
_DERIVED = ("model_type", "base_model_type", "qkv_bias", "qk_norm")  # told by the class


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
