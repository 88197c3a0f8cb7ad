"""transformers models from small random configurations: attn_implementation="qkv" against "eager".

Logits of every token that is not padding agree, and greedy decoding gives the same tokens, with and without padding,
with growing and static caches, and with the prompt fed in pieces.
"""

import functools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import qkv.transformers
from qkv._mask import CompactMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

qkv.transformers.register()
transformers.logging.set_verbosity_error()

VOCABULARY = 97
PROMPT = 13
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Tied embeddings make a random model repeat its last token.
    "tie_word_embeddings": False,
    **SPECIAL,
}
# Every window and chunk below is shorter than the prompt.
LANGUAGE_MODELS = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2", None),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 6}),
    "llama4": (
        "Llama4",
        {
            "head_dim": 8,
            "attention_chunk_size": 6,
            "num_local_experts": 2,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
        },
    ),
    "opt": ("OPT", None),
    "cohere2": ("Cohere2", {"sliding_window": 5, "num_hidden_layers": 4}),
    "doge": ("Doge", {}),
    "mixtral": ("Mixtral", {"sliding_window": 5, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
}
# transformers refuses "sdpa" for these.
LANGUAGE_MODELS |= {
    # Joins its mask to another, and has three kinds of layers.
    "deepseek_v4": (
        "DeepseekV4",
        {
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "sliding_window": 5,
            "head_dim": 8,
            "q_lora_rank": 16,
            "o_lora_rank": 16,
            "o_groups": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    # A sink for every query.
    "inkling2": (
        "Inkling2",
        {
            "head_dim": 8,
            "unpadded_vocab_size": VOCABULARY,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "sliding_window": 5,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
}
OWN_SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
}


def randomise(model, seed=0):
    """Weights large enough that attention is far from uniform and the greedy tokens vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sink" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif name.endswith("router.bias"):
                # The model's own draw is another in every process, and near ties between experts are decided by rounding:
                # two ways that differ in the last bits of bfloat16 would go to other experts, and differ by far more.
                parameter.copy_(torch.arange(parameter.numel()) * 10.0)
    return model.eval()


@functools.cache
def language_model(name):
    family, options = LANGUAGE_MODELS[name]
    sizes = {**SMALL, **options} if options is not None else {"vocab_size": VOCABULARY, **SPECIAL, **OWN_SIZES[name]}
    text = "Text" if family in ("Gemma3", "Llama4", "Inkling2") else ""
    config = getattr(transformers, f"{family}{text}Config")(**sizes)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return randomise(getattr(transformers, f"{family}{head}")(config))


def prompt(padding, seed=1):
    """(tokens, mask) of three sequences; with padding the second and third are shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    for row, missing in ((1, 4), (2, 7)):
        if padding == "left":
            mask[row, :missing] = 0
        elif padding == "right":
            mask[row, -missing:] = 0
    return ids * mask, mask


class Calls:
    """Counts the attention calls that come here, and keeps their masks."""

    def __init__(self, monkeypatch):
        self.masks = []
        self.lengths = []
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "qkv", self)

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.masks.append(attention_mask)
        self.lengths.append(query.shape[2])
        return qkv.transformers.attention_forward(module, query, key, value, attention_mask, **kwargs)


def both(model, run):
    """`run` with eager's attention and with this one."""
    results = []
    with torch.no_grad():
        for implementation in ("eager", "qkv"):
            model.set_attn_implementation(implementation)
            results.append(run())
    return results


def assert_close(actual, expected, tolerance=2e-5):
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits(name, padding, monkeypatch):
    calls = Calls(monkeypatch)
    ids, mask = prompt(padding)
    model = language_model(name)
    expected, actual = both(model, lambda: model(ids, attention_mask=None if padding is None else mask).logits)
    assert calls.masks, "the attention function was not called"
    assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2", "qwen2"])
def test_logits_bfloat16(name):
    ids, mask = prompt("left")
    model = language_model(name)
    exact = both(model, lambda: model(ids, attention_mask=mask).logits)[0]
    try:
        model.to(torch.bfloat16)
        expected, actual = both(model, lambda: model(ids, attention_mask=mask).logits)
    finally:
        language_model.cache_clear()
    assert actual.dtype == torch.bfloat16
    # Both round to bfloat16 in many places. Against float32, this way is as near as eager is (which rounds the
    # weights of the softmax too), and nearer than a fixed bound.
    own, eager = ((x[mask.bool()].float() - exact[mask.bool()]).abs().mean() for x in (actual, expected))
    assert own <= 1.5 * eager + 1e-3
    assert eager < 0.1 * exact.abs().max()


# Everything for the models with something of their own, less for those that repeat it.
CORE = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2")
GREEDY = [(n, p, c) for n in CORE for p in (None, "left") for c in ("dynamic", "static", "pieces", "none")] + [
    (n, "left", c) for n in LANGUAGE_MODELS if n not in CORE for c in ("dynamic", "static", "pieces")
]
# transformers has no static cache for these.
GREEDY = [g for g in GREEDY if g[0] not in ("deepseek_v4", "inkling2") or g[2] != "static"]


@pytest.mark.parametrize("name,padding,cache", GREEDY)
def test_greedy_tokens(name, padding, cache):
    ids, mask = prompt(padding)
    model = language_model(name)
    options = {
        "dynamic": {"cache_implementation": "dynamic"},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "pieces": {"prefill_chunk_size": 4},
        "none": {"use_cache": False},
    }[cache]
    expected, actual = both(
        model,
        lambda: model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None, **options),
    )
    assert actual.shape == (3, PROMPT + 10)
    assert torch.equal(actual, expected)
    assert len(set(actual[:, PROMPT:].flatten().tolist())) > 3, "the tokens say nothing"


# --- which masks are built ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "opt"])
def test_no_mask_for_plain_causal(name, monkeypatch):
    calls = Calls(monkeypatch)
    ids, mask = prompt(None)
    model = language_model(name)
    for given in (None, mask):
        both(model, lambda given=given: model(ids, attention_mask=given).logits)
    both(model, lambda: model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))
    several = [m for m, n in zip(calls.masks, calls.lengths) if n > 1]
    assert several and all(isinstance(m, CompactMask) and m.filled is None for m in several)
    single = [m for m, n in zip(calls.masks, calls.lengths) if n == 1]
    assert single and all(m is None for m in single)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_no_mask_is_filled_in(name, padding, monkeypatch):
    calls = Calls(monkeypatch)
    ids, mask = prompt(padding)
    model = language_model(name)
    both(model, lambda: model(ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "prefill_chunk_size": 4}
    both(model, lambda: model.generate(ids, attention_mask=mask, **options))
    compact = [m for m in calls.masks if m is not None]
    assert compact and all(isinstance(m, CompactMask) and m.filled is None for m in compact)
    assert any(1 < n < PROMPT for n in calls.lengths), "the prompt was not fed in pieces"


# --- other kinds of model ----------------------------------------------------------------------------------------

ENCODERS = {
    "Bert": {"num_key_value_heads": None},
    "Roberta": {},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "ModernBert": {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    # Its attention does not say whether it is causal.
    "Splinter": {},
}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, padding, monkeypatch):
    calls = Calls(monkeypatch)
    sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **ENCODERS[family]})
    model = randomise(getattr(transformers, f"{family}Model")(config))
    ids, mask = prompt(padding)
    given = None if padding is None else mask
    expected, actual = both(model, lambda: model(ids, attention_mask=given).last_hidden_state)
    assert calls.masks
    assert_close(actual[mask.bool()], expected[mask.bool()])
    # Padding alone is one row in memory, not a square.
    for m in calls.masks:
        assert m is None or isinstance(m, CompactMask) or m.stride(2) == 0


def test_bert_as_a_decoder_with_cross_attention(monkeypatch):
    calls = Calls(monkeypatch)
    sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    config = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    model = randomise(transformers.BertLMHeadModel(config))
    ids, mask = prompt("left")
    seen = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(2))
    seen_mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0]])
    for given in ({}, {"encoder_attention_mask": seen_mask}):
        expected, actual = both(
            model, lambda given=given: model(ids, attention_mask=mask, encoder_hidden_states=seen, **given).logits
        )
        assert_close(actual[mask.bool()], expected[mask.bool()])
    assert len(calls.masks) == 8


SEQ2SEQ = {
    "T5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "Bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
            "forced_eos_token_id": None,
        },
    ),
}


# transformers refuses "sdpa" for these: their decoders say that they are not causal, and rely on their mask.
BART_SIZES = {k: v for k, v in SEQ2SEQ["Bart"][1].items() if k != "forced_eos_token_id"}
WITHOUT_SDPA = {
    "PegasusX": BART_SIZES,
    # Its encoder adds the mask to its own scores.
    "BigBirdPegasus": {**BART_SIZES, "attention_type": "original_full"},
    "NllbMoe": {**BART_SIZES, "num_experts": 2, "expert_capacity": 100},
}
SEQ2SEQ |= {family: (f"{family}ForConditionalGeneration", sizes) for family, sizes in WITHOUT_SDPA.items()}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoder(family, padding, cache, monkeypatch):
    calls = Calls(monkeypatch)
    head, sizes = SEQ2SEQ[family]
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, decoder_start_token_id=1, **SPECIAL, **sizes)
    model = randomise(getattr(transformers, head)(config))
    ids, mask = prompt(padding)
    given = None if padding is None else mask
    target = prompt(None, seed=5)[0][:, :9]
    expected, actual = both(model, lambda: model(ids, attention_mask=given, decoder_input_ids=target).logits)
    # Some encoders have an attention of their own.
    assert len(calls.masks) >= (4 if family in ("PegasusX", "BigBirdPegasus") else 6)
    assert_close(actual, expected)
    expected, actual = both(
        model,
        lambda: model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            disable_compile=True,
            cache_implementation=None if cache == "dynamic" else cache,
        ),
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", WITHOUT_SDPA)
def test_later_tokens_change_nothing_before(family):
    head, sizes = SEQ2SEQ[family]
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, decoder_start_token_id=1, **SPECIAL, **sizes)
    model = randomise(getattr(transformers, head)(config))
    model.set_attn_implementation("qkv")
    ids = prompt(None)[0]
    target = prompt(None, seed=5)[0][:, :6]
    other = target.clone()
    other[:, -1] = (target[:, -1] - 3 + 7) % (VOCABULARY - 3) + 3
    with torch.no_grad():
        before, after = (model(ids, decoder_input_ids=t, use_cache=False).logits for t in (target, other))
    assert_close(after[:, :-1], before[:, :-1], 1e-6)
    assert (after[:, -1] - before[:, -1]).abs().max() > 0.1


def test_vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    model = randomise(transformers.ViTModel(config))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected, actual = both(model, lambda: model(pixels).last_hidden_state)
    assert_close(actual, expected)


def test_whisper():
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=30,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        **SPECIAL,
    )
    model = randomise(transformers.WhisperForConditionalGeneration(config))
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(4))
    target = prompt(None)[0][:2]
    expected, actual = both(model, lambda: model(features, decoder_input_ids=target).logits)
    assert_close(actual, expected)


def test_images_that_see_both_ways():
    """Gemma 3's mask over token types: text is causal, the tokens of one image see each other."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    text = {**SMALL, "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 6}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=90, boi_token_id=91, eoi_token_id=92
    )
    model = randomise(transformers.Gemma3ForConditionalGeneration(config))
    ids = torch.randint(3, 80, (2, 14), generator=torch.Generator().manual_seed(6))
    ids[:, 3:7] = 90
    types_ = (ids == 90).long()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    expected, actual = both(model, lambda: model(ids, pixel_values=pixels, token_type_ids=types_).logits)
    assert_close(actual, expected)
    expected, actual = both(
        model,
        lambda: model.generate(
            ids, pixel_values=pixels, token_type_ids=types_, max_new_tokens=8, do_sample=False, eos_token_id=None
        ),
    )
    assert torch.equal(actual, expected)


def test_packed_sequences():
    ids, _ = prompt(None)
    position_ids = torch.cat([torch.arange(5), torch.arange(8)]).expand(3, -1)
    for name in ("llama", "mistral"):
        model = language_model(name)
        expected, actual = both(model, lambda model=model: model(ids, position_ids=position_ids, use_cache=False).logits)
        assert_close(actual, expected)


def test_mask_of_the_caller():
    ids, _ = prompt(None)
    own = torch.rand(3, 1, PROMPT, PROMPT, generator=torch.Generator().manual_seed(8)) > 0.5
    own |= torch.eye(PROMPT, dtype=torch.bool)
    model = language_model("llama")
    additive = torch.where(own, 0.0, torch.finfo(torch.float32).min)
    expected = both(model, lambda: model(ids, attention_mask=additive).logits)
    assert_close(expected[1], expected[0])
    actual = both(model, lambda: model(ids, attention_mask=own).logits)[1]
    assert_close(actual, expected[0])


# --- refusals and names ------------------------------------------------------------------------------------------


def test_training_mode_with_dropout_is_refused():
    config = transformers.LlamaConfig(**SMALL, attention_dropout=0.1, attn_implementation="qkv")
    model = transformers.LlamaForCausalLM(config).train()
    with pytest.raises(NotImplementedError, match="dropout"):
        model(prompt(None)[0])


@pytest.mark.parametrize("family,sizes", [("Bloom", {"n_layer": 1, "n_head": 4}), ("GPTNeoXJapanese", {})])
def test_an_attention_of_the_models_own_is_refused(family, sizes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, **sizes}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **sizes, attn_implementation="qkv")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with pytest.raises(NotImplementedError, match=f"{family}Config.*not supported"):
        model(prompt(None)[0])


def test_gradients_are_refused_in_backward():
    model = language_model("llama")
    model.set_attn_implementation("qkv")
    logits = model(prompt(None)[0]).logits
    assert logits.grad_fn is not None
    with pytest.raises(NotImplementedError, match="not supported"):
        logits.sum().backward()


def test_register():
    qkv.transformers.register("another_name")
    try:
        config = transformers.LlamaConfig(**SMALL, attn_implementation="another_name")
        model = transformers.LlamaForCausalLM(config)
        assert model.config._attn_implementation == "another_name"
        with torch.no_grad():
            model.eval()(prompt("left")[0], attention_mask=prompt("left")[1])
    finally:
        for table in (ALL_ATTENTION_FUNCTIONS, qkv.transformers.ALL_MASK_ATTENTION_FUNCTIONS):
            del table._global_mapping["another_name"]
    for name in ("", "eager", "sdpa", "my_flash", "a/b", "paged|qkv", "flex_attention"):
        with pytest.raises(ValueError, match="name"):
            qkv.transformers.register(name)
    with pytest.raises(TypeError, match="name"):
        qkv.transformers.register(3)
