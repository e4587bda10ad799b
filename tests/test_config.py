"""The configuration: every key of the released checkpoints, both forms, aliases, and errors before any work is done."""

import json

import pytest

from steerling_hf import SteerlingConfig

RELEASED = {
    "interpretable": True,
    "vocab_size": 100281,
    "n_layers": 32,
    "n_head": 32,
    "n_embd": 4096,
    "n_kv_heads": 4,
    "block_size": 4096,
    "diff_block_size": 64,
    "use_rms_norm": True,
    "norm_eps": 1e-5,
    "norm_order": "post",
    "use_qk_norm": True,
    "use_rope": True,
    "rope_base": 500000,
    "rope_full_precision": True,
    "clip_qkv": 10.0,
    "mlp_type": "swiglu",
    "activation": "gelu",
    "mlp_ratio": 4,
    "intermediate_size": None,
    "use_bias": False,
    "weight_sharing": True,
    "pad_token_id": 100277,
    "bos_token_id": 100278,
    "eos_token_id": 100257,
    "mask_token_id": 100280,
    "endofchunk_token_id": 100279,
    "n_concepts": 33732,
    "n_unknown_concepts": 101196,
    "concept_dim": 4096,
    "use_attention_known": False,
    "use_attention_unknown": False,
    "topk_known": 32,
    "topk_known_features": 32,
    "unknown_topk": 128,
    "use_unknown": True,
    "apply_topk_to_unknown": True,
    "topk_on_logits": False,
    "factorize_unknown": True,
    "factorize_rank": 256,
    "use_epsilon_correction": True,
    "concept_block_size": 4096,
    "pad_multiple": 16,
    "store_unknown_weights": False,
    "inject_layer": 16,
    "inject_alpha": 1.0,
}

ALIASES = {
    "hidden_size": ("n_embd", 64),
    "num_hidden_layers": ("n_layers", 3),
    "num_attention_heads": ("n_head", 8),
    "num_key_value_heads": ("n_kv_heads", 1),
    "max_position_embeddings": ("block_size", 128),
    "tie_word_embeddings": ("weight_sharing", False),
}

SWITCHES = [key for key, value in RELEASED.items() if isinstance(value, bool)]

IMPOSSIBLE = [
    *((key, value) for key in SWITCHES for value in ("false", 1, None)),
    ("interpretable", float("inf")),
    ("return_dict", "false"),
    ("output_hidden_states", 1),
    ("use_unknown", []),
    ("initializer_range", -1),
    ("initializer_range", float("nan")),
    ("inject_layer", "x"),
    ("inject_layer", -1),
    ("inject_alpha", float("inf")),
    ("concept", "5"),
    ("concept", 5),
    ("concept", [["topk_known", 3]]),
    ("diff_block_size", 2**28),
    ("pad_multiple", 2**28),
    ("norm_order", ["post"]),
    ("block_size", float("inf")),
    ("vocab_size", "8200"),
    ("rope_base", "500000"),
    ("eos_token_id", "8192"),
    ("eos_token_id", [8192, None]),
    ("vocab_size", 0),
    ("n_layers", 0),
    ("n_layers", 2.5),
    ("n_head", 0),
    ("n_embd", 30),
    ("n_embd", "32"),
    ("n_kv_heads", 3),
    ("n_kv_heads", 0),
    ("block_size", -1),
    ("diff_block_size", 0),
    ("diff_block_size", True),
    ("norm_eps", 0.0),
    ("norm_order", "middle"),
    ("rope_base", -1.0),
    ("clip_qkv", 0.0),
    ("mlp_type", "moe"),
    ("activation", "tanh"),
    ("mlp_ratio", 0),
    ("intermediate_size", 0),
    ("n_concepts", 0),
    ("n_unknown_concepts", None),
    ("n_unknown_concepts", 0),
    ("concept_dim", 16),
    ("topk_known", 0),
    ("topk_known_features", -1),
    ("unknown_topk", 0),
    ("factorize_rank", 0),
    ("concept_block_size", 0),
    ("pad_multiple", 0),
    ("known_loss_coef", -0.1),
    ("known_loss_coef", float("nan")),
    ("norm_eps", float("inf")),
    ("mask_token_id", 8200),
    ("mask_token_id", None),
    ("pad_token_id", -1),
    ("eos_token_id", 9000),
    ("eot_id", 9000),
]


def test_defaults_are_the_released_model():
    config = SteerlingConfig()
    assert {key: getattr(config, key) for key in RELEASED} == RELEASED


def test_nothing_is_lost_on_the_way_through_a_file(tiny_config, tmp_path):
    config = tiny_config(norm_order="pre", clip_qkv=None, weight_sharing=False, eos_token_id=[1, 2], topk_known=None)
    config.save_pretrained(tmp_path)
    again = SteerlingConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert SteerlingConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()


def test_the_nested_form_means_the_same(tiny_config):
    flat = tiny_config(concept_block_size=7, topk_known=3).to_dict()
    concept_keys = [key for key in flat if "concept" in key or "topk" in key or "factorize" in key]
    concept_keys = [key for key in concept_keys if key != "endofchunk_token_id"]
    nested = {key: value for key, value in flat.items() if key not in concept_keys}
    nested["model_type"] = "causal_diffusion"
    nested["concept"] = {key: flat[key] for key in concept_keys if key != "concept_block_size"}
    nested["concept"] |= {"block_size": 7, "max_concepts": 16}
    config = SteerlingConfig.from_dict(nested)
    assert config.to_dict() == flat
    assert config.block_size == flat["block_size"]
    assert config.model_type == "steerling"


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_of_transformers_read_and_write(alias, tiny_config):
    key, value = ALIASES[alias]
    others = {k: v for k, v in tiny_config().to_dict().items() if k not in (key, alias, "concept_dim")}
    config = SteerlingConfig(**others, **{alias: value})
    assert getattr(config, key) == getattr(config, alias) == value
    setattr(config, alias, "other")
    assert getattr(config, key) == "other"


def test_tying_has_one_name_in_files_and_both_in_dictionaries(tiny_config, tmp_path):
    config = tiny_config(weight_sharing=False)
    assert config.to_dict()["tie_word_embeddings"] is False
    assert SteerlingConfig(**config.to_dict()).weight_sharing is False
    config.tie_word_embeddings = True
    assert config.to_dict()["tie_word_embeddings"] is config.to_dict()["weight_sharing"] is True
    config.save_pretrained(tmp_path)
    assert "tie_word_embeddings" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="`weight_sharing` is False: it is `tie_word_embeddings`, which is True"):
        SteerlingConfig(**{**config.to_dict(), "weight_sharing": False})


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_told_with_its_remedy(key, value, tiny_config):
    with pytest.raises(ValueError, match=f"`{key}` is .*: .*") as error:
        tiny_config(**{key: value})
    assert repr(value) in str(error.value)


def test_a_value_set_later_is_checked_before_a_model_is_built(tiny_model, tiny_config):
    config = tiny_config()
    config.n_layers = 0
    with pytest.raises(ValueError, match="`n_layers` is 0"):
        type(tiny_model())(config)


def test_discovered_concepts_need_their_head(tiny_config):
    assert tiny_config(n_unknown_concepts=30).n_discovered == 30
    assert tiny_config(use_unknown=False).n_discovered == tiny_config(interpretable=False).n_discovered == 0


def test_heads_that_do_not_exist_are_not_checked(tiny_config):
    tiny_config(use_unknown=False, n_unknown_concepts=None)
    tiny_config(interpretable=False, n_concepts=0)
    tiny_config(factorize_unknown=False, factorize_rank=0)
