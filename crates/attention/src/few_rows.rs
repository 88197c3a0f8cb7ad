//! The two products for a few query rows (decoding): lanes run along the dims, not along the queries.
//!
//! With r query rows, r at most the number of lanes, tiles would leave most lanes empty, and the work would no longer hide
//! behind the memory that keys and values come from. Here every key row is read once for all r queries, as dots of
//! several keys at once, and every value row once, as multiply-adds onto r rows of outputs:
//!
//! ```text
//! s[j][i] = k_j . q_i        KEYS x R sums in registers, reduced across lanes at the end
//! o[i]   += p[j][i] v_j      R x DV vectors of outputs in registers over the keys of the block
//! ```
//!
//! Scores and weights lie as everywhere, [keys][lanes] with a query per lane, so that all masks, biases and the softmax
//! are the tiles' own. Queries are [rows][dk], outputs [rows][dv].

use qkv_simd::Simd;

/// Keys of a block: 32 of dim 128 in f32 are 16 KiB, half of an L1 cache, where widened ones are read again.
pub(crate) const FEW_BLOCK: usize = 32;

/// Sums in registers at a time, of sixteen.
const SUMS: usize = 8;

/// Rows that will be wanted soon: their lines are asked for on the way, a row per key, since the hardware follows neither
/// rows that are far apart nor the change from keys to values. Into L2: 32 heads over 8, 8192 keys of f32, dim 128, two
/// threads on Zen 4, reach 24 GB/s so, 16 with prefetches into L1, of which fewer can be under way, and 12 without any.
#[derive(Clone, Copy)]
pub(crate) struct AheadRows<'w> {
    /// Where they begin, whatever they consist of.
    pub(crate) rows: &'w [*const u8],
    /// Bytes of each.
    pub(crate) bytes: usize,
}

impl AheadRows<'_> {
    /// Asks for the `i`-th row, if there is one.
    #[inline(always)]
    fn ask<S: Simd>(&self, s: S, i: usize) {
        if let Some(&row) = self.rows.get(i) {
            for at in (0..self.bytes).step_by(64) {
                s.prefetch_l2(row.wrapping_add(at).cast());
            }
        }
    }
}

/// Scores of few queries.
pub(crate) struct FewScores<'w> {
    /// [rows][dk], scaled.
    pub(crate) queries: &'w [f32],
    pub(crate) dim: usize,
    /// Query rows.
    pub(crate) count: usize,
    /// The keys' rows, `dim` values each.
    pub(crate) keys: &'w [*const f32],
    /// Whether the keys come from memory rather than from scratch: then they are read as they lie, not several rows side by
    /// side, which the hardware would not take for a stream.
    pub(crate) stream: bool,
    /// [keys][LANES]; lanes from `count` on are left as they are.
    pub(crate) scores: &'w mut [f32],
}

/// Runs `$call` with the constant `R` = `$rows`.
macro_rules! with_row_count {
    ($rows:expr, $lanes:expr, $R:ident => $call:expr) => {
        match $rows {
            1 => {
                const $R: usize = 1;
                $call
            }
            2 => {
                const $R: usize = 2;
                $call
            }
            3 => {
                const $R: usize = 3;
                $call
            }
            4 => {
                const $R: usize = 4;
                $call
            }
            5 if $lanes > 4 => {
                const $R: usize = 5;
                $call
            }
            6 if $lanes > 4 => {
                const $R: usize = 6;
                $call
            }
            7 if $lanes > 4 => {
                const $R: usize = 7;
                $call
            }
            8 if $lanes > 4 => {
                const $R: usize = 8;
                $call
            }
            rows => debug_assert!(rows == 0, "{rows} rows"),
        }
    };
}

impl FewScores<'_> {
    /// Computes them, asking for the rows `ahead` on the way.
    ///
    /// # Safety
    /// Every key's row must be readable for `dim` values.
    #[inline(always)]
    pub(crate) unsafe fn run<S: Simd>(&mut self, s: S, ahead: AheadRows<'_>) {
        debug_assert!(self.count <= S::LANES);
        // SAFETY: the caller's promise.
        unsafe {
            with_row_count!(self.count, S::LANES, R => match S::LANES / R {
                4.. if self.stream => self.rows::<S, R, { if R == 1 { 2 } else { 1 } }>(s, ahead),
                _ if self.stream => self.rows::<S, R, 1>(s, ahead),
                8.. => self.rows::<S, R, { SUMS / R }>(s, ahead),
                4.. => self.rows::<S, R, { if R == 1 || R == 2 { 4 } else { 1 } }>(s, ahead),
                2.. => self.rows::<S, R, 2>(s, ahead),
                _ => self.rows::<S, R, 1>(s, ahead),
            });
        }
    }

    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize, const KEYS: usize>(&mut self, s: S, ahead: AheadRows<'_>) {
        let mut key = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while key + KEYS <= self.keys.len() {
                for key in key..key + KEYS {
                    ahead.ask(s, key);
                }
                self.keys::<S, R, KEYS>(s, key);
                key += KEYS;
            }
            while key < self.keys.len() {
                self.keys::<S, R, 1>(s, key);
                ahead.ask(s, key);
                key += 1;
            }
        }
    }

    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn keys<S: Simd, const R: usize, const KEYS: usize>(&mut self, s: S, first: usize) {
        let (dim, queries) = (self.dim, &self.queries[..R * self.dim]);
        let mut rows = [core::ptr::null(); KEYS];
        rows.copy_from_slice(&self.keys[first..first + KEYS]);
        let mut acc = [[s.zero(); R]; KEYS];
        let whole = dim / S::LANES * S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            for (acc, row) in acc.iter_mut().zip(&rows) {
                // SAFETY: the vector at `at` lies inside the key's row and inside each query.
                unsafe {
                    let k = s.load_ptr(row.add(at));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        *acc = s.mul_add(k, s.load_ptr(queries.as_ptr().add(i * dim + at)), *acc);
                    }
                }
            }
        }
        if whole < dim {
            for (acc, row) in acc.iter_mut().zip(&rows) {
                // SAFETY: as above, for the values that are left.
                unsafe {
                    let k = s.load_partial(row.add(whole), dim - whole);
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let q = s.load_partial(queries.as_ptr().add(i * dim + whole), dim - whole);
                        *acc = s.mul_add(k, q, *acc);
                    }
                }
            }
        }
        let mut sums = [s.zero(); SUMS];
        for (j, acc) in acc.iter().enumerate() {
            for (i, &acc) in acc.iter().enumerate() {
                sums[j * R + i] = acc;
            }
        }
        let used = match R * KEYS {
            1 => 1,
            2..=4 => 4,
            _ => 8,
        };
        let mut values = [0.0; 16];
        s.store(s.reduce_each(&sums[..used]), &mut values);
        for j in 0..KEYS {
            self.scores[(first + j) * S::LANES..][..R].copy_from_slice(&values[j * R..][..R]);
        }
    }
}

/// Weighted values for few queries.
pub(crate) struct FewSums<'w> {
    /// [keys][LANES].
    pub(crate) weights: &'w [f32],
    /// The values' rows, `dim` values each.
    pub(crate) values: &'w [*const f32],
    pub(crate) dim: usize,
    /// Query rows.
    pub(crate) count: usize,
    /// Per row, what the outputs so far are multiplied by; `None`: there are none.
    pub(crate) alpha: Option<&'w [f32]>,
    /// [rows][dim].
    pub(crate) outputs: &'w mut [f32],
}

impl FewSums<'_> {
    /// Adds them to the outputs, asking for the rows `ahead` on the way.
    ///
    /// # Safety
    /// Every value row must be readable for `dim` values.
    #[inline(always)]
    pub(crate) unsafe fn run<S: Simd>(&mut self, s: S, mut ahead: AheadRows<'_>) {
        // SAFETY: the caller's promise.
        unsafe {
            with_row_count!(self.count, S::LANES, R => {
                let step = (SUMS / R) * S::LANES;
                let mut at = 0;
                while at + step <= self.dim {
                    self.dims::<S, R, { SUMS / R }>(s, at, S::LANES, ahead);
                    ahead.rows = &[];
                    at += step;
                }
                while at < self.dim {
                    self.dims::<S, R, 1>(s, at, (self.dim - at).min(S::LANES), ahead);
                    ahead.rows = &[];
                    at += S::LANES;
                }
            });
        }
    }

    /// `DV` vectors of dims from `at` on, of which the last has `last` values.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn dims<S: Simd, const R: usize, const DV: usize>(
        &mut self,
        s: S,
        at: usize,
        last: usize,
        ahead: AheadRows<'_>,
    ) {
        let mut acc = [[s.zero(); DV]; R];
        let whole = last == S::LANES;
        for (j, (weights, &row)) in self.weights.chunks_exact(S::LANES).zip(self.values).enumerate() {
            ahead.ask(s, j);
            let mut v = [s.zero(); DV];
            for (d, v) in v.iter_mut().enumerate() {
                // SAFETY: these dims are inside the row.
                *v = unsafe {
                    let p = row.add(at + d * S::LANES);
                    if whole { s.load_ptr(p) } else { s.load_partial(p, last) }
                };
            }
            for (acc, &weight) in acc.iter_mut().zip(weights) {
                let weight = s.splat(weight);
                for (acc, &v) in acc.iter_mut().zip(&v) {
                    *acc = s.mul_add(weight, v, *acc);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (d, &sum) in acc.iter().enumerate() {
                let from = i * self.dim + at + d * S::LANES;
                let to = &mut self.outputs[from..][..last];
                let p = to.as_mut_ptr();
                // SAFETY: `to` has `last` values, a whole vector where `whole`.
                unsafe {
                    let value = match self.alpha {
                        None => sum,
                        Some(alpha) => {
                            let old = if whole { s.load_ptr(p) } else { s.load_partial(p, last) };
                            s.mul_add(old, s.splat(alpha[i]), sum)
                        }
                    };
                    if whole {
                        s.store_ptr(value, p)
                    } else {
                        s.store_partial(value, p, last)
                    };
                }
            }
        }
    }
}
