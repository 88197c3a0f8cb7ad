//! Why a product is refused: every refusal names the argument, what came and what was expected, and is made before
//! the output is touched.

use core::fmt;

use qkv_simd::{IsaError, IsaKind};

/// What is wrong with the arguments of a matrix product.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GemmError {
    /// A slice does not have the length that its shape and strides ask for.
    Length {
        /// The argument.
        argument: &'static str,
        /// Values that came.
        given: usize,
        /// Values that its shape asks for: exactly so many for a dense view, at least so many for a strided one.
        expected: usize,
    },
    /// A strided view would begin before the first value of its slice.
    BeforeStart {
        /// The argument.
        argument: &'static str,
        /// The offset that came.
        given: usize,
        /// The least that its negative strides ask for.
        expected: usize,
    },
    /// Shape and strides reach further than addresses do.
    Overflow {
        /// The argument.
        argument: &'static str,
        /// Rows that came.
        rows: usize,
        /// Columns that came.
        cols: usize,
        /// The stride between rows that came, in values.
        row_stride: isize,
        /// The stride between columns that came, in values.
        col_stride: isize,
    },
    /// Two elements of an output would share memory.
    Overlap {
        /// The argument.
        argument: &'static str,
        /// The lengths of its axes, outermost first.
        shape: Vec<usize>,
        /// Their strides in values.
        strides: Vec<isize>,
    },
    /// A matrix has the wrong shape.
    Shape {
        /// The argument.
        argument: &'static str,
        /// Rows and columns that came.
        given: (usize, usize),
        /// Rows and columns that the other arguments ask for.
        expected: (usize, usize),
    },
    /// A range of rows or columns is not inside the matrix.
    Range {
        /// The argument: `"rows"` or `"cols"`.
        argument: &'static str,
        /// Start and end that came.
        given: (usize, usize),
        /// Rows or columns of the matrix.
        expected: usize,
    },
    /// The axes of a batch do not fit: neither equal to the output's nor 1, or too many.
    Batch {
        /// The argument.
        argument: &'static str,
        /// The batch axes that came.
        given: Vec<usize>,
        /// The batch axes of the output.
        expected: Vec<usize>,
    },
    /// Shape and strides of a batch differ in length, or there are more axes than [`crate::MAX_BATCH_AXES`].
    BatchAxes {
        /// The argument.
        argument: &'static str,
        /// Lengths and strides that came.
        given: (usize, usize),
        /// The most axes.
        expected: usize,
    },
    /// The bias is not one value per column.
    BiasLength {
        /// Values that came.
        given: usize,
        /// Columns of the output.
        expected: usize,
    },
    /// No activation has this name.
    UnknownActivation {
        /// The name that came.
        given: String,
    },
    /// The packed matrix was packed for another instruction set than the product is asked to use.
    PackedFor {
        /// What it was packed for.
        given: IsaKind,
        /// What the field `isa` of [`crate::GemmSpec`] asks for.
        expected: IsaKind,
    },
    /// A block size is 0.
    Blocking {
        /// The block sizes that came.
        given: crate::Blocking,
    },
    /// Memory for a packed matrix cannot be had.
    Memory {
        /// The argument.
        argument: &'static str,
        /// Rows and columns that came.
        given: (usize, usize),
    },
    /// The instruction set cannot be used.
    Isa(IsaError),
}

impl fmt::Display for GemmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { argument, given, expected } => {
                write!(f, "{argument}: {given} values given, its shape and strides ask for {expected}")
            }
            Self::BeforeStart { argument, given, expected } => write!(
                f,
                "{argument}: offset {given} given, its negative strides ask for at least {expected}"
            ),
            Self::Overflow { argument, rows, cols, row_stride, col_stride } => write!(
                f,
                "{argument}: a {rows} x {cols} matrix with strides ({row_stride}, {col_stride}) given, \
                 expected one whose extent in bytes can be addressed"
            ),
            Self::Overlap { argument, shape, strides } => write!(
                f,
                "{argument}: shape {shape:?} with strides {strides:?} given, expected strides that give each \
                 element memory of its own"
            ),
            Self::Shape { argument, given, expected } => write!(
                f,
                "{argument}: a {} x {} matrix given, expected {} x {}",
                given.0, given.1, expected.0, expected.1
            ),
            Self::Range { argument, given, expected } => write!(
                f,
                "{argument}: range {}..{} given, expected an ascending range inside 0..{expected}",
                given.0, given.1
            ),
            Self::Batch { argument, given, expected } => write!(
                f,
                "{argument}: batch {given:?} given, expected axes that are 1 or equal to the output's {expected:?}"
            ),
            Self::BatchAxes { argument, given, expected } => write!(
                f,
                "{argument}: {} batch lengths and {} batch strides given, expected as many of both and at most \
                 {expected}",
                given.0, given.1
            ),
            Self::BiasLength { given, expected } => {
                write!(f, "bias: {given} values given, expected {expected}, one per column of the output")
            }
            Self::UnknownActivation { given } => {
                write!(f, "activation: \"{given}\" given, expected one of gelu, gelu_tanh, relu, silu")
            }
            Self::PackedFor { given, expected } => {
                write!(f, "b: packed for instruction set \"{given}\", expected \"{expected}\"")
            }
            Self::Blocking { given } => {
                write!(f, "blocking: {given:?} given, expected sizes of at least 1")
            }
            Self::Memory { argument, given } => write!(
                f,
                "{argument}: a {} x {} matrix given, expected one that fits in memory",
                given.0, given.1
            ),
            Self::Isa(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for GemmError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Isa(error) => Some(error),
            _ => None,
        }
    }
}

impl From<IsaError> for GemmError {
    fn from(error: IsaError) -> Self {
        Self::Isa(error)
    }
}
