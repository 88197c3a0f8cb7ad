"""Models whose modules do not say rightly whether they are causal, or that cut a mask: what "no mask" means for them.

With transformers' "sdpa" most of these differ from eager.
"""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import qkv.transformers
from test_transformers import assert_close, both, randomise

qkv.transformers.register()

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "pad_token_id": 0}
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}


def ids(batch=1, length=11):
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def same(model, run):
    eager, here = both(randomise(model), run)
    assert_close(here, eager)


@pytest.mark.parametrize("keep", [0, 1, 2, 4])
def test_queries_are_cut_for_layers_that_share_their_keys(keep):
    config = transformers.Gemma4TextConfig(
        **{**TEXT, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=16, global_head_dim=16, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=64, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=16, tie_word_embeddings=False,
    )
    model = transformers.Gemma4ForCausalLM(config)
    same(model, lambda: model(ids(), logits_to_keep=keep).logits)


def test_a_causal_module_that_is_asked_to_look_both_ways():
    config = transformers.BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vision_config={**TOWER, "hidden_size": 64},
        text_config={**TEXT, "hidden_size": 64, "max_position_embeddings": 32},
    )
    model = transformers.BridgeTowerModel(config)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    same(model, lambda: model(input_ids=ids(), pixel_values=pixels).text_features)
    config = transformers.StableLmConfig(**TEXT, num_key_value_heads=2)
    config.is_causal = False
    stable = transformers.StableLmForCausalLM(config)
    same(stable, lambda: stable(ids(), use_cache=False).logits)


def test_a_causal_pattern_for_a_module_that_is_not():
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "intermediate_size": 48, "num_attention_heads": 4},
        image_token_index=61, projection_dim=32,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    same(model, lambda: model(ids()).logits)
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**TEXT))
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    options |= {"eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
    mask = torch.ones(1, 11, dtype=torch.long)
    same(bert, lambda: torch.cat(bert.generate(ids(), attention_mask=mask, **options).scores))
