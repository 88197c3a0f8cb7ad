//! Many products in one call: batches of matrices that broadcast as numpy's do.
//!
//! The batch axes of the output say how many products there are. An operand has the same axes or fewer (they are aligned
//! at the last one), and an axis of length 1 is repeated with stride 0, never copied:
//!
//! ```text
//! A (2, 1, m, k)  @  B (3, k, n)  ->  C (2, 3, m, n)
//! ```
//!
//! Where B is the same for the last axes and the matrices of A and C follow each other like further rows, the batch is
//! one taller product: one pass over B instead of many.

use crate::driver::{Batch, Operand, Product, Weights};
use crate::gemm::{GemmSpec, compute, scale};
use crate::matrix::{Layout, MatMut, MatRef, check_reach, reach};
use crate::writeback::Target;
use crate::{GemmError, MAX_BATCH_AXES};

/// The axes of a batch: lengths and strides in values, outermost first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchAxes {
    rank: usize,
    shape: [usize; MAX_BATCH_AXES],
    strides: [isize; MAX_BATCH_AXES],
}

impl BatchAxes {
    /// Axes with these lengths and strides; empty for a single matrix.
    ///
    /// # Errors
    /// [`GemmError::BatchAxes`] where the two differ in length or there are more than [`MAX_BATCH_AXES`].
    pub fn new(shape: &[usize], strides: &[isize]) -> Result<Self, GemmError> {
        if shape.len() != strides.len() || shape.len() > MAX_BATCH_AXES {
            return Err(GemmError::BatchAxes {
                argument: "batch",
                given: (shape.len(), strides.len()),
                expected: MAX_BATCH_AXES,
            });
        }
        let mut axes = Self { rank: shape.len(), ..Self::default() };
        axes.shape[..shape.len()].copy_from_slice(shape);
        axes.strides[..shape.len()].copy_from_slice(strides);
        Ok(axes)
    }

    /// Lengths, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }
    /// Strides in values, outermost first.
    #[must_use]
    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.rank]
    }
}

/// All axes of a batch of matrices, rows and columns last.
fn all_axes(batch: &BatchAxes, layout: Layout) -> ([(usize, isize); MAX_BATCH_AXES + 2], usize) {
    let mut axes = [(1, 0); MAX_BATCH_AXES + 2];
    for (axis, (&len, &stride)) in axes.iter_mut().zip(batch.shape().iter().zip(batch.strides())) {
        *axis = (len, stride);
    }
    axes[batch.rank] = (layout.rows, layout.row_stride);
    axes[batch.rank + 1] = (layout.cols, layout.col_stride);
    (axes, batch.rank + 2)
}

/// The layout (rows, cols, row stride, column stride) of matrices of a batch that lies inside a slice of `len` values.
fn inside(
    (rows, cols, row_stride, col_stride): (usize, usize, isize, isize),
    batch: &BatchAxes,
    len: usize,
    offset: usize,
) -> Result<Layout, GemmError> {
    let layout = Layout { rows, cols, row_stride, col_stride };
    let (axes, rank) = all_axes(batch, layout);
    let axes = &axes[..rank];
    let overflow = GemmError::Overflow { argument: "data", rows, cols, row_stride, col_stride };
    let Some((before, after)) = reach(axes) else { return Err(overflow) };
    // The number of matrices must be representable too: with stride 0 nothing else bounds it.
    let empty = axes.iter().any(|&(len, _)| len == 0);
    let count = axes.iter().try_fold(1usize, |count, &(len, _)| count.checked_mul(len));
    if !empty && count.is_none() {
        return Err(overflow);
    }
    check_reach("data", len, offset, before, after, empty).unwrap_or(Err(overflow))?;
    Ok(layout)
}

/// A batch of matrices that is read.
#[derive(Clone, Copy, Debug)]
pub struct BatchRef<'a> {
    first: MatRef<'a>,
    batch: BatchAxes,
}

impl<'a> BatchRef<'a> {
    /// The batch whose first matrix is `matrix` (rows, cols, row stride, column stride), at `offset` in `data`.
    ///
    /// # Errors
    /// As [`MatRef::from_slice_strided`], for the batch as a whole.
    pub fn from_slice(
        data: &'a [f32],
        offset: usize,
        batch: BatchAxes,
        matrix: (usize, usize, isize, isize),
    ) -> Result<Self, GemmError> {
        let layout = inside(matrix, &batch, data.len(), offset)?;
        // SAFETY: every element of every matrix is inside `data`.
        let first = unsafe { MatRef::from_layout(data.as_ptr().add(offset), layout) };
        Ok(Self { first, batch })
    }

    /// The batch whose first matrix is `first`.
    ///
    /// # Safety
    /// Every element of every matrix must be valid for reads as [`MatRef::from_raw_parts`] says.
    #[must_use]
    pub unsafe fn from_raw_parts(first: MatRef<'a>, batch: BatchAxes) -> Self {
        Self { first, batch }
    }
}

impl<'a> From<MatRef<'a>> for BatchRef<'a> {
    /// One matrix, used for the whole batch.
    fn from(first: MatRef<'a>) -> Self {
        Self { first, batch: BatchAxes::default() }
    }
}

/// A batch of matrices that is written.
#[derive(Debug)]
pub struct BatchMut<'a> {
    first: MatMut<'a>,
    batch: BatchAxes,
}

impl<'a> BatchMut<'a> {
    /// The batch whose first matrix is `matrix` (rows, cols, row stride, column stride), at `offset` in `data`.
    ///
    /// # Errors
    /// As [`BatchRef::from_slice`], and [`GemmError::Overlap`] where elements may share memory: each axis, in the order
    /// of ascending strides, must step over all that the smaller ones reach.
    pub fn from_slice(
        data: &'a mut [f32],
        offset: usize,
        batch: BatchAxes,
        matrix: (usize, usize, isize, isize),
    ) -> Result<Self, GemmError> {
        let layout = inside(matrix, &batch, data.len(), offset)?;
        if !nested(&batch, layout) {
            let (axes, rank) = all_axes(&batch, layout);
            return Err(GemmError::Overlap {
                argument: "data",
                shape: axes[..rank].iter().map(|axis| axis.0).collect(),
                strides: axes[..rank].iter().map(|axis| axis.1).collect(),
            });
        }
        // SAFETY: every element of every matrix is inside `data`, with memory of its own.
        let first = unsafe { MatMut::from_layout(data.as_mut_ptr().add(offset), layout) };
        Ok(Self { first, batch })
    }

    /// The batch whose first matrix is `first`.
    ///
    /// # Safety
    /// Every element of every matrix must be valid as [`MatMut::from_raw_parts`] says, with memory of its own.
    #[must_use]
    pub unsafe fn from_raw_parts(first: MatMut<'a>, batch: BatchAxes) -> Self {
        Self { first, batch }
    }
}

/// What both batches can be asked.
macro_rules! shape_of {
    ($Batch:ident) => {
        impl $Batch<'_> {
            /// The axes of the batch.
            #[must_use]
            pub fn batch(&self) -> &BatchAxes {
                &self.batch
            }
            /// Rows of each matrix.
            #[must_use]
            pub fn rows(&self) -> usize {
                self.first.rows()
            }
            /// Columns of each matrix.
            #[must_use]
            pub fn cols(&self) -> usize {
                self.first.cols()
            }
        }
    };
}
shape_of!(BatchRef);
shape_of!(BatchMut);

/// Whether each axis steps over all that axes with smaller strides reach, which keeps elements apart.
fn nested(batch: &BatchAxes, layout: Layout) -> bool {
    let (mut axes, rank) = all_axes(batch, layout);
    let axes = &mut axes[..rank];
    if axes.iter().any(|&(len, _)| len == 0) {
        return true;
    }
    axes.sort_unstable_by_key(|&(_, stride)| stride.unsigned_abs());
    let mut extent = 0usize;
    for &(len, stride) in axes.iter().filter(|&&(len, _)| len > 1) {
        if stride.unsigned_abs() <= extent {
            return false;
        }
        // Inside the slice, as was checked before.
        extent += (len - 1) * stride.unsigned_abs();
    }
    true
}

/// For every matrix of the batch: C = activation(alpha A B + beta C + bias).
///
/// ```
/// use qkv_gemm::{BatchAxes, BatchMut, BatchRef, GemmSpec, MatRef, gemm_batched};
/// let a = [1.0, 2.0, 3.0, 4.0]; // two matrices of 1 x 2
/// let b = [1.0, 1.0]; // one of 2 x 1, for both
/// let mut c = [0.0; 2];
/// gemm_batched(
///     BatchRef::from_slice(&a, 0, BatchAxes::new(&[2], &[2])?, (1, 2, 2, 1))?,
///     MatRef::from_slice(&b, 2, 1)?.into(),
///     &mut BatchMut::from_slice(&mut c, 0, BatchAxes::new(&[2], &[1])?, (1, 1, 1, 1))?,
///     &GemmSpec::default(),
/// )?;
/// assert_eq!(c, [3.0, 7.0]);
/// # Ok::<(), qkv_gemm::GemmError>(())
/// ```
///
/// # Errors
/// As [`crate::gemm`], and [`GemmError::Batch`] where the axes of `a` or `b` are neither those of `c` nor 1. C is then
/// untouched.
pub fn gemm_batched(
    a: BatchRef<'_>,
    b: BatchRef<'_>,
    c: &mut BatchMut<'_>,
    spec: &GemmSpec<'_>,
) -> Result<(), GemmError> {
    let isa = spec.isa()?;
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    if b.rows() != k {
        return Err(GemmError::Shape { argument: "b", given: (b.rows(), n), expected: (k, n) });
    }
    if (c.rows(), c.cols()) != (m, n) {
        return Err(GemmError::Shape { argument: "c", given: (c.rows(), c.cols()), expected: (m, n) });
    }
    spec.check(n)?;
    let target = &c.batch;
    let (a_strides, b_strides) = (broadcast("a", &a.batch, target)?, broadcast("b", &b.batch, target)?);
    let mut batch = Batch { count: target.shape().iter().product(), rank: target.rank, ..Batch::ONE };
    for i in 0..target.rank {
        batch.axes[i] = (target.shape[i], [a_strides[i], b_strides[i], target.strides[i]]);
    }
    let mut m = m;
    if batch.count > 0 && m > 0 {
        fold(&mut batch, &mut m, a.first.row_stride(), c.first.row_stride());
    }
    let c = &mut c.first;
    let epilogue = spec.epilogue();
    let product = Product {
        isa,
        m,
        k,
        n,
        batch: &batch,
        a: Operand::new(&a.first),
        b: Weights::View(Operand::new(&b.first)),
        c: Target { row_stride: c.row_stride(), col_stride: c.col_stride(), ptr: c.as_mut_ptr() },
        scale: scale(spec, k),
        finish: &epilogue,
    };
    compute(&product, spec.blocking);
    Ok(())
}

/// The strides of an operand along the axes of the output: 0 where it is repeated.
fn broadcast(
    argument: &'static str,
    operand: &BatchAxes,
    target: &BatchAxes,
) -> Result<[isize; MAX_BATCH_AXES], GemmError> {
    let error =
        || GemmError::Batch { argument, given: operand.shape().to_vec(), expected: target.shape().to_vec() };
    let shift = target.rank.checked_sub(operand.rank).ok_or_else(error)?;
    let mut strides = [0; MAX_BATCH_AXES];
    for (i, (&len, &stride)) in operand.shape().iter().zip(operand.strides()).enumerate() {
        let wanted = target.shape[shift + i];
        if len == wanted && len != 1 {
            strides[shift + i] = stride;
        } else if len != 1 {
            return Err(error());
        }
    }
    Ok(strides)
}

/// Turns innermost axes of the batch into rows where B is the same along them and A and C go on by whole matrices.
fn fold(batch: &mut Batch, m: &mut usize, a_row: isize, c_row: isize) {
    while batch.rank > 0 {
        let (len, [a, b, c]) = batch.axes[batch.rank - 1];
        let next = |row: isize| isize::try_from(*m).ok().and_then(|m| row.checked_mul(m));
        if len > 1 && !(b == 0 && Some(a) == next(a_row) && Some(c) == next(c_row)) {
            break;
        }
        let Some(rows) = m.checked_mul(len) else { break };
        *m = rows;
        batch.count /= len;
        batch.rank -= 1;
    }
}
