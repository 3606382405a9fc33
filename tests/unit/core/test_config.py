"""`lola_config`: validated once, refused with the field, the value and the remedy."""

import copy
import functools

import pytest
from transformers import AutoConfig

from lola_vllm.core.config import DecoderConfig, TensorFacts, config_class
from lola_vllm.core.lola_config import LolaConfig, LolaConfigError, default_context_shift
from lola_vllm.core.ranks import check_ranks


def test_the_interval_follows_the_window_unless_it_is_given():
    assert LolaConfig(window_size=9).update_interval == 9
    assert LolaConfig(window_size=9, update_interval=None).update_interval == 9
    assert LolaConfig(window_size=9, update_interval=1).update_interval == 1


def checks(config, what):
    """The check of a config."""
    if what == "ranks":
        return functools.partial(check_ranks, config)
    return getattr(config, f"check_{what}")


SHARED, APART = {"sparse_sharing": "kv_head"}, {"sparse_sharing": "none"}
RECENT = {"sparse_cache_size": 8, "recent_size": [1, [2], 3]}


@pytest.mark.parametrize(
    ("fields", "check", "message"),
    [
        ({"windowsize": 3}, (), "lola_config.windowsize: unknown key; nearest valid name: 'window"),
        ({"window_size": 0}, (), "lola_config.window_size = 0: must be greater than or equal to 1"),
        ({"window_size": "64"}, (), "lola_config.window_size = '64': must be a valid integer"),
        (
            {"sparse_cache_size": [3, -1]},
            (),
            r"sparse_cache_size = \[3, -1\]: must be an integer of at least 0, or a list",
        ),
        ({"sparse_cache_size": [3, True]}, (), "lola_config.sparse_cache_size = "),
        ({"sparse_cache_size": [[1, -1]]}, (), "lola_config.sparse_cache_size = "),
        ({"update_interval": 0}, (), "lola_config.update_interval = 0"),
        ({"context_shift": 2.0}, (), "lola_config.context_shift = 2.0: must be a valid integer"),
        ({"mixing": "half"}, (), "lola_config.mixing = 'half': must be 'lola' or 'lolcats'"),
        ({"sparse_dtype": "int4"}, (), "sparse_dtype = 'int4': must be 'model' or 'int8'"),
        ({"sparse_cache_size": [5, 0, 40]}, ("layers", 4, 1), "3 values for 4 layers; give one"),
        ({"recent_size": [1, 2]}, ("layers", 3, 2), "recent_size: 2 values for 3 layers"),
        (RECENT, ("layers", 3, 2), "recent_size, layer 1: 1 values for 2 KV heads"),
        ({"hidden_state": [1, True]}, (), r"hidden_state = \[1, True\]: must be true or false, or"),
        ({"hidden_state": [True, [False]]}, ("layers", 2, 2), "hidden_state, layer 1: 1 values"),
        (
            {"hidden_state": [True, [True, False]], "sparse_cache_size": [5, [0, 0]]},
            ("layers", 2, 2),
            "hidden_state, layer 1: false for a head whose sparse_cache_size is 0; give it pairs",
        ),
        ({"context_shift": 3}, ("context_shift", 8), "= 3: must divide max_position_embeddings"),
        ({"context_shift": 8}, ("context_shift", 8), "= 8: must .* and be less; use 2, or 0"),
        ({"context_shift": 16}, ("context_shift", 8), "context_shift = 16"),
        ({"context_shift": 2}, ("context_shift", 7), "use 1, or 0 for contexts that end at 7 tok"),
        (
            {"context_shift": 2, "sink_size": 7},
            ("context_shift", 8),
            "sink_size = 7: .* use at most 6 sinks, or",
        ),
        ({}, ("heads", 9, 3, 1), "feature_map_k has 1 heads"),
        ({}, ("heads", 9, 3, 6), "feature_map_k has 6 heads"),
        (SHARED, ("ranks", 16, 8, 32), "'kv_head'.*16 tensor-parallel.*'none'"),
        (SHARED, ("ranks", 16, 8, 16), "'kv_head'.*16 tensor-parallel.*'none'"),
    ],
)
def test_what_does_not_suit_is_named(fields, check, message):
    with pytest.raises(LolaConfigError, match=message) as error:
        config = LolaConfig(**fields)
        checks(config, check[0])(*check[1:])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "check", "numbers"),
    [
        ({"sparse_cache_size": [5, 0, 40]}, "layers", (3, 1)),
        ({"context_shift": 2, "sink_size": 6}, "context_shift", (8,)),
        ({"context_shift": 0, "sink_size": 7}, "context_shift", (8,)),
        ({"context_shift": default_context_shift(8)}, "context_shift", (8,)),
        ({"context_shift": default_context_shift(7)}, "context_shift", (7,)),
        ({}, "heads", (9, 3, 9)),
        ({}, "heads", (9, 3, 3)),
        (SHARED, "ranks", (4, 8, 32)),
        (SHARED, "ranks", (8, 8, 32)),
        (SHARED, "ranks", (16, 8, 8)),  # a state head per KV head: nothing is shared
        (APART, "ranks", (16, 8, 32)),
    ],
)
def test_what_suits_is_taken(fields, check, numbers):
    checks(LolaConfig(**fields), check)(*numbers)


def test_a_sparse_cache_may_have_a_size_per_layer():
    config = LolaConfig(sparse_cache_size=[5, 0, 40])
    assert [config.for_layer(i).sparse_pairs for i in range(3)] == [5, 0, 40]
    assert LolaConfig(sparse_cache_size=7).for_layer(2).sparse_pairs == 7
    with pytest.raises(LolaConfigError, match="use for_layer"):
        config.sparse_pairs  # noqa: B018


def test_a_layer_has_recent_pairs_of_its_own():
    config = LolaConfig(sparse_cache_size=[8, [8, 9]], recent_size=[[1, 2], 3])
    layers = [config.for_layer(i).for_heads() for i in range(2)]
    assert [[(x.sparse_pairs, x.recent_pairs) for x in heads] for heads in layers] == [
        [(8, 1), (8, 2)],
        [(8, 3), (9, 3)],
    ]
    small = LolaConfig(sparse_cache_size=[8, [8, 2]], recent_size=3)
    assert [x.recent_pairs for x in small.for_layer(1).for_heads()] == [3, 2]
    assert LolaConfig(sparse_cache_size=4, recent_size=[9, 1]).for_layer(0).recent_pairs == 4
    alike = LolaConfig(sparse_cache_size=[8, [9, 9]], recent_size=[2, [3, 3]])
    assert [alike.for_layer(i).recent_pairs for i in range(2)] == [2, 3]


def test_contexts_without_end_have_a_default_length():
    config = config_class("llama")(max_position_embeddings=8192)
    assert (config.lola.context_shift, config.default_length) == (0, 8192)
    config.lola_config = {"context_shift": 2048}
    assert config.default_length == 131072
    config.max_position_embeddings = 2**20
    assert config.default_length == 2**20


def test_every_fault_is_reported():
    with pytest.raises(LolaConfigError) as error:
        LolaConfig(sink_size=-2, mixing="x", foo=1)
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "lola_config.sink_size",
        "lola_config.mixing",
        "lola_config.foo:",
    ]


def test_round_trip_through_transformers_keeps_llama_fields_and_the_object(tmp_path):
    config = config_class("llama")(
        lola_config={"sink_size": 4}, hidden_size=96, num_hidden_layers=3
    )
    config.save_pretrained(tmp_path)
    DecoderConfig.register()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.lola_config == {"sink_size": 4}
    assert (loaded.hidden_size, loaded.num_hidden_layers) == (96, 3)
    assert loaded.lola == LolaConfig(sink_size=4)


def test_facts_of_tensors_are_no_part_of_the_file(tmp_path):
    config = config_class("llama")(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    assert not config.has_facts and config.facts == TensorFacts(16, 2)
    config.facts = TensorFacts(8, 6, True)
    assert copy.deepcopy(config).facts == config.facts == TensorFacts(8, 6, True)
    config.save_pretrained(tmp_path)
    assert "facts" not in (tmp_path / "config.json").read_text()
    assert not DecoderConfig.from_pretrained(tmp_path).has_facts


def test_assignment_merges_and_is_checked():
    config = config_class("llama")(lola_config={"sink_size": 4, "window_size": 32})
    config.lola_config = {"window_size": 16}
    assert config.lola == LolaConfig(sink_size=4, window_size=16)
    with pytest.raises(LolaConfigError, match="must be an object"):
        config.lola_config = 7
    with pytest.raises(LolaConfigError, match="window_size = 0"):
        config.lola_config = {"window_size": 0}
    assert config.lola == LolaConfig(sink_size=4, window_size=16)
