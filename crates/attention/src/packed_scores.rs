//! Scores of few query rows, packed for the softmax: [keys][stride], with a stride of the rows rounded up to a power of two, so
//! that a vector holds `lanes / stride` keys, and the exponentials of a single row take a sixteenth of the time.
//!
//! A vector is the first key's rows, the next key's and so on; what the softmax update makes of it, a maximum or a sum per lane,
//! is folded over the keys at its end ([`fold_keys`]).

use qkv_simd::Simd;

/// Values from one key's scores to the next where they are packed.
#[inline(always)]
pub(crate) fn packed_stride<S: Simd>(count: usize) -> usize {
    count.next_power_of_two().min(S::LANES)
}

/// Packs scores of `keys` keys that lie [keys][LANES].
#[inline(always)]
pub(crate) fn pack<S: Simd>(scores: &mut [f32], keys: usize, stride: usize) {
    for key in 1..keys {
        scores.copy_within(key * S::LANES..key * S::LANES + stride, key * stride);
    }
    pad::<S>(scores, keys * stride);
}

/// Fills the vector of packed scores that ends in the middle, after `used` values, with keys that nobody sees.
#[inline(always)]
pub(crate) fn pad<S: Simd>(scores: &mut [f32], used: usize) {
    scores[used..used.next_multiple_of(S::LANES)].fill(f32::NEG_INFINITY);
}

/// ROTATE[n][i] = i + 2^n: what a vector of packed scores is folded with.
const ROTATE: [[u32; 16]; 4] = {
    let mut table = [[0; 16]; 4];
    let mut at = 0;
    while at < 64 {
        table[at / 16][at % 16] = (at % 16 + (1 << (at / 16))) as u32;
        at += 1;
    }
    table
};

/// Each row's `f` over the keys that a vector of packed scores holds, in all of its lanes.
#[inline(always)]
pub(crate) fn fold_keys<S: Simd>(
    s: S,
    mut x: S::F32,
    stride: usize,
    f: impl Fn(S::F32, S::F32) -> S::F32,
) -> S::F32 {
    for (n, lanes) in ROTATE.iter().enumerate().rev() {
        if stride <= 1 << n && 1 << n < S::LANES {
            x = f(x, s.permute(x, lanes));
        }
    }
    x
}

/// The first key's lanes of a vector of packed scores, in the lanes of all its keys.
#[inline(always)]
pub(crate) fn repeat_first_key<S: Simd>(s: S, x: S::F32, stride: usize) -> S::F32 {
    let mut lanes = [0; 16];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = i as u32 & (stride as u32 - 1);
    }
    s.permute(x, &lanes)
}
