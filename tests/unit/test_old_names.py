"""Modules under their first names: imports of them go on working."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (
            "lola_vllm.reference",
            "lola_vllm.ops.reference",
            ("LolaState", "feature_map", "self_recall_error", "mix", "lola_attention"),
        ),
        (
            "lola_vllm.differentiable",
            "lola_vllm.ops.differentiable",
            ("lola_attention_parallel", "plan_memory"),
        ),
        (
            "lola_vllm.backend",
            "lola_vllm.plugin.backend",
            ("LolaAttentionBackend", "LolaMetadata", "LolaMetadataBuilder"),
        ),
    ],
)
def test_an_old_name_gives_the_same_objects(old, new, names):
    first, now = importlib.import_module(old), importlib.import_module(new)
    for name in names:
        assert getattr(first, name) is getattr(now, name)
