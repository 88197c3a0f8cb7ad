//! The oracle in f64, matrices in every layout, and the error that a result may have.
//!
//! Tolerance: a sum of k products in any order, each step rounded to f32 with unit roundoff u = 2^-24, is off by at most
//! about (k + 1) u times the sum of the products' magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms",
//! 2002, section 3.1). Scaling, C and the bias add a few roundings of their own magnitudes; an activation stretches an
//! error by at most its steepest slope (1.13 for GELU) and adds a few units in the last place of its own.

#![allow(dead_code, reason = "every test file uses a part of this")]

use qkv_gemm::{Activation, GemmSpec, MatMut, MatRef};

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// A small generator (xorshift64*), so that a failing case can be written down as a seed.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    /// Uniform in [-1, 1).
    pub(crate) fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
}

/// Where a matrix's values lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    RowMajor,
    ColMajor,
    /// Rows of a wider matrix.
    Sub,
    /// Columns of a taller matrix, column-major.
    SubCol,
    /// No stride is 1.
    Strided,
    /// Rows upside down.
    UpsideDown,
    /// Columns mirrored.
    Mirrored,
    /// All rows the same memory.
    SameRows,
    /// All columns the same memory.
    SameCols,
}

impl Layout {
    pub(crate) const OUTPUTS: [Self; 7] = [
        Self::RowMajor,
        Self::ColMajor,
        Self::Sub,
        Self::SubCol,
        Self::Strided,
        Self::UpsideDown,
        Self::Mirrored,
    ];
    pub(crate) const INPUTS: [Self; 9] = [
        Self::RowMajor,
        Self::ColMajor,
        Self::Sub,
        Self::SubCol,
        Self::Strided,
        Self::UpsideDown,
        Self::Mirrored,
        Self::SameRows,
        Self::SameCols,
    ];

    /// Length, offset and strides.
    fn plan(self, rows: usize, cols: usize) -> (usize, usize, isize, isize) {
        let (r, c) = (rows as isize, cols as isize);
        match self {
            Self::RowMajor => (rows * cols, 0, c, 1),
            Self::ColMajor => (rows * cols, 0, 1, r),
            Self::Sub => (rows * (cols + 5) + 3, 3, c + 5, 1),
            Self::SubCol => ((rows + 3) * cols + 2, 2, 1, r + 3),
            Self::Strided => (rows * (3 * cols + 1) + 1, 1, 3 * c + 1, 3),
            Self::UpsideDown => (rows * (cols + 1), rows.saturating_sub(1) * (cols + 1), -(c + 1), 1),
            Self::Mirrored => (rows * (cols + 1), cols.saturating_sub(1), c + 1, -1),
            Self::SameRows => (cols, 0, 0, 1),
            Self::SameCols => (rows, 0, 1, 0),
        }
    }
}

/// A matrix in a layout; memory that belongs to no element holds NaN.
#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) data: Vec<f32>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    offset: usize,
    row_stride: isize,
    col_stride: isize,
}

impl Matrix {
    pub(crate) fn filled(layout: Layout, rows: usize, cols: usize, mut value: impl FnMut() -> f32) -> Self {
        let (len, offset, row_stride, col_stride) = layout.plan(rows, cols);
        let mut data = vec![f32::NAN; len];
        for i in 0..rows {
            for j in 0..cols {
                data[offset.wrapping_add_signed(i as isize * row_stride + j as isize * col_stride)] = value();
            }
        }
        Self { data, rows, cols, offset: offset.min(len), row_stride, col_stride }
    }
    pub(crate) fn random(layout: Layout, rows: usize, cols: usize, rng: &mut Rng) -> Self {
        Self::filled(layout, rows, cols, || rng.value())
    }
    pub(crate) fn view(&self) -> MatRef<'_> {
        MatRef::from_slice_strided(
            &self.data,
            self.offset,
            self.rows,
            self.cols,
            self.row_stride,
            self.col_stride,
        )
        .expect("a matrix inside its data")
    }
    pub(crate) fn view_mut(&mut self) -> MatMut<'_> {
        MatMut::from_slice_strided(
            &mut self.data,
            self.offset,
            self.rows,
            self.cols,
            self.row_stride,
            self.col_stride,
        )
        .expect("a matrix inside its data, each element with its own memory")
    }
    pub(crate) fn at(&self, i: usize, j: usize) -> f32 {
        self.view().get(i, j).expect("an element")
    }
    /// Checks that memory between the elements is as it was.
    pub(crate) fn assert_gaps_untouched(&self, what: &str) {
        let mut inside = vec![false; self.data.len()];
        for i in 0..self.rows {
            for j in 0..self.cols {
                let at = i as isize * self.row_stride + j as isize * self.col_stride;
                inside[self.offset.wrapping_add_signed(at)] = true;
            }
        }
        for (at, (value, inside)) in self.data.iter().zip(inside).enumerate() {
            assert!(inside || value.is_nan(), "{what}: value {at} between the elements was written");
        }
    }
}

/// An activation in f64.
pub(crate) fn activate(activation: Option<Activation>, x: f64) -> f64 {
    match activation {
        None => x,
        Some(Activation::Relu) => x.max(0.0),
        Some(Activation::Silu) => x / (1.0 + (-x).exp()),
        Some(Activation::Gelu) => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
        Some(Activation::GeluTanh) => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Some(other) => panic!("no oracle for {other}"),
    }
}

/// The result in f64 and the error that it may have, for every element.
pub(crate) fn reference(a: MatRef<'_>, b: MatRef<'_>, c: MatRef<'_>, spec: &GemmSpec<'_>) -> Vec<(f64, f64)> {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    let get = |x: MatRef<'_>, i, j| f64::from(x.get(i, j).expect("inside"));
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            let (mut sum, mut size) = (0.0, 0.0);
            for p in 0..k {
                let product = get(a, i, p) * get(b, p, j);
                sum += product;
                size += product.abs();
            }
            let alpha = f64::from(spec.alpha);
            let mut x = alpha * sum;
            let mut bound = (k as f64 + 4.0) * (alpha * size).abs();
            if spec.beta != 0.0 {
                let scaled = f64::from(spec.beta) * get(c, i, j);
                x += scaled;
                // C takes part in one rounding for each block of k, which a test may ask to be small.
                let kc = spec.blocking.map_or(16, |blocking| blocking.kc.clamp(1, 16));
                bound += (4.0 + k as f64 / kc as f64) * scaled.abs();
            }
            if let Some(bias) = spec.bias {
                x += f64::from(bias[j]);
                bound += 2.0 * f64::from(bias[j]).abs();
            }
            let y = activate(spec.activation, x);
            if spec.activation.is_some() {
                bound = 1.2 * bound + 8.0 * (x.abs() + y.abs());
            }
            out.push((y, 1.05 * bound * U + f64::from(f32::MIN_POSITIVE)));
        }
    }
    out
}

/// Compares a result with the oracle.
pub(crate) fn assert_close(c: &Matrix, expected: &[(f64, f64)], what: &str) {
    for i in 0..c.rows {
        for j in 0..c.cols {
            let (wanted, bound) = expected[i * c.cols + j];
            let got = c.at(i, j);
            assert!(
                (f64::from(got) - wanted).abs() <= bound,
                "{what}: element ({i}, {j}) of {} x {} is {got:e}, expected {wanted:e} +- {bound:e}",
                c.rows,
                c.cols
            );
        }
    }
    c.assert_gaps_untouched(what);
}
