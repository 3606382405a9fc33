"""What a state belongs to: the model with its overrides, the dtype, and the ranks that share it.

The same texts give the same states only under the same fingerprint. It is made of named parts, so
that a file of another model is refused with the name of what differs.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.state import StateLayout
from lola_vllm.models.files import CheckpointError, weight_files

# Fields of a config that change what a model computes.
_CONFIG_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters",
    "attention_bias", "mlp_bias", "qkv_bias", "qk_norm", "tie_word_embeddings",
)  # fmt: skip
_UNSAID = {"attention_bias": False, "mlp_bias": False}  # of a Llama that has no such field
# A checkpoint up to this size is read whole, in a second. Of a larger one, which may take minutes,
# each tensor shows so many pieces at even distances: a change of more than 1/256 of it in one place
# is seen, and scattered changes of single rows may not be.
_WHOLE_BYTES = 2**30
_PIECES, _PIECE_BYTES = 256, 4096
_READ_BYTES = 2**20
_ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Fingerprint:
    """Digests and names; two states are interchangeable if all but the last two parts agree.

    Attributes:
        config: of what the model computes, overrides included. tensors: of the checkpoint's files.
        dtype: of keys and values. quantization: vLLM's `--quantization`, empty where the
            checkpoint says it or nothing does. layout: of the bytes of all layers' pages.
        ranks: tensor-parallel and pipeline-parallel sizes, such as "1x1".
        tokenizer, template: of the files beside the model. They are told, not compared: a state
            depends on tokens alone.
    """

    config: str
    tensors: str
    dtype: str
    quantization: str
    layout: str
    ranks: str
    tokenizer: str = ""
    template: str = ""

    @property
    def key(self) -> str:
        """One digest of the parts that must agree."""
        return _short({name: getattr(self, name) for name in COMPARED})

    def difference(self, other: Mapping[str, str]) -> str | None:
        """The first part in which a stored fingerprint differs, in words; None: it fits."""
        for name in COMPARED:
            stored, here = other.get(name), getattr(self, name)
            if stored != here:
                there = f"{stored or 'none'} in the state, {here or 'none'} here"
                return f"another {_WORDS[name]}: {there}"
        return None

    def to_dict(self) -> dict[str, str]:
        """For a header."""
        return asdict(self)


COMPARED = tuple(f.name for f in fields(Fingerprint))[:-2]
_WORDS = {
    "config": "model config", "tensors": "checkpoint", "dtype": "dtype",
    "quantization": "quantization", "layout": "page layout", "ranks": "number of ranks",
}  # fmt: skip


def model_fingerprint(
    config: DecoderConfig,
    model: str,
    pages: Sequence[StateLayout],
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    quantization: str | None = None,
) -> Fingerprint:
    """The fingerprint of a model as it runs.

    Args:
        config: with overrides. model: its directory, or the name under which Hugging Face's cache
            has it. pages: of every layer, one rank.

    Raises:
        CheckpointError: the directory holds no readable weights.
    """
    directory = Path(model)
    numbers = {name: getattr(config, name, _UNSAID.get(name)) for name in _CONFIG_FIELDS}
    if not config.is_llama:  # whatever else the family's layers go by
        numbers |= {"base": config.base_config.to_diff_dict()}
    numbers["head_dim"] = pages[0].head_dim
    numbers["lola"] = lola = config.lola.model_dump()
    if lola["hidden_state"] is True:  # as before there was the key: states from then stay valid
        del lola["hidden_state"]
    if config.lola.context_shift:
        numbers["trained_length"] = config.max_position_embeddings
    layout = [
        [
            [name, list(shape), str(dtype)]
            for name, (shape, dtype) in page.parts.items()
            if page.int8_pairs or name not in ("sparse_k_scale", "sparse_v_scale")
        ]
        # Of two parts that pages had and that were empty: states from then stay of this layout.
        + [
            ["bounds", [page.num_state_heads, 6, 0], str(page.state_dtype)],
            ["directions", [page.num_state_heads, 0, page.head_dim], "torch.int8"],
        ]
        + [page.window_size, page.recent_size, page.update_interval, page.sink_size]
        for page in pages
    ]
    return Fingerprint(
        config=_short(numbers),
        tensors=tensor_digest(directory) if directory.is_dir() else _cached(model),
        dtype=str(pages[0].kv_dtype).removeprefix("torch."),
        quantization=quantization or "",
        layout=_short(layout),
        ranks=f"{tensor_parallel}x{pipeline_parallel}",
        tokenizer=_files_digest(directory, _TOKENIZER_FILES),
        template=_files_digest(directory, _TEMPLATE_FILES),
    )


def adapter_fingerprint(name: str, path: str) -> str:
    """Name and digest of an adapter: its weights, and the config that says how they are applied.

    Raises:
        CheckpointError: the directory holds no readable weights, or no readable config.
    """
    directory = Path(path)
    config, weights = directory / _ADAPTER_CONFIG, tensor_digest(directory)
    try:
        fields = json.loads(config.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: no {_ADAPTER_CONFIG}, so its states cannot be told"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{config}: not valid JSON ({error})") from None
    return f"{name}:{_short([weights, fields])}"


def tensor_digest(directory: Path) -> str:
    """A digest of a directory's safetensors files, the same on every machine.

    Names, shapes and places of all tensors count, and the files' bytes: all of them up to
    `_WHOLE_BYTES`, else `_PIECES` pieces of each tensor. Times of change are not part of it, as a
    copy has others. They only say that a file need not be read again in this process.

    Raises:
        CheckpointError: there are none, or one is damaged.
    """
    files = weight_files(directory)
    if not files:
        raise CheckpointError(f"{directory}: no safetensors files, so its states cannot be told")
    return _digest_of(tuple(map(_stamp, files)))


class _Stamp(NamedTuple):
    """A file as it is now; `ctime` also tells of a change that put the old `mtime` back."""

    path: str
    size: int
    mtime: int
    ctime: int
    inode: int


def _stamp(path: Path) -> _Stamp:
    stat = path.stat()
    return _Stamp(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=64)
def _digest_of(files: tuple[_Stamp, ...]) -> str:
    found = hashlib.blake2b(digest_size=16)
    whole = sum(file.size for file in files) <= _WHOLE_BYTES
    for stamp in files:
        path = Path(stamp.path)
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else stamp.size
            text = file.read(min(length, stamp.size))
            try:
                header = json.loads(text)
                places = sorted(v["data_offsets"] for k, v in header.items() if k[:2] != "__")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(f"{path}: not a complete safetensors file") from None
            found.update(path.name.encode())
            header.pop("__metadata__", None)
            found.update(json.dumps(header, sort_keys=True).encode())
            if whole:
                while piece := file.read(_READ_BYTES):
                    found.update(piece)
                continue
            for start, end in places:
                step = max(_PIECE_BYTES, -(-(end - start) // _PIECES))
                for at in range(start, end, step):
                    file.seek(8 + length + at)
                    found.update(file.read(min(_PIECE_BYTES, end - at)))
    return found.hexdigest()


def _cached(model: str) -> str:
    """Of a model in Hugging Face's cache, where its files are complete; no download."""
    from huggingface_hub import snapshot_download

    try:
        return tensor_digest(Path(snapshot_download(model, local_files_only=True)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: its weights cannot be told apart ({error})") from None


def _files_digest(directory: Path, names: Sequence[str]) -> str:
    found = hashlib.blake2b(digest_size=8)
    there = [directory / name for name in names if (directory / name).is_file()]
    for path in there:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest() if there else ""


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
