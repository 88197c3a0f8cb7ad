"""qkv.scaled_dot_product_attention: against torch's, over random configurations, and against float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import oracle
import qkv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def torchs(q, k, v, mask=None, **options):
    """torch's function in float64, on the same values. By its plain way: the fused one gives NaN for a negative scale
    together with is_causal."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, **options)


def check(given, expected, v):
    assert given.dtype in DTYPES and given.shape == expected.shape
    # torch gives NaN to a row without keys in some of its kernels; here it is 0, always.
    expected = torch.nan_to_num(expected, nan=0.0).numpy()
    largest = max(1.0, v.abs().max().item()) if v.numel() else 1.0
    oracle.close(given, expected, largest=largest, terms=4)


def random_tensor(generator, rng, shape, dtype):
    """A tensor of that shape with its axes (not the last) in some order in memory, perhaps a slice of a larger one."""
    lead = len(shape) - 1
    order = rng.permutation(lead)
    room = [shape[i] for i in order] + [shape[-1]]
    start = 0
    if rng.random() < 0.3:
        room[-1] += 3
        start = int(rng.integers(0, 4))
    x = torch.randn(room, generator=generator).to(dtype)[..., start : start + shape[-1]]
    return x.permute(*np.argsort(order).tolist(), lead)


def configuration(seed):
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % 3]
    rank = int(rng.choice([2, 3, 4, 4, 4, 5, 6]))
    lead = [int(rng.integers(1, 4)) for _ in range(rank - 2)]
    m, n = int(rng.integers(1, 50)), int(rng.integers(1, 90))
    d, dv = int(rng.choice([1, 7, 16, 33, 64])), int(rng.choice([3, 16, 40, 64]))
    grouped = rank >= 3 and rng.random() < 0.4
    q_lead, k_lead = list(lead), list(lead)
    if grouped:
        q_lead[-1] = k_lead[-1] * int(rng.integers(1, 4))
    elif rng.random() < 0.5:
        for axis in range(rank - 2):
            which = rng.integers(0, 3)
            if which == 1:
                q_lead[axis] = 1
            elif which == 2:
                k_lead[axis] = 1
    q = random_tensor(generator, rng, [*q_lead, m, d], dtype)
    k = random_tensor(generator, rng, [*k_lead, n, d], dtype)
    v = random_tensor(generator, rng, [*k_lead, n, dv], dtype)
    options = {}
    if grouped:
        options["enable_gqa"] = True
    if rng.random() < 0.4:
        options["scale"] = float(rng.uniform(-1, 1))
    mask = None
    kind = rng.choice(["none", "causal", "bool", "float", "float32"])
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        full = [*np.broadcast_shapes(q_lead, k_lead), m, n] if not grouped else [*q_lead, m, n]
        full = full[int(rng.integers(0, rank - 1)) :]
        sizes = [1 if rng.random() < 0.3 else size for size in full]
        if kind == "bool":
            mask = torch.rand(sizes, generator=generator) < 0.7
        else:
            mask = torch.randn(sizes, generator=generator).to(dtype if kind == "float" else torch.float32)
        if rng.random() < 0.5:
            mask = mask.expand(full)
    return q, k, v, mask, options


@pytest.mark.parametrize("block", range(10))
def test_400_random_configurations_as_torch(block):
    for seed in range(block * 40, block * 40 + 40):
        q, k, v, mask, options = configuration(seed)
        expected = torchs(q, k, v, mask, **options)
        given = qkv.scaled_dot_product_attention(q, k, v, mask, **options)
        try:
            assert type(given) is torch.Tensor and given.dtype == q.dtype
            check(given, expected, v)
            if q.dtype != torch.bfloat16:
                arrays = [None if x is None else x.numpy() for x in (q, k, v, mask)]
                of_numpy = qkv.scaled_dot_product_attention(*arrays, **options)
                assert type(of_numpy) is np.ndarray
                np.testing.assert_array_equal(of_numpy, given.numpy())
        except AssertionError as error:
            shapes = [None if x is None else (tuple(x.shape), x.stride()) for x in (q, k, v, mask)]
            raise AssertionError(f"seed {seed}: {q.dtype} {shapes} {options}") from error


def test_not_worse_than_torch_in_the_same_type():
    """Error against float64, beside torch's own in float32."""
    generator = torch.Generator().manual_seed(1)
    for d, causal in ((64, False), (64, True), (128, False)):
        q, k, v = (torch.randn(2, 4, 300, d, generator=generator) for _ in range(3))
        exact = torchs(q, k, v, is_causal=causal)
        ours = (qkv.scaled_dot_product_attention(q, k, v, is_causal=causal) - exact).abs().max()
        its = (functional.scaled_dot_product_attention(q, k, v, is_causal=causal) - exact).abs().max()
        assert ours <= 4 * its


def test_positional_arguments_are_torchs(rng):
    q = torch.randn(1, 2, 3, 4)
    expected = functional.scaled_dot_product_attention(q, q, q, None, 0.0, True, scale=0.3, enable_gqa=False)
    given = qkv.scaled_dot_product_attention(q, q, q, None, 0.0, True, 0.3, False)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 6)),
        ((2, 2, 0, 4), (2, 2, 5, 4), (2, 2, 5, 6)),
        ((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 6)),
        ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 0)),
        ((3, 4), (5, 4), (5, 6)),
        ((1, 1), (1, 1), (1, 1)),
        ((1, 0, 2, 3, 4), (7, 1, 2, 5, 4), (7, 1, 2, 5, 6)),
    ],
)
def test_empty_and_small(shapes):
    q, k, v = (torch.ones(shape) for shape in shapes)
    check(qkv.scaled_dot_product_attention(q, k, v), torchs(q, k, v), v)


def test_a_row_that_a_mask_hides_is_0():
    q = torch.randn(1, 1, 2, 4)
    mask = torch.tensor([[True, False], [False, False]])
    out = qkv.scaled_dot_product_attention(q, q, q, mask)
    assert (out[0, 0, 1] == 0).all() and torch.equal(out[0, 0, 0], q[0, 0, 0])


def test_nan_behind_a_mask_is_ignored():
    q = torch.randn(1, 1, 3, 4)
    k = q.clone()
    k[0, 0, 2] = float("nan")
    mask = torch.tensor([True, True, False])
    out = qkv.scaled_dot_product_attention(q, k, k, mask)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(q, k[:, :, :2], k[:, :, :2]))


def raises(error, match, *arguments, **options):
    with pytest.raises(error, match=match):
        qkv.scaled_dot_product_attention(*arguments, **options)


def test_refusals():
    q = torch.randn(2, 4, 5, 8)
    raises(NotImplementedError, r"dropout_p: .*not supported", q, q, q, dropout_p=0.1)
    raises(ValueError, "dropout_p: -1", q, q, q, dropout_p=-1)
    raises(ValueError, "dropout_p: NaN", q, q, q, dropout_p=float("nan"))
    raises(TypeError, "dropout_p: 'x'", q, q, q, dropout_p="x")
    raises(ValueError, "attn_mask: a mask together with is_causal", q, q, q, torch.ones(5, 5, dtype=bool), is_causal=True)
    raises(ValueError, r"attn_mask: shape \[4, 5\]", q, q, q, torch.ones(4, 5, dtype=bool))
    raises(ValueError, r"attn_mask: shape \[1, 2, 4, 5, 5\]", q, q, q, torch.ones(1, 2, 4, 5, 5, dtype=bool))
    raises(TypeError, "attn_mask: an array of uint8", q, q, q, torch.ones(5, 5, dtype=torch.uint8))
    raises(TypeError, "attn_mask: an array of float16", q, q, q, torch.ones(5, 5, dtype=torch.float16))
    raises(ValueError, "value: shape .* the length", q, q, q[:, :, :4])
    raises(ValueError, "key: shape .* the last axis", q, q[..., :7], q)
    raises(ValueError, "key: .*axes that broadcast", q, torch.randn(3, 4, 5, 8), q)
    raises(ValueError, "key: .*enable_gqa is not set", q, q[:, :2], q[:, :2])
    raises(ValueError, "query: 4 heads .* multiple of the 3", q, q[:, :3], q[:, :3], enable_gqa=True)
    raises(ValueError, "value: .* heads", q, q[:, :2], q[:, :1], enable_gqa=True)
    raises(ValueError, "query: shape .*at least 3 axes", q[0, 0], q[0, 0], q[0, 0], enable_gqa=True)
    raises(ValueError, "query: shape .*at least 2 axes", q[0, 0, 0], q, q)
    raises(TypeError, "query: an array of float64", q.double(), q, q)
    raises(TypeError, "value: an array of int64", q, q, q.long())
    raises(TypeError, "key: NoneType", q, None, q)
    raises(ValueError, "scale: inf", q, q, q, scale=float("inf"))
    raises(TypeError, "is_causal: 1", q, q, q, is_causal=1)
    raises(TypeError, "enable_gqa: 'no'", q, q, q, enable_gqa="no")
    raises(ValueError, "query: a tensor that requires a gradient.*qkv.torch", q.clone().requires_grad_(), q, q)
    raises(ValueError, "attn_mask: a tensor that requires a gradient", q, q, q, torch.ones(5, 5, requires_grad=True))
    raises(ValueError, "query: head dim is 0", q[..., :0], q[..., :0], q)
