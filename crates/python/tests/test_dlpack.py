"""DLPack's capsules, by hand: lifetimes, flags, versions, and tensors that lie."""

import ctypes

import numpy as np
import pytest
import torch

import qkv
from exporters import Exporter


@pytest.fixture
def qkv_arrays(rng):
    return [rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (3, 5, 5)]


def raises(error, match, *arguments, **options):
    with pytest.raises(error, match=match):
        qkv.attention(*arguments, **options)


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Old(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", DELETER),
        ("flags", ctypes.c_uint64), ("tensor", Tensor),
    ]  # fmt: skip


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Handmade:
    """An exporter whose every field can be set; counts how often its tensor is given back."""

    def __init__(self, array, *, versioned=True, name=None, deleter=True, device=(1, 0), **fields):
        self.array, self.device, self.deleted, self.exports = array, device, 0, 0
        tensor = Tensor(
            array.ctypes.data, *device, array.ndim, 2, 32, 1, (ctypes.c_int64 * 8)(*array.shape),
            (ctypes.c_int64 * 8)(*(s // array.itemsize for s in array.strides)), 0,
        )  # fmt: skip
        self.callback = DELETER(self.delete) if deleter else DELETER()
        self.managed = Versioned(1, 0, None, self.callback, 0, tensor) if versioned else Old(tensor, None, self.callback)
        for field, value in fields.items():
            setattr(self.managed if field in ("major", "flags") else self.managed.tensor, field, value)
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")

    def delete(self, _):
        self.deleted += 1

    def __dlpack__(self, **options):
        self.exports += 1
        return new_capsule(ctypes.addressof(self.managed), self.name, None)

    def __dlpack_device__(self):
        return self.device


@pytest.mark.parametrize("versioned", [True, False])
def test_tensors_are_given_back(qkv_arrays, versioned):
    q, k, v = qkv_arrays
    expected = qkv.attention(q, k, v)
    exporter = Handmade(q, versioned=versioned)
    np.testing.assert_array_equal(qkv.attention(exporter, k, v), expected)
    assert (exporter.exports, exporter.deleted) == (1, 1)
    raises(TypeError, "k: int", exporter, 3, v)
    assert (exporter.exports, exporter.deleted) == (2, 2)
    np.testing.assert_array_equal(qkv.attention(Handmade(q, versioned=versioned, deleter=False), k, v), expected)
    # No strides is contiguous; the offset is in bytes.
    np.testing.assert_array_equal(qkv.attention(Handmade(q, versioned=versioned, strides=None), k, v), expected)
    room = np.concatenate([np.full(4, np.nan, np.float32), q.ravel()])
    moved = Handmade(q, versioned=versioned, data=room.ctypes.data, byte_offset=16)
    np.testing.assert_array_equal(qkv.attention(moved, k, v), expected)
    # Values off their alignment are copied.
    odd = np.concatenate([np.zeros(1, np.uint8), q.ravel().view(np.uint8)])
    moved = Handmade(q, versioned=versioned, data=odd.ctypes.data, byte_offset=1)
    np.testing.assert_array_equal(qkv.attention(moved, k, v), expected)


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize(
    "fields, error, match",
    [
        ({"data": None}, ValueError, "with no data"),
        ({"shape": None}, ValueError, "with no shape"),
        ({"ndim": -1}, ValueError, "a negative number of axes"),
        ({"ndim": 2**31 - 1}, ValueError, "2147483647 axes"),
        ({"ndim": 3}, ValueError, "expected 4 axes"),
        ({"device_type": 2}, ValueError, "on DLPack device 2:0"),
        ({"bits": 64}, TypeError, "an array of"),
        ({"lanes": 4}, TypeError, "an array of"),
        ({"code": 0}, TypeError, "an array of"),
        ({"code": 99}, TypeError, "an array of"),
        ({"shape": (ctypes.c_int64 * 4)(1, 2, -3, 8)}, ValueError, "a negative size"),
        ({"shape": (ctypes.c_int64 * 4)(2**62, 2**62, 2**62, 8)}, ValueError, "larger than the address space"),
        (
            {"shape": (ctypes.c_int64 * 4)(2**40, 2**40, 1, 8), "strides": (ctypes.c_int64 * 4)(0, 0, 0, 1)},
            ValueError,
            "larger than",
        ),
        (
            {"shape": (ctypes.c_int64 * 4)(2**62, 2**62, 2**62, 8), "strides": None},
            ValueError,
            "beyond the address space",
        ),
        ({"strides": (ctypes.c_int64 * 4)(2**62, 2**62, 2**62, 1)}, ValueError, "larger than the address space"),
        ({"strides": (ctypes.c_int64 * 4)(2**50, 2**61, 8, 1)}, ValueError, "larger than the address space"),
        ({"strides": (ctypes.c_int64 * 4)(-(2**63), -(2**63), 8, 1)}, ValueError, "larger than the address space"),
    ],
)
def test_tensors_that_lie(qkv_arrays, versioned, fields, error, match):
    exporter = Handmade(qkv_arrays[0], versioned=versioned, **fields)
    raises(error, f"^q: .*{match}", exporter, *qkv_arrays[1:])
    assert exporter.deleted == exporter.exports == 1


def test_versions_flags_and_names(qkv_arrays):
    q, k, v = qkv_arrays
    expected = qkv.attention(q, k, v)
    exporter = Handmade(q, major=2)
    raises(ValueError, "q: a DLPack tensor of version 2.0", exporter, k, v)
    assert exporter.deleted == 1
    np.testing.assert_array_equal(qkv.attention(Handmade(q, flags=1), k, v), expected)
    for flags in (1, 2):
        raises(ValueError, "out: .*read-only", q, k, v, out=Handmade(np.zeros_like(q), flags=flags))
    raises(ValueError, "q: an array on DLPack device 2:1", Handmade(q, device=(2, 1)), k, v)
    raises(ValueError, "a capsule that was consumed before", Handmade(q, name=b"used_dltensor"), k, v)
    raises(ValueError, "a capsule of something else", Handmade(q, name=b"something"), k, v)


def test_a_capsule_is_consumed_once(qkv_arrays):
    q, k, v = qkv_arrays

    class Keeper(Exporter):
        def __init__(self, array):
            super().__init__(array)
            self.capsule = array.__dlpack__()

        def __dlpack__(self, **options):
            return self.capsule

    keeper = Keeper(q)
    qkv.attention(keeper, k, v)
    raises(ValueError, "q: __dlpack__\\(\\) returned a capsule that was consumed before", keeper, k, v)
    keeper = Keeper(q)
    raises(ValueError, "k: __dlpack__\\(\\) returned a capsule that was consumed before", keeper, keeper, keeper)
    keeper = Keeper(q)
    np.from_dlpack(keeper)
    raises(ValueError, "q: .*consumed before", keeper, k, v)


def test_exporters_that_raise_or_return_nonsense(qkv_arrays):
    q, k, v = qkv_arrays

    class Bad:
        def __init__(self, action, device=lambda: (1, 0)):
            self.action, self.device = action, device

        def __dlpack__(self, **options):
            return self.action()

        def __dlpack_device__(self):
            return self.device()

    def fail():
        raise RuntimeError("not today")

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="q: its memory cannot be read .*not today") as caught:
        qkv.attention(Bad(fail), k, v)
    assert isinstance(caught.value.__cause__, RuntimeError)
    raises(ValueError, "q: its memory cannot be read .*not today", Bad(lambda: None, fail), k, v)
    with pytest.raises(KeyboardInterrupt):
        qkv.attention(Bad(stop), k, v)
    for nonsense in (None, 3, "capsule", q):
        raises(ValueError, "q: __dlpack__\\(\\) returned", Bad(lambda: nonsense), k, v)
    raises(ValueError, "q: its memory", Bad(lambda: None, lambda: "cpu"), k, v)
    raises(ValueError, "q: its memory", Bad(lambda: None, lambda: (1,)), k, v)

    class NotAMethod:
        __dlpack__ = 3

    raises(ValueError, "q: its memory", NotAMethod(), k, v)

    class Unspeakable:
        def __repr__(self):
            raise ValueError

    raises(TypeError, "causal: an object", q, k, v, causal=Unspeakable())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_and_wrapped_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(1, 1, 3, 8)
    with FakeTensorMode():
        fake = torch.randn(1, 1, 3, 8)
        raises(ValueError, "q: ", fake, fake, fake)
    raises(ValueError, "q: ", fake, fake, fake)
    raises(ValueError, "k: ", x, fake, fake)
    with pytest.raises(ValueError, match="q: its memory cannot be read"):
        torch.func.vmap(lambda x: qkv.attention(x, x, x))(torch.randn(2, 1, 1, 3, 8))
