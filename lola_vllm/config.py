"""The parameters of LoLA attention, named once for JSON, Python, C++ and the docs.

Two classes: `LolaConfig` (pydantic) is the `lola_config` object of a checkpoint's `config.json`;
`LolaLlamaConfig` is the Hugging Face config around it. Neither imports vLLM.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, model_validator
from pydantic import Field as PydanticField
from transformers import LlamaConfig

MODEL_TYPE = "lola_llama"
ARCHITECTURE = "LolaLlamaForCausalLM"
ENDLESS_LENGTH = 131_072  # tokens; 160 MiB of token ids for vLLM's 256 sequences


# Why `state_dtype` has one value, and what to do.
NARROW_STATE = (
    ". With fewer bits folds are lost: bfloat16 rounds the hidden state to 8 bits at each of them, "
    "and after some hundreds a new pair changes nothing. Remove the key or set it to 'float32'; "
    "the state takes more memory then, `lola-vllm estimate` says how much"
)


class LolaConfigError(ValueError):
    """A `lola_config` that cannot be used; the message names field, value and remedy."""


def _sparse_cache_size(value: Any) -> int | tuple[int | tuple[int, ...], ...]:
    """As `LolaConfig.sparse_cache_size` has it; lists become tuples."""

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
        window_size: eta, tokens in the window after every update (>= 1); their pairs are exact.
        sparse_cache_size: lambda, exact pairs per sparse set, those that the hidden state recalls
            worst (>= 0); 0 sends every evicted pair to the hidden state, which is LoLCATs. A number
            is for every layer, as in the paper. A list has a number per layer, or in its place a
            list with a number per KV head.
        update_interval: C, tokens between two updates, counted from position 0 (>= 1).
            Default `window_size` (the authors' code); 1 is the paper's recurrence.
        sink_size: first positions of a sequence that stay exact for ever (>= 0); not in the paper.
        feature_dim: F, columns of a feature map (>= 1); must fit the checkpoint's tensors. The
            map's output has 2F entries.
        feature_map: `"softmax"`, the only one so far: `concat(softmax(xW), softmax(-xW))`
            (arXiv 2410.10254).
        mixing: how exact and linear parts are weighted. `"lola"` weighs exact pairs by `g exp(z)`
            and the hidden state by `1 - g`; `"lolcats"` by `g exp(z - max z)` and 1.
        state_dtype: dtype of the hidden state H and s. Only `"float32"`: in a narrower sum, folded
            pairs are soon lost to rounding.
        sparse_sharing: `"none"`: one sparse set per state head; `"kv_head"`: one per KV head,
            scored by the mean over its state heads of SRE over the value's norm (changes nothing
            where each KV head has one state head).
        importance: in JSON `true` or `false`: whether the choice of sparse pairs multiplies a
            pair's score by its learned importance, for which the checkpoint has a tensor
            `importance` per layer; false is the paper.
        sparse_dtype: how pairs are kept that have left the window. `"model"`: in the model's dtype,
            which is the paper; `"int8"`: rounded to 8 bits, with a float32 scale per key and per
            value, which takes half the memory.
        context_shift: D, positions by which a context shifts whenever a sequence has used up the
            base's trained length P, `max_position_embeddings`; divides P. 0: never, so that
            contexts end at P. New checkpoints have a quarter of P.
        score_decay: gamma (>= 0): a context shift multiplies the scores of the pairs in the sparse
            cache by `(1 - D / P)^gamma`. 1: they decay as the hidden state does. 0: they never
            decay, and old pairs stay.
        score_decay_shifts: K (>= 1), so many context shifts make the score of a pair decay, the
            first ones that it meets; then the score stays. A pair whose score is
            `(1 - D / P)^(-gamma K)` times those of newer ones is kept for ever. None: all context
            shifts do, so that every pair leaves the cache in the end.
        fold_rotation: m, context shifts by which keys are rotated further before they are folded,
            in a sequence that was shifted; from 0 to `P / D - 1`. 0: not at all, so that after a
            context shift the hidden state holds keys at RoPE positions that tokens have yet to
            reach. New checkpoints have `P / D / 2`, rounded down.
        bucket_start: F, first RoPE position of the bucket of old keys. Context shifts rotate exact
            keys towards it, until they lie from F to F + D, where they stay for ever. From 0 to
            `P - 2 D`. A larger one keeps old pairs closer to new tokens. New checkpoints have
            `3 P / 8`, or `P - 2 D` where that is less.
        num_state_heads: Hs, heads of `feature_map_k`: the number of query heads (LoLCATs) or of
            KV heads (maps tied inside a group). None: as the checkpoint's tensors say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    window_size: int = PydanticField(default=64, ge=1)
    sparse_cache_size: Annotated[
        int | tuple[int | tuple[int, ...], ...], PlainValidator(_sparse_cache_size)
    ] = 128
    update_interval: int = PydanticField(default=0, ge=1)
    sink_size: int = PydanticField(default=0, ge=0)
    feature_dim: int = PydanticField(default=64, ge=1)
    feature_map: Literal["softmax"] = "softmax"
    mixing: Literal["lola", "lolcats"] = "lola"
    state_dtype: Literal["float32"] = "float32"
    sparse_sharing: Literal["none", "kv_head"] = "none"
    importance: bool = False
    sparse_dtype: Literal["model", "int8"] = "model"
    context_shift: int = PydanticField(default=0, ge=0)
    score_decay: float = PydanticField(default=0.0, ge=0, le=100)
    score_decay_shifts: int | None = PydanticField(default=None, ge=1)
    fold_rotation: int = PydanticField(default=0, ge=0)
    bucket_start: int = PydanticField(default=0, ge=0)
    num_state_heads: int | None = PydanticField(default=None, ge=1)

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
        if not isinstance(self.sparse_cache_size, int):
            raise LolaConfigError(
                f"lola_config.sparse_cache_size = {_plain(self.sparse_cache_size)}: a number per "
                "layer or head; use for_layer(index) and for_heads() for their parameters"
            )
        return self.sparse_cache_size

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

        Its `sparse_cache_size` is a number, or a tuple with one tuple, of its KV heads' numbers.
        """
        if isinstance(self.sparse_cache_size, int):
            return self
        size = self.sparse_cache_size[index]
        if not isinstance(size, int) and len(set(size)) == 1:
            size = size[0]  # one page serves all heads
        return self.model_copy(
            update={"sparse_cache_size": size if isinstance(size, int) else (size,)}
        )

    def for_heads(self) -> tuple[LolaConfig, ...]:
        """Of the parameters of one layer (`for_layer`) those of its KV heads, where they differ in
        `sparse_cache_size`; else only itself, which is for all heads."""
        if isinstance(self.sparse_cache_size, int):
            return (self,)
        (sizes,) = self.sparse_cache_size
        assert not isinstance(sizes, int)
        return tuple(self.model_copy(update={"sparse_cache_size": size}) for size in sizes)

    def set_sizes(self, num_sparse_heads: int) -> list[int]:
        """Of the parameters of one layer, what each of so many sparse sets holds at most."""
        heads = self.for_heads()
        share = num_sparse_heads // len(heads)
        return [head.sparse_pairs for head in heads for _ in range(share)]

    def check_layers(self, num_layers: int, num_kv_heads: int) -> None:
        """Raise `LolaConfigError` unless lists have as many numbers as the model has layers, and
        lists in them as many as a layer has KV heads."""
        sizes = self.sparse_cache_size
        if isinstance(sizes, int):
            return
        if len(sizes) != num_layers:
            raise LolaConfigError(
                f"lola_config.sparse_cache_size: {len(sizes)} numbers for {num_layers} layers; "
                "give one per layer, or one number for all"
            )
        for index, size in enumerate(sizes):
            if not isinstance(size, int) and len(size) != num_kv_heads:
                raise LolaConfigError(
                    f"lola_config.sparse_cache_size, layer {index}: {len(size)} numbers for "
                    f"{num_kv_heads} KV heads; give one per KV head, or one number for all"
                )

    @property
    def weighs_scores(self) -> bool:
        """Whether pages keep, for each sparse pair, a weight of its score."""
        return self.importance or (self.score_decay > 0 and self.context_shift > 0)

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
        if interval and self.fold_rotation >= length // interval:
            raise LolaConfigError(
                f"lola_config.fold_rotation = {self.fold_rotation}: keys would be rotated to RoPE "
                f"positions below 0; use at most {length // interval - 1} "
                "(max_position_embeddings / context_shift - 1)"
            )
        if interval and self.bucket_start > length - 2 * interval:
            raise LolaConfigError(
                f"lola_config.bucket_start = {self.bucket_start}: old pairs would lie among "
                f"new tokens; use at most {length - 2 * interval} (max_position_embeddings - 2 * "
                "context_shift)"
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
                f"lola_config.num_state_heads = {num_state_heads}: feature_map_k must have a head "
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


def _plain(sizes: tuple[int | tuple[int, ...], ...]) -> list[int | list[int]]:
    """Sizes as JSON has them."""
    return [size if isinstance(size, int) else list(size) for size in sizes]


def importance_size(head_dim: int) -> int:
    """Numbers in a KV head's importance weights: of d // 2 lengths, of a value, and a constant."""
    return head_dim // 2 + head_dim + 1


def default_context_shift(length: int) -> int:
    """`context_shift` of a new checkpoint: a quarter of the trained length, 0 if it has none.

    Args:
        length: P, the base's `max_position_embeddings`, in tokens.
    """
    return 0 if length % 4 else length // 4


def default_fold_rotation(length: int, interval: int) -> int:
    """`fold_rotation` of a new checkpoint: as many context shifts as half of the trained length
    has.

    Args:
        length: P, the base's `max_position_embeddings`. interval: D; 0: contexts end at P.
    """
    return length // interval // 2 if interval else 0


def default_bucket_start(length: int, interval: int) -> int:
    """`bucket_start` of a new checkpoint: 3/8 of the trained length, if there is room for it.

    Measured on the demo model (`docs/choices.md`). From pairs that are farther back less is
    recalled, and pairs next to new tokens make these harder to predict.

    Args:
        length: P, the base's `max_position_embeddings`. interval: D, at least 1.
    """
    return min(3 * length // 8, length - 2 * interval)


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
            more = NARROW_STATE if name == "state_dtype" else ""
            lines.append(f"lola_config.{name} = {fault['input']!r}: {allowed}{more}")
    return "\n".join(lines)


def explain_field(error: Exception) -> str:
    """What transformers says of a field of `config.json`: its name, its value, and its type."""
    found = re.search(r"Field '(\w+)' expected (.+), got \w+ \(value: (.+)\)", str(error))
    return f"{found[1]} = {found[3]}: must be of type {found[2]}" if found else str(error)


class LolaLlamaConfig(LlamaConfig):
    """`config.json` of a LoLA model: Llama's fields unchanged plus three.

    `lola_config`: the parameters of the attention. `qkv_bias`: whether the q, k and v projections
    have biases (Qwen2); None: as `attention_bias` says, which is of all four. `qk_norm`: whether
    each head's q and k are RMS-normalized before RoPE (Qwen3).

    Assigning `lola_config` merges into what is there, so `--hf-overrides
    '{"lola_config": {"window_size": 32}}'` changes one parameter and keeps the others.
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

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: transformers would then copy this module into every saved directory,
        where a file that imports it (`checkpoint/remote_code.py`) stands already."""

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
