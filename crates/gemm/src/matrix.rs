//! Views of matrices: a pointer, a shape and two strides, checked once when they are made.
//!
//! A view borrows its values, so the borrow checker keeps outputs apart from inputs. Strides count values and may be
//! anything that stays inside the slice: a transpose swaps them, a sub-matrix keeps them, a reversed axis negates one,
//! a broadcast has one of 0. An output may not reach the same value twice, which is checked exactly (see
//! [`MatMut::from_slice_strided`]); everything inside the crate relies on the two guarantees and checks nothing again.

use core::marker::PhantomData;
use core::ops::Range;

use crate::GemmError;

/// Shape and strides, shared by both kinds of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: isize,
    pub(crate) col_stride: isize,
}

impl Layout {
    fn overflow(&self, argument: &'static str) -> GemmError {
        let &Layout { rows, cols, row_stride, col_stride } = self;
        GemmError::Overflow { argument, rows, cols, row_stride, col_stride }
    }

    /// Row-major without gaps.
    fn dense(argument: &'static str, rows: usize, cols: usize) -> Result<Self, GemmError> {
        let layout =
            Self { rows, cols, row_stride: isize::try_from(cols).unwrap_or(isize::MAX), col_stride: 1 };
        match rows.checked_mul(cols) {
            Some(_) if isize::try_from(cols).is_ok() => Ok(layout),
            _ => Err(layout.overflow(argument)),
        }
    }

    /// Checks that a view of `len` values can start at `offset`.
    fn check(&self, argument: &'static str, len: usize, offset: usize) -> Result<(), GemmError> {
        let axes = [(self.rows, self.row_stride), (self.cols, self.col_stride)];
        let (before, after) = reach(&axes).ok_or_else(|| self.overflow(argument))?;
        check_reach(argument, len, offset, before, after, self.rows == 0 || self.cols == 0)
            .ok_or_else(|| self.overflow(argument))?
    }

    /// Whether two elements share memory: exactly where `di * row_stride = dj * col_stride` has a solution other than
    /// (0, 0) among the differences of two rows and of two columns, the least of which is (col_stride, row_stride)
    /// over their greatest common divisor.
    fn overlaps(&self) -> bool {
        let (a, b) = (self.row_stride.unsigned_abs(), self.col_stride.unsigned_abs());
        if self.rows == 0 || self.cols == 0 {
            return false;
        }
        match gcd(a, b) {
            0 => self.rows > 1 || self.cols > 1,
            g => b / g < self.rows && a / g < self.cols,
        }
    }

    fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// The offset of the first element of a sub-matrix, and its layout.
    fn sub(&self, rows: Range<usize>, cols: Range<usize>) -> Result<(isize, Self), GemmError> {
        for (argument, range, expected) in [("rows", &rows, self.rows), ("cols", &cols, self.cols)] {
            if range.start > range.end || range.end > expected {
                return Err(GemmError::Range { argument, given: (range.start, range.end), expected });
            }
        }
        let layout = Self { rows: rows.len(), cols: cols.len(), ..*self };
        let empty = rows.is_empty() || cols.is_empty();
        // An empty view starts nowhere: an offset past the end would be one that no allocation covers.
        let offset = if empty {
            0
        } else {
            rows.start as isize * self.row_stride + cols.start as isize * self.col_stride
        };
        Ok((offset, layout))
    }
}

fn gcd(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// How many values before and after its first element a view of these axes reaches; None past the address space.
pub(crate) fn reach(axes: &[(usize, isize)]) -> Option<(usize, usize)> {
    let (mut before, mut after) = (0usize, 0usize);
    if axes.iter().any(|&(len, _)| len == 0) {
        return Some((0, 0));
    }
    for &(len, stride) in axes {
        let extent = (len - 1).checked_mul(stride.unsigned_abs())?;
        let side = if stride < 0 { &mut before } else { &mut after };
        *side = side.checked_add(extent)?;
    }
    // Pointer arithmetic is in bytes and signed.
    let whole = before.checked_add(after)?.checked_add(1)?.checked_mul(size_of::<f32>())?;
    isize::try_from(whole).ok().map(|_| (before, after))
}

/// Checks a reach against a slice of `len` values and an offset; None on overflow.
pub(crate) fn check_reach(
    argument: &'static str,
    len: usize,
    offset: usize,
    before: usize,
    after: usize,
    empty: bool,
) -> Option<Result<(), GemmError>> {
    if before > offset {
        return Some(Err(GemmError::BeforeStart { argument, given: offset, expected: before }));
    }
    let expected = offset.checked_add(after)?.checked_add(usize::from(!empty))?;
    if expected > len {
        return Some(Err(GemmError::Length { argument, given: len, expected }));
    }
    Some(Ok(()))
}

/// A matrix that is read: `rows` x `cols` values of `f32` with any strides.
///
/// ```
/// use qkv_gemm::MatRef;
/// let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
/// let a = MatRef::from_slice(&values, 2, 3)?;
/// assert_eq!(a.get(1, 0), Some(4.0));
/// assert_eq!(a.t().get(0, 1), Some(4.0));
/// assert_eq!(a.sub(0..2, 1..3)?.get(1, 1), Some(6.0));
/// // The same row three times, backwards: stride 0 along the rows, -1 along the columns.
/// let broadcast = MatRef::from_slice_strided(&values, 2, 3, 3, 0, -1)?;
/// assert_eq!(broadcast.get(2, 0), Some(3.0));
/// # Ok::<(), qkv_gemm::GemmError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    ptr: *const f32,
    layout: Layout,
    values: PhantomData<&'a [f32]>,
}

// SAFETY: a `MatRef` is a shared borrow of `f32` values, as `&[f32]` is.
unsafe impl Send for MatRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for MatRef<'_> {}

impl<'a> MatRef<'a> {
    /// A row-major matrix without gaps.
    ///
    /// # Errors
    /// [`GemmError::Length`] where `data` is not exactly `rows * cols` values, [`GemmError::Overflow`] where that
    /// product cannot be represented.
    pub fn from_slice(data: &'a [f32], rows: usize, cols: usize) -> Result<Self, GemmError> {
        let layout = Layout::dense("data", rows, cols)?;
        let expected = rows * cols;
        if data.len() != expected {
            return Err(GemmError::Length { argument: "data", given: data.len(), expected });
        }
        Ok(Self { ptr: data.as_ptr(), layout, values: PhantomData })
    }

    /// A matrix whose element (i, j) is `data[offset + i * row_stride + j * col_stride]`. Strides may be negative or 0.
    ///
    /// # Errors
    /// [`GemmError::Length`], [`GemmError::BeforeStart`] or [`GemmError::Overflow`] where an element would lie outside.
    pub fn from_slice_strided(
        data: &'a [f32],
        offset: usize,
        rows: usize,
        cols: usize,
        row_stride: isize,
        col_stride: isize,
    ) -> Result<Self, GemmError> {
        let layout = Layout { rows, cols, row_stride, col_stride };
        layout.check("data", data.len(), offset)?;
        // SAFETY: the check has shown offset <= len.
        Ok(unsafe { Self::from_layout(data.as_ptr().add(offset), layout) })
    }

    /// The address of element (0, 0); dangling where the matrix is empty.
    #[must_use]
    pub fn as_ptr(&self) -> *const f32 {
        self.ptr
    }
    /// The element (i, j), None outside of the matrix.
    #[must_use]
    pub fn get(&self, i: usize, j: usize) -> Option<f32> {
        let Layout { rows, cols, row_stride, col_stride } = self.layout;
        // SAFETY: the element is inside the matrix, all of which is readable.
        (i < rows && j < cols)
            .then(|| unsafe { *self.ptr.offset(i as isize * row_stride + j as isize * col_stride) })
    }
}

/// A matrix that is written: as [`MatRef`], borrowed alone, each element with memory of its own.
#[derive(Debug)]
pub struct MatMut<'a> {
    ptr: *mut f32,
    layout: Layout,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatMut` is an exclusive borrow of `f32` values, as `&mut [f32]` is.
unsafe impl Send for MatMut<'_> {}
// SAFETY: as above; through a shared reference it can only be read.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// A row-major matrix without gaps.
    ///
    /// # Errors
    /// As [`MatRef::from_slice`].
    pub fn from_slice(data: &'a mut [f32], rows: usize, cols: usize) -> Result<Self, GemmError> {
        let layout = MatRef::from_slice(data, rows, cols)?.layout;
        Ok(Self { ptr: data.as_mut_ptr(), layout, values: PhantomData })
    }

    /// A matrix whose element (i, j) is `data[offset + i * row_stride + j * col_stride]`. Strides may be negative.
    ///
    /// # Errors
    /// As [`MatRef::from_slice_strided`], and [`GemmError::Overlap`] where two elements would share memory: with
    /// strides (r, c) and g their greatest common divisor, where |c| / g < rows and |r| / g < cols.
    pub fn from_slice_strided(
        data: &'a mut [f32],
        offset: usize,
        rows: usize,
        cols: usize,
        row_stride: isize,
        col_stride: isize,
    ) -> Result<Self, GemmError> {
        let layout = MatRef::from_slice_strided(data, offset, rows, cols, row_stride, col_stride)?.layout;
        if layout.overlaps() {
            return Err(GemmError::Overlap {
                argument: "data",
                shape: vec![rows, cols],
                strides: vec![row_stride, col_stride],
            });
        }
        // SAFETY: the check has shown offset <= len.
        Ok(unsafe { Self::from_layout(data.as_mut_ptr().add(offset), layout) })
    }

    /// The address of element (0, 0); dangling where the matrix is empty.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.ptr
    }
    /// The same matrix, read.
    #[must_use]
    pub fn as_ref(&self) -> MatRef<'_> {
        MatRef { ptr: self.ptr, layout: self.layout, values: PhantomData }
    }

    /// The same matrix for a shorter time.
    #[must_use]
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { ptr: self.ptr, layout: self.layout, values: PhantomData }
    }
}

/// What both views are made and asked by: from an address, sizes and strides, the transpose, sub-matrices.
macro_rules! view {
    ($View:ident, $ptr:ty, $(#[$safety:meta])*) => {
        impl $View<'_> {
            $(#[$safety])*
            #[must_use]
            pub unsafe fn from_raw_parts(
                ptr: $ptr,
                rows: usize,
                cols: usize,
                row_stride: isize,
                col_stride: isize,
            ) -> Self {
                // SAFETY: the caller's promise.
                unsafe { Self::from_layout(ptr, Layout { rows, cols, row_stride, col_stride }) }
            }

            /// # Safety
            /// As [`Self::from_raw_parts`].
            pub(crate) unsafe fn from_layout(ptr: $ptr, layout: Layout) -> Self {
                Self { ptr, layout, values: PhantomData }
            }

            /// Rows.
            #[must_use]
            pub fn rows(&self) -> usize {
                self.layout.rows
            }
            /// Columns.
            #[must_use]
            pub fn cols(&self) -> usize {
                self.layout.cols
            }
            /// Values from one row to the next.
            #[must_use]
            pub fn row_stride(&self) -> isize {
                self.layout.row_stride
            }
            /// Values from one column to the next.
            #[must_use]
            pub fn col_stride(&self) -> isize {
                self.layout.col_stride
            }

            /// The transpose: the same values with the axes swapped.
            #[must_use]
            pub fn t(self) -> Self {
                Self { layout: self.layout.transposed(), ..self }
            }

            /// The sub-matrix of these rows and columns.
            ///
            /// # Errors
            /// [`GemmError::Range`] where a range runs backwards or out of the matrix.
            pub fn sub(self, rows: Range<usize>, cols: Range<usize>) -> Result<Self, GemmError> {
                let (offset, layout) = self.layout.sub(rows, cols)?;
                // SAFETY: the element that `offset` leads to is inside the matrix (or the offset is 0).
                Ok(unsafe { Self::from_layout(self.ptr.offset(offset), layout) })
            }
        }
    };
}

view!(MatRef, *const f32,
    /// A matrix at an address; units as in [`Self::from_slice_strided`].
    ///
    /// # Safety
    /// Every element must be valid for reads and unchanged while the view lives, all within one allocation.
);
view!(MatMut, *mut f32,
    /// A matrix at an address; units as in [`Self::from_slice_strided`].
    ///
    /// # Safety
    /// Every element must be valid for reads and writes, reachable through this view alone while it lives, and have memory
    /// of its own, all within one allocation. The values need be initialised only where they are read (beta not 0).
);
