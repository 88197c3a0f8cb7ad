"""What is taken for an array and what is not: strides, copies, DLPack's ins and outs, and everything that can be wrong."""

import gc
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

import oracle
import qkv
from exporters import Exporter, OldExporter


@pytest.fixture
def qkv_arrays(rng):
    return [rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (3, 5, 5)]


def raises(error, match, *arguments, **options):
    with pytest.raises(error, match=match):
        qkv.attention(*arguments, **options)


# -- strides ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_strides_are_read_in_place(rng, kind):
    room = rng.standard_normal((4, 10, 6, 3, 16)).astype(np.float32)
    fused = kind(room)
    for make in (
        lambda x, i: x[:2, :, :, i, :8].swapaxes(1, 2),
        lambda x, i: x[1::2, 2:9:2, :4, i, 4:12],
        lambda x, i: x[:1, :, :, i].swapaxes(1, 2),
    ):
        views = [make(fused, i) for i in range(3)]
        copies = [np.ascontiguousarray(make(room, i)) for i in range(3)]
        np.testing.assert_array_equal(np.asarray(qkv.attention(*views)), qkv.attention(*copies))


def test_negative_strides(qkv_arrays):
    q, k, v = qkv_arrays
    expected = qkv.attention(q, k, v)
    flipped = [np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1] for x in (q, k, v)]
    np.testing.assert_array_equal(qkv.attention(*flipped), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_strides_of_0(qkv_arrays, axis):
    shape = [3, 4, 5, 8]
    views = []
    for x in qkv_arrays:
        first = x[tuple(slice(0, 1) for _ in range(4))] if axis == 3 else x[..., :1, :1, :1, :]
        views.append(np.broadcast_to(first, shape))
    expected = qkv.attention(*(np.ascontiguousarray(x) for x in views))
    np.testing.assert_array_equal(qkv.attention(*views), expected)
    of_torch = qkv.attention(
        *(torch.from_numpy(x.copy()[:, :, :1]).expand(shape) if axis == 2 else torch.from_numpy(x.copy()) for x in views)
    )
    np.testing.assert_array_equal(of_torch.numpy(), expected)


@pytest.mark.parametrize("dtype", oracle.FLOATS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("step", [2, -1, -3])
def test_a_last_axis_that_is_not_contiguous_is_copied(rng, dtype, step):
    q, k, v = (rng.standard_normal((2, 2, n, 24)).astype(dtype)[..., ::step] for n in (3, 5, 5))
    expected = qkv.attention(*(np.ascontiguousarray(x) for x in (q, k, v)))
    np.testing.assert_array_equal(qkv.attention(q, k, v), expected)
    if dtype is not oracle.BF16 and step > 0:
        of_torch = qkv.attention(*(torch.from_numpy(np.ascontiguousarray(x).swapaxes(2, 3).copy()).mT for x in (q, k, v)))
        np.testing.assert_array_equal(of_torch.numpy(), expected)


def test_values_that_are_not_aligned_are_copied(qkv_arrays):
    def unaligned(x):
        room = np.zeros(x.nbytes + 1, np.uint8)
        view = room[1:].view(np.float32).reshape(x.shape)
        assert not view.flags.aligned
        view[...] = x
        return view

    expected = qkv.attention(*qkv_arrays)
    np.testing.assert_array_equal(qkv.attention(*map(unaligned, qkv_arrays)), expected)
    raises(ValueError, "out: values that are not aligned", *qkv_arrays, out=unaligned(expected))
    # A field of records: strides that are no multiple of a value.
    records = np.zeros(qkv_arrays[0].shape, np.dtype([("byte", "u1"), ("value", "f4")]))
    records["value"] = qkv_arrays[0]
    np.testing.assert_array_equal(qkv.attention(records["value"], *qkv_arrays[1:]), expected)


def test_inputs_may_be_read_only(qkv_arrays):
    expected = qkv.attention(*qkv_arrays)
    for x in qkv_arrays:
        x.flags.writeable = False
    np.testing.assert_array_equal(qkv.attention(*qkv_arrays), expected)


def test_inputs_are_not_changed(qkv_arrays):
    before = [x.copy() for x in qkv_arrays]
    qkv.attention(*qkv_arrays, causal="bottom_right", return_lse=True)
    qkv.matmul(qkv_arrays[0], qkv_arrays[1].swapaxes(2, 3))
    for x, y in zip(qkv_arrays, before):
        np.testing.assert_array_equal(x, y)


def test_masks_of_any_strides(rng, qkv_arrays):
    room = rng.random((5, 2, 3, 1)) < 0.6
    mask = room.transpose(3, 1, 2, 0)[:, ::-1]
    expected = qkv.attention(*qkv_arrays, mask=mask.copy())
    np.testing.assert_array_equal(qkv.attention(*qkv_arrays, mask=mask), expected)
    room = rng.random((3, 10)).astype(np.float32)
    bias = room[:, ::-2]
    expected = qkv.attention(*qkv_arrays, bias=bias.copy())
    np.testing.assert_array_equal(qkv.attention(*qkv_arrays, bias=bias), expected)
    slopes = np.arange(8, dtype=np.float32)[::-4]
    expected = qkv.attention(*qkv_arrays, alibi_slopes=slopes.copy(), sinks=slopes.copy())
    np.testing.assert_array_equal(qkv.attention(*qkv_arrays, alibi_slopes=slopes, sinks=slopes), expected)


# -- libraries -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", [Exporter, OldExporter])
@pytest.mark.parametrize("source", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_whatever_has_dlpack(qkv_arrays, exporter, source):
    expected, lse = qkv.attention(*qkv_arrays, return_lse=True)
    exported = [exporter(source(x)) for x in qkv_arrays]
    result = qkv.attention(*exported, mask=exporter(source(np.ones((3, 5), bool))), return_lse=True)
    assert all(type(x) is np.ndarray for x in result)
    np.testing.assert_array_equal(result[0], expected)
    np.testing.assert_array_equal(result[1], lse)
    out = qkv.scaled_dot_product_attention(*exported)
    np.testing.assert_array_equal(out, expected)


def test_bfloat16_from_another_library_comes_out_as_ml_dtypes(qkv_arrays):
    tensors = [torch.from_numpy(x).bfloat16() for x in qkv_arrays]
    expected = qkv.attention(*tensors)
    given = qkv.attention(*map(Exporter, tensors))
    assert given.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(given.astype(np.float32), expected.float().numpy())


def test_libraries_may_be_mixed_and_the_query_decides(qkv_arrays):
    q, k, v = qkv_arrays
    expected = qkv.attention(q, k, v)
    for given, kind in [
        (qkv.attention(torch.from_numpy(q), k, Exporter(v)), torch.Tensor),
        (qkv.attention(q, torch.from_numpy(k), v), np.ndarray),
        (qkv.attention(Exporter(q), torch.from_numpy(k), v), np.ndarray),
        (qkv.matmul(torch.from_numpy(q), k.swapaxes(2, 3)), torch.Tensor),
        (qkv.scaled_dot_product_attention(torch.from_numpy(q), k, v), torch.Tensor),
    ]:
        assert type(given) is kind
        if given.shape == expected.shape:
            np.testing.assert_array_equal(np.asarray(given), expected)


def test_subclasses_of_arrays_and_tensors(qkv_arrays):
    class Mine(np.ndarray):
        pass

    class MyTensor(torch.Tensor):
        pass

    expected = qkv.attention(*qkv_arrays)
    np.testing.assert_array_equal(qkv.attention(*(x.view(Mine) for x in qkv_arrays)), expected)
    given = qkv.attention(*(torch.from_numpy(x).as_subclass(MyTensor) for x in qkv_arrays))
    assert isinstance(given, torch.Tensor)
    np.testing.assert_array_equal(given.numpy(), expected)
    parameter = torch.nn.Parameter(torch.from_numpy(qkv_arrays[0]), requires_grad=False)
    np.testing.assert_array_equal(qkv.attention(parameter, *qkv_arrays[1:]).numpy(), expected)
    raises(TypeError, "q: a masked array", np.ma.masked_array(qkv_arrays[0]), *qkv_arrays[1:])


def test_torch_with_another_default_device_or_type(qkv_arrays):
    tensors = [torch.from_numpy(x) for x in qkv_arrays]
    expected = qkv.attention(*tensors)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        out, lse = qkv.attention(*tensors, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert lse.dtype == torch.float32 and lse.device.type == "cpu"
    assert torch.equal(out, expected)


def test_torch_in_inference_mode_and_without_gradients(qkv_arrays):
    tensors = [torch.from_numpy(x) for x in qkv_arrays]
    expected = qkv.attention(*tensors)
    with torch.inference_mode():
        assert torch.equal(qkv.attention(*tensors), expected)
    with torch.no_grad():
        assert torch.equal(qkv.attention(*tensors), expected)


def test_the_negative_bit_of_torch(qkv_arrays):
    x = torch.view_as_complex(torch.from_numpy(qkv_arrays[0].reshape(1, 2, 3, 4, 2).copy())).conj().imag
    assert x.is_neg()
    y = x.resolve_neg().clone()
    assert torch.equal(qkv.attention(x, x, x), qkv.attention(y, y, y))
    raises(ValueError, "out: a tensor with its negative bit set", y, y, y, out=x)


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_other_objects(qkv_arrays, name):
    def given(x, error, match):
        arguments = dict(zip("qkv", qkv_arrays)) | {name: x}
        with pytest.raises(error, match=f"^{name}: {match}"):
            qkv.attention(**arguments)

    for x in (
        None,
        3,
        2.5,
        "text",
        b"bytes",
        [1.0],
        (1.0,),
        {},
        object(),
        np.float32(1),
        np.ndarray,
        torch.Tensor,
        memoryview(b"1234"),
    ):
        given(x, TypeError, ".*expected an array")
    for dtype in (
        np.float64,
        np.int32,
        np.int64,
        np.uint8,
        bool,
        np.complex64,
        object,
        "U3",
        "M8[s]",
        np.longdouble,
        ">f4",
    ):
        given(np.zeros((1, 2, 5, 8), dtype), TypeError, "an array of .*, expected float32")
    given(np.zeros((1, 2, 5, 8), ml_dtypes.float8_e4m3fn), TypeError, "an array of float8_e4m3fn")
    for dtype in (torch.float64, torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool):
        given(torch.zeros((1, 2, 5, 8), dtype=dtype), TypeError, "an array of .*, expected float32")
    given(np.zeros((2, 5, 8), np.float32), ValueError, r"shape \[2, 5, 8\], expected 4 axes")
    given(np.zeros((), np.float32), ValueError, r"shape \[\], expected 4 axes")
    given(torch.zeros((1, 2, 5, 8), device="meta"), ValueError, "a tensor on device meta, expected one on the CPU")
    given(torch.zeros((1, 2, 5, 8), requires_grad=True), ValueError, "a tensor that requires a gradient.*qkv.torch")
    given(torch.zeros((1, 2, 5, 8)).to_sparse(), ValueError, "its memory cannot be read")


def test_shapes_that_do_not_fit(qkv_arrays):
    q, k, v = qkv_arrays
    raises(ValueError, "^k: head dim is 7, expected 8 to match q", q, k[..., :7], v)
    raises(ValueError, "^v: length is 4, expected 5 to match k", q, k, v[:, :, :4])
    raises(ValueError, "^v: heads is 1, expected 2 to match k", q, k, v[:, :1])
    raises(ValueError, "^k: batch is 2, expected 1 to match q", q, np.repeat(k, 2, 0), np.repeat(v, 2, 0))
    raises(ValueError, "^q: 2 heads, expected a multiple of the 3", q, np.repeat(k, 3, 1)[:, :3], np.repeat(v, 3, 1)[:, :3])
    raises(ValueError, "^q: head dim is 0", q[..., :0], k[..., :0], v)
    raises(ValueError, "^q: heads is 0", q[:, :0], k, v)
    raises(ValueError, "^k: heads is 0", q, k[:, :0], v[:, :0])


def test_options_that_do_not_fit(qkv_arrays):
    a = qkv_arrays
    f = np.float32
    for error, match, options in [
        (ValueError, "layout: 'bsdh'", {"layout": "bsdh"}),
        (TypeError, "layout: 3", {"layout": 3}),
        (ValueError, "causal: 'lower_left'", {"causal": "lower_left"}),
        (TypeError, "causal: True", {"causal": True}),
        (TypeError, r"causal: 1\.5", {"causal": 1.5}),
        (ValueError, "causal: 1000000", {"causal": 10**30}),
        (ValueError, "causal: -9223372036854775808", {"causal": -(2**63)}),
        (TypeError, "window: 3", {"window": 3}),
        (ValueError, r"window: \(1, 2, 3\)", {"window": (1, 2, 3)}),
        (ValueError, r"window: \(-2, 0\)", {"window": (-2, 0)}),
        (TypeError, r"window: \(1.0, 0\)", {"window": (1.0, 0)}),
        (TypeError, r"window: \(True, 0\)", {"window": (True, 0)}),
        (ValueError, r"window: \(10", {"window": (10**30, 0)}),
        (TypeError, "mask: an array of uint8", {"mask": np.ones((3, 5), np.uint8)}),
        (TypeError, "mask: an array of float32", {"mask": np.ones((3, 5), f)}),
        (ValueError, r"mask: shape \[1, 1, 5, 3\]", {"mask": np.ones((5, 3), bool)}),
        (ValueError, "mask: shape .*at most 4 axes", {"mask": np.ones((1, 1, 1, 3, 5), bool)}),
        (TypeError, "mask: bool", {"mask": True}),
        (TypeError, "bias: an array of float16, expected q's type", {"bias": np.ones((3, 5), np.float16)}),
        (TypeError, "bias: an array of bool", {"bias": np.ones((3, 5), bool)}),
        (ValueError, r"bias: shape \[1, 1, 5, 3\]", {"bias": np.ones((5, 3), f)}),
        (ValueError, r"alibi_slopes: shape \[3\]", {"alibi_slopes": np.ones(3, f)}),
        (ValueError, r"alibi_slopes: shape \[2, 1\]", {"alibi_slopes": np.ones((2, 1), f)}),
        (TypeError, "alibi_slopes: an array of float64", {"alibi_slopes": np.ones(2)}),
        (ValueError, r"alibi_slopes\[1\]: NaN", {"alibi_slopes": np.array([1, np.nan], f)}),
        (ValueError, "softcap: 0", {"softcap": 0.0}),
        (ValueError, "softcap: -1", {"softcap": -1}),
        (ValueError, "softcap: NaN", {"softcap": float("nan")}),
        (ValueError, "softcap: inf", {"softcap": float("inf")}),
        (TypeError, "softcap: '1'", {"softcap": "1"}),
        (ValueError, r"sinks: shape \[1, 2\]", {"sinks": np.ones((1, 2), f)}),
        (TypeError, "sinks: an array of float16", {"sinks": np.ones(2, np.float16)}),
        (ValueError, r"sinks\[0\]: inf", {"sinks": np.array([np.inf, 0], f)}),
        (ValueError, "scale: NaN", {"scale": float("nan")}),
        (ValueError, "scale: inf", {"scale": float("inf")}),
        (ValueError, "scale: 1e300|scale: 1000", {"scale": 1e300}),
        (TypeError, "scale: 'x'", {"scale": "x"}),
        (TypeError, r"scale: \[1\]", {"scale": [1]}),
        (TypeError, "kv_lengths: list", {"kv_lengths": [5]}),
        (TypeError, "kv_lengths: an array of float32", {"kv_lengths": np.ones(1, f)}),
        (ValueError, r"kv_lengths: shape \[2\]", {"kv_lengths": np.array([5, 5])}),
        (ValueError, r"kv_lengths\[0\]: 6, expected at most the 5", {"kv_lengths": np.array([6])}),
        (ValueError, r"kv_lengths\[0\]: -1, expected 0 or more", {"kv_lengths": np.array([-1])}),
        (ValueError, r"kv_lengths\[0\]: 9223372036854775807", {"kv_lengths": np.array([2**63 - 1])}),
        (TypeError, "return_lse: 1", {"return_lse": 1}),
        (TypeError, "unexpected keyword argument 'dropout'", {"dropout": 0.1}),
    ]:
        raises(error, match, *a, **options)
    with pytest.raises(TypeError):
        qkv.attention(*a, "bhsd")


def test_outputs_that_do_not_fit(qkv_arrays):
    q, k, v = qkv_arrays
    good = np.zeros((1, 2, 3, 8), np.float32)
    raises(
        ValueError,
        r"out: shape \[1, 2, 8, 3\], expected \[1, 2, 3, 8\]",
        q,
        k,
        v,
        out=np.zeros((1, 2, 8, 3), np.float32),
    )
    raises(ValueError, r"out: shape \[2, 3, 8\]", q, k, v, out=good[0])
    raises(TypeError, "out: an array of float64, expected float32", q, k, v, out=good.astype(float))
    raises(TypeError, "out: an array of float16, expected float32", q, k, v, out=good.astype(np.float16))
    raises(ValueError, "out: a last axis of stride", q, k, v, out=good.reshape(1, 2, 8, 3).swapaxes(2, 3))
    raises(ValueError, "out: .*read-only", q, k, v, out=np.broadcast_to(good, good.shape))
    raises(ValueError, "out: .*overlaps itself", q, k, v, out=as_strided(good, strides=(96, 0, 32, 4)))
    raises(ValueError, "out: .*overlaps itself", q, k, v, out=as_strided(good, strides=(96, 96, 4, 4)))
    raises(ValueError, "out: .*overlaps itself", q, k, v, out=torch.zeros(1, 1, 3, 8).expand(1, 2, 3, 8))
    raises(TypeError, "out: list", q, k, v, out=[])
    raises(ValueError, "out: a tensor on device meta", q, k, v, out=torch.zeros(1, 2, 3, 8, device="meta"))
    raises(ValueError, "out: a tensor that requires a gradient", q, k, v, out=torch.zeros(1, 2, 3, 8, requires_grad=True))
    # Of another library: it must say that it can be written, which only version 1 can.
    assert qkv.attention(q, k, v, out=(exporter := Exporter(good))) is exporter
    np.testing.assert_array_equal(good, qkv.attention(q, k, v))
    raises(ValueError, "out: .*does not say that it can be written", q, k, v, out=OldExporter(good))
    good.flags.writeable = False
    raises(ValueError, "out: .*read-only", q, k, v, out=good)
    raises(ValueError, "out: .*read-only", q, k, v, out=Exporter(good))


def test_outputs_that_overlap_inputs(rng):
    # q, k, v and the output as slices of one array.
    room = rng.standard_normal((1, 2, 6, 4, 8)).astype(np.float32)
    q, k, v, out = (room[..., i, :] for i in range(4))
    expected = qkv.attention(q.copy(), k.copy(), v.copy())
    qkv.attention(q, k, v, out=out)
    np.testing.assert_array_equal(out, expected)
    for name, x in (("q", q), ("k", k), ("v", v)):
        raises(ValueError, f"out: memory that {name} lies in", q, k, v, out=x)
    raises(ValueError, "out: memory that q lies in", q, k, v, out=q[..., ::-1, :])
    tensor = torch.from_numpy(room)
    raises(ValueError, "out: memory that q lies in", q, k, v, out=tensor[..., 0, :])
    raises(ValueError, "out: memory that bias lies in", q, k, v, bias=out[..., :6], out=out)
    mask = out.view(bool)[:, :, :, :6]
    raises(ValueError, "out: memory that mask lies in", q, k, v, mask=mask, out=out)


def test_huge_sizes():
    one = np.zeros(8, np.float32)

    def huge(*shape):
        return as_strided(one, shape, (0,) * (len(shape) - 1) + (4,))

    small = np.zeros((1, 1, 1, 8), np.float32)
    for shape in ((2**21, 2**21, 2**21, 8), (2**31, 2**31, 1, 8)):
        try:
            x = huge(*shape)
        except ValueError:  # numpy's own word
            continue
        with pytest.raises((ValueError, MemoryError)):
            qkv.attention(x, x, x)
    # Outputs that no memory has room for.
    for shape in ((2**40, 1, 1, 8), (1, 2**40, 1, 8), (1, 1, 2**40, 8)):
        x = huge(*shape)
        key = huge(*shape[:2], 1, 8)
        with pytest.raises((ValueError, MemoryError)):
            qkv.attention(x, key, key)
        with pytest.raises((ValueError, MemoryError)):
            qkv.attention(x, key, key, out=x)
        with pytest.raises((ValueError, MemoryError)):
            qkv.scaled_dot_product_attention(x, key, key)
        with pytest.raises((ValueError, MemoryError)):
            qkv.matmul(x, key.swapaxes(2, 3))
        with pytest.raises((ValueError, MemoryError, RuntimeError)):
            t = torch.zeros(8).as_strided(shape, (0, 0, 0, 1))
            qkv.attention(t, key, key)
    # A copy of such.
    x = as_strided(one, (1, 1, 1, 2**45), (0, 0, 0, 0))
    with pytest.raises((ValueError, MemoryError)):
        qkv.attention(x, x, x)
    raises(ValueError, "k: head dim is", small, huge(1, 1, 2**40, 8)[..., :4], huge(1, 1, 2**40, 8))
    # Nothing, of large sizes.
    for shape in ((0, 2**20, 2**20, 8), (2**40, 1, 0, 8), (0, 1, 2**30, 2**30)):
        x = np.zeros(shape, np.float32)
        key = np.zeros((*shape[:2], 3, shape[3]), np.float32) if 0 in shape[:2] else huge(*shape[:2], 3, 8)
        out, lse = qkv.attention(x, key, key, return_lse=True)
        assert out.shape == shape and lse.shape == shape[:3]
        assert qkv.scaled_dot_product_attention(x, key, key).shape == shape


# -- lifetimes -------------------------------------------------------------------------------------------------------------


def test_nothing_is_kept(qkv_arrays):
    tensors = [torch.from_numpy(x) for x in qkv_arrays]
    exporters = [Exporter(x) for x in tensors]
    objects = [*qkv_arrays, *tensors, *exporters]
    mask = np.ones((3, 5), bool)

    def calls():
        for triple in (qkv_arrays, tensors, exporters):
            qkv.attention(*triple, mask=mask, return_lse=True)
            qkv.scaled_dot_product_attention(*triple, mask)
            qkv.matmul(triple[0], triple[1].mT if triple is tensors else qkv_arrays[1].swapaxes(2, 3))
            with pytest.raises(ValueError):
                qkv.attention(*triple, mask=mask[:2])

    calls()
    gc.collect()
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(20):
        calls()
    gc.collect()
    assert [sys.getrefcount(x) for x in objects] == before


def test_results_outlive_everything(qkv_arrays):
    tensors = [torch.from_numpy(x).clone() for x in qkv_arrays]
    out, lse = qkv.attention(*tensors, return_lse=True)
    expected = out.clone()
    del tensors
    gc.collect()
    assert torch.equal(out, expected)
    out.resize_(5)  # an ordinary tensor of torch's own memory
    assert lse.untyped_storage().resizable()


def test_a_temporary_argument(rng):
    x = rng.standard_normal((1, 2, 3, 8))
    out = qkv.attention(*(torch.from_numpy(x.astype(np.float32)) for _ in range(3)))
    torch.testing.assert_close(out, qkv.attention(*[torch.from_numpy(x).float()] * 3))
