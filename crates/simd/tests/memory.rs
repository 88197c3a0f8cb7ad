//! The operations of [`Simd`] on memory, on every instruction set of this machine: whole and partial loads and stores at
//! every offset and length, transposition with strides of both signs. Buffers that must not be read or written past
//! their end are boxed slices of exactly the length allowed (so that a run under Miri or a sanitizer sees any excess),
//! and writes land between canaries, which hold every time that nothing else was written.

use proptest::prelude::*;
use qkv_simd::{Isa, Simd, SimdOp};

/// What unwritten places hold: a NaN with a payload that no operation makes.
const CANARY: u32 = 0x7FC0_DEAD;

/// `count` canaries.
fn canaries(count: usize) -> Box<[f32]> {
    vec![f32::from_bits(CANARY); count].into_boxed_slice()
}

/// Different values, none of them zero.
fn values(count: usize) -> Box<[f32]> {
    (0..count).map(|i| 1.0 + i as f32).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Whole vectors at every offset from alignment.
struct Whole;

impl SimdOp for Whole {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for offset in 0..2 * S::LANES {
            let src = values(offset + S::LANES);
            let mut dst = canaries(offset + 3 * S::LANES);
            s.store(s.load(&src[offset..]), &mut dst[offset..]);
            let mut want = canaries(dst.len());
            want[offset..offset + S::LANES].copy_from_slice(&src[offset..]);
            assert_eq!(bits(&dst), bits(&want), "slices at {offset} on {}", S::KIND);

            dst.fill(f32::from_bits(CANARY));
            // SAFETY: `src` and `dst` have LANES values from `offset` on.
            unsafe { s.store_ptr(s.load_ptr(src.as_ptr().add(offset)), dst.as_mut_ptr().add(offset)) };
            assert_eq!(bits(&dst), bits(&want), "pointers at {offset} on {}", S::KIND);
        }
    }
}

#[test]
fn whole_vectors() {
    Isa::available().into_iter().for_each(|isa| isa.dispatch(Whole));
}

/// Loads or stores one value less than a vector has through a slice, which must panic.
struct Short {
    store: bool,
}

impl SimdOp for Short {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let mut short = canaries(S::LANES - 1);
        if self.store {
            s.store(s.zero(), &mut short);
        } else {
            s.store(s.load(&short), &mut canaries(S::LANES));
        }
    }
}

#[test]
fn short_slices_are_refused() {
    for isa in Isa::available() {
        for store in [false, true] {
            let refused = std::panic::catch_unwind(|| isa.dispatch(Short { store }));
            assert!(refused.is_err(), "store: {store}, on {}", isa.kind());
        }
    }
}

/// The first `n` lanes only, for every `n`, at every offset.
struct Partial;

impl SimdOp for Partial {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for n in 0..=S::LANES {
            for offset in 0..=S::LANES {
                let src = values(offset + n);
                // SAFETY: `src` has n values from `offset` on, and n <= LANES.
                let x = unsafe { s.load_partial(src.as_ptr().add(offset), n) };
                let mut lanes = canaries(S::LANES);
                s.store(x, &mut lanes);
                let mut want = vec![0.0; S::LANES];
                want[..n].copy_from_slice(&src[offset..]);
                assert_eq!(bits(&lanes), bits(&want), "{n} values loaded at {offset} on {}", S::KIND);

                let full = s.load(&values(S::LANES));
                let mut exact = canaries(offset + n);
                // SAFETY: `exact` has n values from `offset` on, and n <= LANES.
                unsafe { s.store_partial(full, exact.as_mut_ptr().add(offset), n) };
                let mut want = canaries(offset + 2 * S::LANES);
                want[offset..offset + n].copy_from_slice(&values(n));
                assert_eq!(bits(&exact), bits(&want[..offset + n]), "{n} stored at {offset} on {}", S::KIND);

                let mut roomy = canaries(offset + 2 * S::LANES);
                // SAFETY: as above, with room behind.
                unsafe { s.store_partial(full, roomy.as_mut_ptr().add(offset), n) };
                assert_eq!(bits(&roomy), bits(&want), "{n} stored at {offset} with room on {}", S::KIND);
            }
        }
    }
}

#[test]
fn partial_vectors() {
    Isa::available().into_iter().for_each(|isa| isa.dispatch(Partial));
}

/// Nothing at all may be read or written where the number is 0, and a prefetch of any address is allowed.
struct Nowhere;

impl SimdOp for Nowhere {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let mut empty: [f32; 0] = [];
        // SAFETY: no value is asked for.
        let x = unsafe { s.load_partial(empty.as_ptr(), 0) };
        assert_eq!(s.reduce_max(s.abs(x)), 0.0);
        // SAFETY: no value is written.
        unsafe { s.store_partial(x, empty.as_mut_ptr(), 0) };
        for address in [0, 1, 4096, usize::MAX] {
            s.prefetch(std::ptr::without_provenance(address));
        }
        let here = [1.0; 16];
        s.prefetch(here.as_ptr());
    }
}

#[test]
fn no_vector_at_all() {
    Isa::available().into_iter().for_each(|isa| isa.dispatch(Nowhere));
}

/// A square with room between its rows: where row 0 starts, and how far it is to the next.
#[derive(Clone, Copy, Debug)]
struct Rows {
    gap: usize,
    backwards: bool,
}

impl Rows {
    /// The buffer's exact length, the index of row 0 in it, and the stride.
    fn layout(self, lanes: usize) -> (usize, usize, isize) {
        let stride = lanes + self.gap;
        let length = (lanes - 1) * stride + lanes;
        let stride_signed = stride.cast_signed();
        if self.backwards { (length, length - lanes, -stride_signed) } else { (length, 0, stride_signed) }
    }
}

/// A transposition from one layout to another.
struct Transpose {
    src: Rows,
    dst: Rows,
}

impl SimdOp for Transpose {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (src_length, src_first, src_stride) = self.src.layout(S::LANES);
        let (dst_length, dst_first, dst_stride) = self.dst.layout(S::LANES);
        let place = |first: usize, stride: isize, row: usize, column: usize| {
            (first.cast_signed() + row.cast_signed() * stride).cast_unsigned() + column
        };
        let src = values(src_length);
        let mut dst = canaries(dst_length);
        // SAFETY: `layout` gives buffers in which LANES rows of LANES values fit, from the first row on in steps of
        // the stride.
        unsafe {
            s.transpose(src.as_ptr().add(src_first), src_stride, dst.as_mut_ptr().add(dst_first), dst_stride);
        }
        let mut want = canaries(dst_length);
        for i in 0..S::LANES {
            for j in 0..S::LANES {
                want[place(dst_first, dst_stride, j, i)] = src[place(src_first, src_stride, i, j)];
            }
        }
        assert_eq!(bits(&dst), bits(&want), "{:?} to {:?} on {}", self.src, self.dst, S::KIND);
    }
}

#[test]
fn transpositions() {
    for isa in Isa::available() {
        for (src_gap, dst_gap) in [(0, 0), (1, 0), (0, 1), (3, 5), (9, 25), (64, 57)] {
            for backwards in [(false, false), (true, false), (false, true), (true, true)] {
                let src = Rows { gap: src_gap, backwards: backwards.0 };
                let dst = Rows { gap: dst_gap, backwards: backwards.1 };
                isa.dispatch(Transpose { src, dst });
            }
        }
    }
}

/// Copies a slice by whole vectors and one partial one.
struct Copy<'a>(&'a [f32], &'a mut [f32]);

impl SimdOp for Copy<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let mut src = self.0.chunks_exact(S::LANES);
        let mut dst = self.1.chunks_exact_mut(S::LANES);
        for (x, y) in (&mut src).zip(&mut dst) {
            s.store(s.load(x), y);
        }
        let (x, y) = (src.remainder(), dst.into_remainder());
        assert_eq!(x.len(), y.len());
        // SAFETY: both remainders have x.len() < LANES values.
        unsafe { s.store_partial(s.load_partial(x.as_ptr(), x.len()), y.as_mut_ptr(), x.len()) };
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Slices of any length and content come through whole and partial vectors unchanged.
    #[test]
    fn copies(source in prop::collection::vec(any::<u32>(), 0..100), offset in 0usize..8) {
        let source: Vec<f32> = source.into_iter().map(f32::from_bits).collect();
        let offset = offset.min(source.len());
        for isa in Isa::available() {
            let mut copy = canaries(source.len());
            isa.dispatch(Copy(&source[offset..], &mut copy[offset..]));
            prop_assert_eq!(bits(&copy[offset..]), bits(&source[offset..]));
            prop_assert_eq!(bits(&copy[..offset]), bits(&canaries(offset)));
        }
    }

    /// Squares of any layout.
    #[test]
    fn any_transposition(gaps in (0usize..40, 0usize..40), backwards in any::<(bool, bool)>()) {
        for isa in Isa::available() {
            isa.dispatch(Transpose {
                src: Rows { gap: gaps.0, backwards: backwards.0 },
                dst: Rows { gap: gaps.1, backwards: backwards.1 },
            });
        }
    }
}
