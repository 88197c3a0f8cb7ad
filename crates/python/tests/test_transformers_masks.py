"""qkv.transformers' mask function against transformers' own, pair by pair.

The oracle is `sdpa_mask` told to fill in every mask. What the pair of functions here does is found by running the
attention function on queries and keys that make every visible key's weight show in the output.
"""

import types
import zlib

import pytest

torch = pytest.importorskip("torch")
masking_utils = pytest.importorskip("transformers.masking_utils")

import qkv.transformers
from qkv._mask import CompactMask


def visible(mask, batch, q_len, kv_len, is_causal):
    """Which pairs (batch, q_len, kv_len) take part, read from the attention function's output.

    All scores are 0, so the output of a row is the mean of the one-hot values of the keys that it sees.
    """
    module = types.SimpleNamespace(is_causal=is_causal)
    query = torch.zeros(batch, 2, q_len, 8)
    key = torch.zeros(batch, 1, kv_len, 8)
    value = torch.eye(kv_len).expand(batch, 1, kv_len, kv_len)
    out, weights = qkv.transformers.attention_forward(module, query, key, value, mask)
    assert weights is None and out.shape == (batch, q_len, 2, kv_len) and out.is_contiguous()
    assert torch.equal(out[:, :, 0], out[:, :, 1])
    return out[:, :, 0] > 0


def check(causal, batch, q_len, kv_len, **kwargs):
    """Compares one mask, and returns it."""
    skip = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
    mask = qkv.transformers.attention_mask(batch, q_len, kv_len, **kwargs, **skip)
    expected = masking_utils.sdpa_mask(batch, q_len, kv_len, **kwargs, allow_is_causal_skip=False)
    expected = expected.expand(batch, 1, q_len, kv_len)
    # First what is computed with it, then its values: a mask that has been filled in is no longer read as compact.
    assert torch.equal(visible(mask, batch, q_len, kv_len, causal), expected[:, 0])
    if isinstance(mask, CompactMask):
        assert mask.filled is None and torch.equal(mask.fill(), expected)
        assert mask.shape == expected.shape and mask.dtype == torch.bool
    elif mask is not None:
        assert torch.equal(mask, expected)
    return mask


def padding(generator, batch, length, kind):
    """A 2-D padding mask: random runs on the left, on the right, or single holes."""
    if kind is None:
        return None
    if kind == "holes":
        return torch.rand(batch, length, generator=generator) > 0.3
    kept = torch.randint(0, length + 1, (batch, 1), generator=generator)
    position = torch.arange(length)[None]
    return position < kept if kind == "right" else position >= length - kept


def functions(left_padding):
    m = masking_utils
    return {
        "causal": (True, m.causal_mask_function, None),
        "window 1": (True, m.sliding_window_causal_mask_function(1), 1),
        "window 4": (True, m.sliding_window_causal_mask_function(4), 4),
        "window 40": (True, m.sliding_window_causal_mask_function(40), 40),
        "chunk 5": (True, m.chunked_causal_mask_function(5, left_padding), 5),
        "chunk 40": (True, m.chunked_causal_mask_function(40, left_padding), 40),
        "both ways": (False, m.bidirectional_mask_function, None),
        "both ways, window 3": (False, m.sliding_window_bidirectional_mask_function(3), 3),
        "both ways, window 40": (False, m.sliding_window_bidirectional_mask_function(40), 40),
    }


@pytest.mark.parametrize("name", list(functions(None)))
@pytest.mark.parametrize("kind", [None, "left", "right", "holes"])
def test_random(name, kind):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {kind}".encode()))

    def pick(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(60):
        batch, q_len = pick(1, 4), pick(1, 12)
        q_offset = pick(0, 3) * pick(0, 8)
        kv_offset = pick(0, 2) * pick(0, q_offset + 1)
        # A cache that has grown to the queries' end, or a static one with room behind it.
        kv_len = q_offset - kv_offset + q_len + pick(0, 2) * pick(0, 6)
        mask = padding(generator, batch, q_offset + q_len, kind)
        left = torch.zeros(batch, dtype=torch.long)
        if mask is not None:
            left = (mask.cumsum(-1) == 0).sum(-1)
        causal, function, size = functions(left)[name]
        as_tensor = pick(0, 2)
        check(
            causal,
            batch,
            q_len,
            kv_len,
            q_offset=torch.tensor(q_offset) if as_tensor else q_offset,
            kv_offset=kv_offset,
            mask_function=function,
            attention_mask=mask,
            local_size=size,
        )


def test_none_only_where_it_cannot_be_read_otherwise():
    m = masking_utils
    assert check(True, 2, 1, 9, q_offset=8) is None
    assert check(False, 2, 1, 9, mask_function=m.bidirectional_mask_function) is None
    # A module may say that it is not causal, or may cut its queries.
    plain = check(True, 2, 7, 7)
    for same in (
        check(True, 2, 7, 7, attention_mask=torch.ones(2, 7, dtype=torch.bool)),
        check(True, 2, 7, 7, mask_function=m.sliding_window_causal_mask_function(7), local_size=7),
        # The prompt of a static cache: keys that are not filled yet lie behind the last query.
        check(True, 2, 7, 32, q_offset=torch.tensor(0)),
    ):
        for mask in (plain, same):
            assert isinstance(mask, CompactMask) and (mask.offset, mask.window, mask.padding) == (0, (None, None), None)
    # Or that it is, and be asked to look both ways.
    both = check(False, 2, 7, 9, mask_function=m.bidirectional_mask_function)
    assert isinstance(both, CompactMask) and both.hides_nothing


def test_compact_forms():
    m = masking_utils
    later = check(True, 2, 4, 12, q_offset=8)
    assert isinstance(later, CompactMask) and later.offset == 8 and later.padding is None
    window = check(True, 1, 9, 9, mask_function=m.sliding_window_causal_mask_function(4), local_size=4)
    assert isinstance(window, CompactMask) and window.window == (3, None)
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[0, :4] = False
    padded = check(True, 2, 9, 9, attention_mask=pad)
    assert isinstance(padded, CompactMask) and padded.window == (None, None) and padded.padding.shape == (2, 9)
    both = check(False, 2, 9, 9, attention_mask=pad, mask_function=m.bidirectional_mask_function)
    assert both.stride()[2] == 0 and both.untyped_storage().nbytes() <= 18


def test_what_is_not_recognised_is_filled_in():
    m = masking_utils

    def prefix(batch, head, query, key):
        return key < 3

    for function in (
        m.or_masks(m.causal_mask_function, prefix),
        m.and_masks(m.causal_mask_function, prefix),
        m.and_masks(m.sliding_window_overlay(3), prefix),
        prefix,
    ):
        assert type(check(True, 2, 6, 6, mask_function=function)) is torch.Tensor
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1], [0, 0, -1, 1, 1, 1]])
    function = m.or_masks(m.causal_mask_function, m.blockwise_overlay(blocks))
    assert type(check(True, 2, 6, 6, mask_function=function)) is torch.Tensor


def test_the_model_may_ask_for_values():
    mask = qkv.transformers.attention_mask(2, 6, 6, allow_is_causal_skip=False)
    assert type(mask) is torch.Tensor and mask.shape == (2, 1, 6, 6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "family,causal",
    [("Llama", None), ("GptOss", torch.bool), ("PegasusX", torch.bool), ("NllbMoe", torch.float32), (None, torch.bool)],
)
def test_the_mask_is_one_that_the_model_understands(family, causal, compiled):
    """None and boolean masks only for models that are written for them."""
    import transformers

    qkv.transformers.register()
    if family is None:
        config = types.SimpleNamespace(is_causal=True)
    else:
        # Loads the models as well, without which there is nobody to ask.
        config = getattr(transformers, f"{family}Config")()
        assert getattr(transformers, f"{family}PreTrainedModel")._supports_sdpa == (family == "Llama")
    config._attn_implementation = "qkv"

    def masks(embeds, padding):
        return (
            masking_utils.create_causal_mask(config, embeds, None, None),
            masking_utils.create_causal_mask(config, embeds, padding, None),
            masking_utils.create_bidirectional_mask(config, embeds, None),
            masking_utils.create_bidirectional_mask(config, embeds, padding),
        )

    if compiled:
        torch.compiler.reset()
        masks = torch.compile(masks, fullgraph=True, backend="eager")
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[0, 5:] = 0
    plain, padded, both, both_padded = masks(torch.zeros(2, 7, 4), padding)

    lower = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    row = padding.bool()[:, None, None, :].expand(2, 1, 7, 7)
    additive = causal == torch.float32
    if family == "Llama" and not compiled:
        assert isinstance(plain, CompactMask) and isinstance(both, CompactMask)
    else:
        assert (None if plain is None else plain.dtype) == causal
        assert both is None or isinstance(both, CompactMask) and not compiled and not additive
    for mask, expected in ((plain, lower), (padded, lower & row), (both, torch.ones_like(lower)), (both_padded, row)):
        if mask is None:
            continue
        assert mask.dtype == (torch.float32 if additive else torch.bool)
        if additive:
            expected = torch.where(expected, 0.0, torch.finfo(torch.float32).min)
        assert torch.equal(mask.fill() if isinstance(mask, CompactMask) else mask, expected)
    assert both_padded.stride(2) == 0


def test_packed_sequences():
    config = types.SimpleNamespace(_attn_implementation="qkv", is_causal=True)
    qkv.transformers.register()
    embeds = torch.zeros(1, 7, 4)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    mask = masking_utils.create_causal_mask(config, embeds, None, None, position_ids)
    segment = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    expected = (segment[:, None] == segment) & torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.equal(visible(mask, 1, 7, 7, True)[0], expected)


# --- CompactMask as a tensor -------------------------------------------------------------------------------------


def compact():
    pad = torch.ones(2, 7, dtype=torch.bool)
    pad[0, :2] = False
    return CompactMask(2, 5, 7, offset=2, window=(3, None), padding=pad)


def test_compact_mask_is_a_tensor_of_its_shape():
    mask = compact()
    assert isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.shape == (2, 1, 5, 7) and mask.dim() == 4 and mask.filled is None
    assert mask.contiguous() is mask and mask.to("cpu") is mask and mask.to(torch.bool) is mask
    assert mask.filled is None, "nothing so far needs values"
    assert "offset=2" in repr(mask) and mask.filled is None


def test_operations_see_values():
    expected = torch.tensor([[key <= query + 2 and key >= query - 1 for key in range(7)] for query in range(5)])
    mask = compact()
    full = mask.fill()
    assert torch.equal(full[1, 0], expected)
    assert torch.equal(full[0, 0], expected & (torch.arange(7) >= 2))
    for operation in (
        lambda m: m[:, :, :, :3],
        lambda m: ~m,
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: m.to(torch.float32) * 2,
        lambda m: torch.cat([m, m], -1),
        lambda m: m.expand(2, 4, 5, 7),
        lambda m: m & torch.ones(7, dtype=torch.bool),
        lambda m: torch.ones(2, 1, 5, 7).masked_fill(m, 3.0),
        lambda m: torch.tensor(m.tolist()),
        lambda m: torch.from_numpy(m.numpy()),
    ):
        result = operation(compact())
        assert type(result) is torch.Tensor and torch.equal(result, operation(full))


def test_a_write_stays():
    mask = compact()
    mask[:, :, :, 0] = True
    assert not mask.compact
    expected = compact().fill().clone()
    expected[:, :, :, 0] = True
    assert torch.equal(mask.fill(), expected)
    assert torch.equal(visible(mask, 2, 5, 7, True), expected[:, 0])


def test_copies_are_ordinary_tensors():
    import copy
    import pickle

    for copied in (copy.deepcopy(compact()), pickle.loads(pickle.dumps(compact())), compact().clone()):
        assert type(copied) is torch.Tensor and torch.equal(copied, compact().fill())


def test_compact_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="attention_mask"):
        visible(compact(), 2, 5, 8, True)
