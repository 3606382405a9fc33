"""A model in a GGUF file, as transformers reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lola_vllm.models.files import CheckpointError


def read_gguf(file: Path, dtype: str, sampling: Mapping[str, float]) -> tuple[Any, Any]:
    """A model with its weights unpacked, and its tokenizer.

    Args:
        file: the GGUF file. dtype: of the weights: "bfloat16", "float16" or "float32".
        sampling: fields of `generation_config.json`, which a GGUF file lacks. Servers take them
            for requests that have none of their own.

    Raises:
        CheckpointError: the package `gguf` is missing.
    """
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": getattr(torch, dtype)}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases would keep the weights packed, and refuse to save them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise CheckpointError(
            f"reading GGUF files needs `pip install 'lola-vllm[demo]'`: {error}"
        ) from error
    config = model.config
    # The file has it as a float32, and 1e-5 would become 9.99999974e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # a title inside the file
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, do_sample=True, **sampling)
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer
