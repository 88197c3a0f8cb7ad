//! The other way to lay the computation out, for comparison: rows of S = Q K^T, softmax along the rows.
//!
//! One head, one thread, full attention: K^T is packed once for the whole head (which a library that promises fixed
//! memory could not do), then per block of query rows and block of keys S = Q K^T, the online softmax with maxima and
//! sums across lanes, O = alpha O + P V with V read in place as the right-hand side. The plain tile, the kernel's
//! exponential, blocks of 96 rows and 96 keys (the kernel: 192 and 128); the kernel's time is printed beside it.
//!
//!     cargo run --release -p qkv-attention --example formulations

use std::time::Instant;

use qkv_attention::{AttentionSpec, Outputs, Tensor, attention_into};
use qkv_gemm::tile::{Rhs, Rows, tile};
use qkv_gemm::{MatRef, TileOp, pack_rhs, packed_len, with_tile};
use qkv_simd::math::exp2_nonpositive;
use qkv_simd::{Isa, Simd};

const QUERY_BLOCK: usize = 96;
const KEY_BLOCK: usize = 96;

struct ByRows<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a mut [f32],
    length: usize,
    dim: usize,
}

impl TileOp for ByRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let Self { q, k, v, out, length, dim } = self;
        let nr = NV * S::LANES;
        assert!(length.is_multiple_of(QUERY_BLOCK) && QUERY_BLOCK.is_multiple_of(MR));
        assert!(KEY_BLOCK.is_multiple_of(nr) && dim.is_multiple_of(nr));
        let keys = MatRef::from_slice(k, length, dim).expect("the size of k");
        let mut packed = vec![0.0; packed_len(length, dim, nr).expect("small")];
        pack_rhs::<S, NV>(s, keys.t(), &mut packed).expect("long enough");
        let scale = core::f32::consts::LOG2_E / (dim as f32).sqrt();
        let scaled: Vec<f32> = q.iter().map(|x| x * scale).collect();
        let mut scores = vec![0.0; QUERY_BLOCK * KEY_BLOCK];

        for first in (0..length).step_by(QUERY_BLOCK) {
            let (mut max, mut sum) = ([f32::NEG_INFINITY; QUERY_BLOCK], [0.0; QUERY_BLOCK]);
            let out = &mut out[first * dim..][..QUERY_BLOCK * dim];
            out.fill(0.0);
            for key in (0..length).step_by(KEY_BLOCK) {
                for row in (0..QUERY_BLOCK).step_by(MR) {
                    for column in (0..KEY_BLOCK).step_by(nr) {
                        let lhs = Rows { ptr: scaled[(first + row) * dim..].as_ptr(), stride: dim as isize };
                        let rhs = Rhs { ptr: packed[(key + column) * dim..].as_ptr(), stride: nr as isize };
                        // SAFETY: MR query rows of `dim` values exist, and the panel is [dim][nr].
                        let acc = unsafe { tile::<S, _, MR, NV>(s, dim, lhs, rhs) };
                        for (i, vectors) in acc.iter().enumerate() {
                            for (j, &x) in vectors.iter().enumerate() {
                                s.store(x, &mut scores[(row + i) * KEY_BLOCK + column + j * S::LANES..]);
                            }
                        }
                    }
                }
                let mut alpha = [0.0; QUERY_BLOCK];
                for row in 0..QUERY_BLOCK {
                    let scores = &mut scores[row * KEY_BLOCK..][..KEY_BLOCK];
                    let mut largest = s.splat(max[row]);
                    for x in scores.chunks_exact(S::LANES) {
                        largest = s.max(s.load(x), largest);
                    }
                    let new = s.reduce_max(largest);
                    alpha[row] = (max[row] - new).exp2();
                    max[row] = new;
                    let mut total = s.zero();
                    for x in scores.chunks_exact_mut(S::LANES) {
                        let p = exp2_nonpositive(s, s.sub(s.load(x), s.splat(new)));
                        s.store(p, x);
                        total = s.add(total, p);
                    }
                    sum[row] = sum[row] * alpha[row] + s.reduce_add(total);
                }
                for row in (0..QUERY_BLOCK).step_by(MR) {
                    for d in (0..dim).step_by(nr) {
                        let lhs =
                            Rows { ptr: scores[row * KEY_BLOCK..].as_ptr(), stride: KEY_BLOCK as isize };
                        let rhs = Rhs { ptr: v[key * dim + d..].as_ptr(), stride: dim as isize };
                        // SAFETY: MR rows of KEY_BLOCK weights exist, and KEY_BLOCK rows of values with dims d .. d + nr.
                        let acc = unsafe { tile::<S, _, MR, NV>(s, KEY_BLOCK, lhs, rhs) };
                        for (i, vectors) in acc.iter().enumerate() {
                            for (j, &x) in vectors.iter().enumerate() {
                                let at = &mut out[(row + i) * dim + d + j * S::LANES..];
                                s.store(s.mul_add(s.load(at), s.splat(alpha[row + i]), x), at);
                            }
                        }
                    }
                }
            }
            for (row, out) in out.chunks_exact_mut(dim).enumerate() {
                out.iter_mut().for_each(|x| *x /= sum[row]);
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let isa = Isa::active()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    println!("{isa:?}, one thread, one head, length 2016; ms, medians of 15 in turns");
    for dim in [64, 128] {
        let shape = [1, 1, 2016, dim];
        let part = |salt: usize| {
            Tensor::from_fn(shape, |[_, _, i, d]| ((i * 31 + d * salt) % 97) as f32 * 0.02 - 1.0)
        };
        let (q, k, v) = (part(7)?, part(11)?, part(13)?);
        let (mut rows, mut lanes) = (Tensor::zeros(shape)?, Tensor::zeros(shape)?);
        let (mut by_rows, mut by_lanes) = (Vec::new(), Vec::new());
        for _ in 0..15 {
            let start = Instant::now();
            let out = rows.data_mut();
            with_tile(isa, ByRows { q: q.data(), k: k.data(), v: v.data(), out, length: 2016, dim });
            by_rows.push(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            let outputs = Outputs::new(lanes.view_mut());
            pool.install(|| attention_into(q.view(), k.view(), v.view(), &AttentionSpec::new(), outputs))?;
            by_lanes.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let difference = rows.data().iter().zip(lanes.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let median = |times: &mut Vec<f64>| {
            times.sort_unstable_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let (rows, lanes) = (median(&mut by_rows), median(&mut by_lanes));
        println!(
            "dim {dim}: rows of S {rows:.2}, queries in lanes {lanes:.2}, ratio {:.3}, largest difference {difference:e}",
            rows / lanes
        );
    }
    Ok(())
}
