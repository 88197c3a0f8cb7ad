"""Arguments that make no sense, to `qkv.flash_attn` and `qkv.onnx`: an exception of the ordinary kinds or a result, and nothing else.

Good calls get one to three of their arguments replaced from a list of oddities: wrong types, shapes and strides, empty arrays that
claim to be huge, other devices and byte orders, objects whose `__dlpack__` fails. `RuntimeError` is what a panic in the compiled
module becomes, so it counts as a failure; a crash ends the test run.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from qkv.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from qkv.onnx import attention, rotary_embedding

REFUSALS = (ValueError, TypeError, NotImplementedError, MemoryError)


class Broken:
    """Says that it is an array, and is none."""

    shape, dtype, ndim = (2, 3), np.float32, 2

    def __dlpack__(self, **_):
        raise BufferError("no")

    def __dlpack_device__(self):
        return (1, 0)


class Elsewhere(Broken):
    """An array on a GPU."""

    def __dlpack_device__(self):
        return (2, 0)


class NotACapsule(Broken):
    def __dlpack__(self, **_):
        return 3


def oddities(rng):
    f32 = rng.standard_normal((2, 6, 4, 8)).astype(np.float32)
    strided = np.lib.stride_tricks.as_strided
    unaligned = np.zeros(4 * 384 + 1, dtype=np.uint8)[1:].view(np.float32).reshape(2, 6, 4, 8)
    return [
        *(
            None,
            True,
            0,
            1,
            -1,
            3,
            2**31,
            2**63,
            -(2**80),
            0.5,
            float("nan"),
            float("inf"),
            "causal",
            b"",
            [],
            (),
            {},
            (1, 2),
            (-1, 5),
        ),
        *(object(), np.float32, np.int32(2), np.float64(0.3), Broken(), Elsewhere(), NotACapsule(), slice(None)),
        *(f32, f32[::-1], f32[..., ::-1], f32[:, :, :, ::2], f32[:, ::2], f32.transpose(3, 2, 1, 0), f32[0], f32[0, 0], f32[:0]),
        *(f32[:, :0], f32[:, :, :0], f32[..., :0], f32.astype(np.float16), f32.astype(np.float64), f32.astype(">f4"), f32 > 0),
        *(
            f32.astype(np.int32),
            f32.astype(np.int8),
            f32.astype(np.complex64),
            f32.astype(ml_dtypes.bfloat16),
            f32.astype(object),
        ),
        *(
            unaligned,
            np.broadcast_to(np.float32(1), (2, 6, 4, 8)),
            np.zeros((), np.float32),
            np.array("text"),
            np.full_like(f32, np.nan),
        ),
        *(np.empty((2**40, 0, 4, 8), np.float32), np.empty((2, 2**40, 4, 0), np.float32), np.empty((0, 2**30, 2**20), np.int32)),
        *(strided(f32, (2, 3, 4, 8), (0, 0, 0, 0)), strided(f32, (2, 0, 4, 8), (2**40, 2**40, 2**40, 2**40))),
        *(np.array([0, 2, 5], np.int32), np.array([0, 5, 2], np.int32), np.array([-1, 9], np.int32), np.array([0, 1], np.int32)),
        *(
            np.array([[0, 1], [1, 0]], np.int32),
            np.array([[5, -9], [7, 2**31 - 1]], np.int32),
            np.array([1, 2]),
            np.zeros((2, 0), np.int32),
        ),
        *(torch.from_numpy(f32), torch.from_numpy(f32).to(torch.bfloat16), torch.zeros(2, 6, 4, 8, device="meta")),
        *(
            torch.zeros(2, 6, 4, 8, requires_grad=True),
            torch.zeros(2, 6).to_sparse(),
            torch.zeros(2, 6, 4, 8, dtype=torch.complex64),
        ),
        *(
            torch.tensor([0, 2, 5], dtype=torch.int32),
            torch.tensor(2),
            torch.zeros(2, 6, 4, 8)._neg_view(),
            torch.zeros(3).expand(2, 3),
        ),
        *(torch.zeros(1).expand(2, 6, 4, 8), torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)),
    ]


def good(rng):
    """A fresh good call of each function."""
    x = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    i32 = lambda values: np.array(values, np.int32)
    shared = {
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (3, 0),
        "softcap": 2.0,
        "alibi_slopes": np.abs(x(4)),
    }
    training = {"dropout_p": 0.0, "deterministic": False, "return_attn_probs": True}
    return [
        (flash_attn_func, {"q": x(2, 3, 4, 8), "k": x(2, 6, 2, 8), "v": x(2, 6, 2, 8), **shared, **training}),
        (
            flash_attn_varlen_func,
            {
                "q": x(5, 4, 8),
                "k": x(4, 2, 2, 8),
                "v": x(4, 2, 2, 8),
                "cu_seqlens_q": i32([0, 2, 5]),
                "cu_seqlens_k": i32([0, 3, 7]),
                "max_seqlen_q": 3,
                "max_seqlen_k": 4,
                "block_table": i32([[0, 1], [2, 3]]),
                **shared,
                **training,
            },
        ),
        (
            flash_attn_with_kvcache,
            {
                "q": x(2, 1, 4, 8),
                "k_cache": x(3, 6, 2, 8),
                "v_cache": x(3, 6, 2, 8),
                "k": x(2, 1, 2, 8),
                "v": x(2, 1, 2, 8),
                "rotary_cos": x(9, 3),
                "rotary_sin": x(9, 3),
                "cache_seqlens": i32([2, 4]),
                "cache_batch_idx": i32([2, 0]),
                "cache_leftpad": i32([1, 0]),
                "block_table": None,
                "rotary_interleaved": True,
                "num_splits": 0,
                "return_softmax_lse": True,
                **shared,
            },
        ),
        (
            attention,
            {
                "Q": x(2, 4, 3, 8),
                "K": x(2, 2, 6, 8),
                "V": x(2, 2, 6, 5),
                "attn_mask": x(3, 8),
                "past_key": x(2, 2, 2, 8),
                "past_value": x(2, 2, 2, 5),
                "nonpad_kv_seqlen": None,
                "is_causal": 1,
                "kv_num_heads": 2,
                "q_num_heads": 4,
                "qk_matmul_output_mode": 3,
                "scale": 0.5,
                "softcap": 1.0,
                "softmax_precision": 1,
                "left_window_size": 4,
                "right_window_size": -1,
            },
        ),
        (
            rotary_embedding,
            {
                "X": x(2, 3, 32),
                "cos_cache": x(9, 3),
                "sin_cache": x(9, 3),
                "position_ids": rng.integers(0, 9, size=(2, 3)),
                "interleaved": 1,
                "num_heads": 4,
                "rotary_embedding_dim": 6,
            },
        ),
    ]


def attempt(function, call):
    with np.errstate(all="ignore"):
        try:
            function(**call)
        except REFUSALS as error:
            assert str(error) and "which is a bug" not in str(error)
            return False
    return True


def test_good_calls_are_good():
    for function, call in good(np.random.default_rng(0)):
        assert attempt(function, call), function.__name__


@pytest.mark.filterwarnings("ignore")
def test_each_argument_with_each_oddity():
    rng = np.random.default_rng(1)
    for index, (_, names) in enumerate(good(rng)):
        for name in names:
            for odd in oddities(rng):
                function, call = good(rng)[index]
                attempt(function, call | {name: odd})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_several_at_once(seed):
    rng = np.random.default_rng(seed)
    for _ in range(400):
        calls = good(rng)
        function, call = calls[rng.integers(len(calls))]
        odd = oddities(rng)
        for name in rng.choice(list(call), size=int(rng.integers(2, 4)), replace=False):
            call[name] = odd[rng.integers(len(odd))]
        attempt(function, call)
