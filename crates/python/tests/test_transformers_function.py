"""qkv.transformers' attention function by itself: against transformers' own on torch, and against the formula."""

import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qkv.transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def tensors(batch=2, heads=4, kv_heads=2, q_len=6, kv_len=6, size=8):
    g = torch.Generator().manual_seed(9)
    query = torch.randn(batch, heads, q_len, size, generator=g)
    key, value = (torch.randn(batch, kv_heads, kv_len, size, generator=g) for _ in range(2))
    module = types.SimpleNamespace(is_causal=True, num_key_value_groups=heads // kv_heads)
    return module, query, key, value


@pytest.mark.parametrize("q_len,kv_len", [(6, 6), (1, 9), (4, 9)])
@pytest.mark.parametrize("mask", [None, "bool", "float", "row"])
@pytest.mark.parametrize("position_bias", [False, True])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_like_transformers_sdpa(q_len, kv_len, mask, position_bias, is_causal):
    module, query, key, value = tensors(q_len=q_len, kv_len=kv_len)
    g = torch.Generator().manual_seed(10)
    if mask == "bool":
        mask = torch.rand(2, 1, q_len, kv_len, generator=g) > 0.4
        mask[..., 0] = True
    elif mask == "float":
        mask = torch.randn(2, 1, q_len, kv_len, generator=g)
    elif mask == "row":
        mask = torch.rand(2, 1, 1, kv_len, generator=g) > 0.4
        mask[..., 0] = True
    bias = torch.randn(1, 4, q_len, kv_len, generator=g) if position_bias else None
    options = {"scaling": 0.3, "is_causal": is_causal, "position_bias": bias}
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    actual, _ = qkv.transformers.attention_forward(module, query, key, value, mask, **options)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)


def reference(query, key, value, scaling, visible, softcap=None, sinks=None):
    """The formula in float64; `visible` (batch, 1 or heads, q_len, kv_len)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.double() if sinks.dim() == 4 else sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).float()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
def test_keywords(is_causal, padded):
    module, query, key, value = tensors(q_len=7, kv_len=7)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    distance = torch.arange(7)[:, None] - torch.arange(7)
    visible = (distance < 3) & ((distance >= 0) if is_causal else (distance > -3))
    visible = visible.expand(2, 1, 7, 7)
    mask = None
    if padded:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[0, 6:] = 0
        mask[1, :1] = 0
        visible = visible & mask.bool()[:, None, None, :]
    options = {"scaling": 0.4, "is_causal": is_causal, "sliding_window": 3, "softcap": 1.5, "s_aux": sinks}
    actual, _ = qkv.transformers.attention_forward(module, query, key, value, mask, **options)
    expected = reference(query, key, value, 0.4, visible, softcap=1.5, sinks=sinks)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)


def test_sinks_of_each_query():
    module, query, key, value = tensors()
    sinks = torch.randn(2, 4, 6, 1, generator=torch.Generator().manual_seed(11))
    visible = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    actual, _ = qkv.transformers.attention_forward(module, query, key, value, None, scaling=0.4, sinks=sinks)
    assert actual.is_contiguous()
    expected = reference(query, key, value, 0.4, visible, sinks=sinks)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)
    half = [t.to(torch.bfloat16) for t in (query, key, value)]
    actual, _ = qkv.transformers.attention_forward(module, *half, None, scaling=0.4, sinks=sinks.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=4e-2, rtol=4e-2)


def test_a_learned_scale_and_a_query_for_the_whole_batch():
    module, query, key, value = tensors()
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1)
    actual, _ = qkv.transformers.attention_forward(module, query[:1], key, value, None, scaling=scale, is_causal=False)
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    expected = reference(query[:1].expand(2, -1, -1, -1), key, value, scale, everything)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    "name,value",
    [
        ("dropout", 0.1),
        ("output_attentions", True),
        ("cache", object()),
        ("indices", torch.zeros(1)),
        ("block_indices", torch.zeros(1)),
        ("sinks", torch.zeros(4)),
        ("head_gate", torch.ones(4)),
    ],
)
def test_refused(name, value):
    with pytest.raises(NotImplementedError, match=f"{name}.*not supported"):
        qkv.transformers.attention_forward(*tensors(), None, **{name: value})


def eager_attention_forward(module, query, key, value, attention_mask, scaling, steps=None, **kwargs):
    """Stands beside `Gated`, as in the files of transformers."""


class Gated:
    is_causal = True


@pytest.mark.parametrize("compiled", [False, True])
def test_what_the_models_own_attention_takes(compiled):
    """An argument that the model's eager attention computes with is refused; what is passed on is not."""
    _, query, key, value = tensors()
    module = Gated()

    def run(**options):
        return qkv.transformers.attention_forward(module, query, key, value, None, **options)[0]

    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, backend="eager")
    expected = run()
    passed_on = {
        "steps": None,
        "use_cache": True,
        "position_ids": torch.arange(6),
        "cache_position": torch.arange(6),
        "position_embeddings": (torch.ones(6, 8), torch.ones(6, 8)),
        "encoder_hidden_states": torch.ones(2, 3, 32),
        "cu_seq_lens_q": torch.tensor([0, 6]),
        "max_length_q": 6,
        "output_hidden_states": True,
        "an_input_of_the_caller": torch.ones(2),
    }
    assert torch.equal(run(**passed_on), expected)
    with pytest.raises(NotImplementedError, match="steps.*Gated.*not supported"):
        run(steps=3)
