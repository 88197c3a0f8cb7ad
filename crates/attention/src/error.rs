//! What can be wrong with a call: every refusal names the argument, what came and what was expected.

use core::fmt;

use qkv_simd::IsaError;

/// Which of the tensors of a call is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Argument {
    /// The queries, (batch, query heads, query length, key dim).
    Query,
    /// The keys, (batch, key/value heads, key length, key dim).
    Key,
    /// The values, (batch, key/value heads, key length, value dim).
    Value,
    /// The output, (batch, query heads, query length, value dim).
    Output,
    /// The log-sum-exp, (batch, query heads, query length).
    Lse,
    /// The row maxima, (batch, query heads, query length).
    Maxima,
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Argument::Query => "query",
            Argument::Key => "key",
            Argument::Value => "value",
            Argument::Output => "output",
            Argument::Lse => "lse",
            Argument::Maxima => "maxima",
        })
    }
}

/// Why a view of memory as a tensor was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorError {
    /// The product of the sizes, or an offset inside the tensor, does not fit the address space, or the memory is not to be
    /// had.
    TooLarge {
        /// (batch, heads, length, dim).
        shape: [usize; 4],
    },
    /// Some element lies outside the buffer.
    OutOfBounds {
        /// (batch, heads, length, dim).
        shape: [usize; 4],
        /// Values from one index to the next on each axis.
        strides: [isize; 4],
        /// Where element (0, 0, 0, 0) lies in the buffer.
        offset: usize,
        /// The buffer's length in values.
        buffer: usize,
    },
    /// The head dimension is not contiguous: its stride must be 1.
    LastAxisNotContiguous {
        /// The stride that came.
        stride: isize,
    },
    /// Scales or zero points that are not (batch, heads, length, groups) of their values, with groups that divide the dim.
    ScalesDoNotFit {
        /// Those of the scales or zero points.
        scales: [usize; 4],
        /// Those of the values.
        values: [usize; 4],
    },
    /// Two elements of a tensor that is to be written share their memory.
    Overlapping {
        /// (batch, heads, length, dim).
        shape: [usize; 4],
        /// Values from one index to the next on each axis.
        strides: [isize; 4],
    },
}

impl fmt::Display for TensorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TensorError::TooLarge { shape } => {
                write!(f, "shape {shape:?} with its strides spans more than the address space")
            }
            TensorError::OutOfBounds { shape, strides, offset, buffer } => write!(
                f,
                "shape {shape:?} with strides {strides:?} from offset {offset} leaves the buffer of {buffer} values"
            ),
            TensorError::LastAxisNotContiguous { stride } => {
                write!(f, "the last axis (head dim) has stride {stride}, expected 1")
            }
            TensorError::ScalesDoNotFit { scales, values } => write!(
                f,
                "scales of shape {scales:?} do not fit values of shape {values:?}, expected the same but for the last axis, \
                 which must divide the dim"
            ),
            TensorError::Overlapping { shape, strides } => {
                write!(f, "shape {shape:?} with strides {strides:?} overlaps itself, but is to be written")
            }
        }
    }
}

impl core::error::Error for TensorError {}

/// Why a call of attention was refused. Nothing has been written then.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum AttentionError {
    /// An axis of one argument does not agree with another's.
    ShapeMismatch {
        /// The argument at fault.
        argument: Argument,
        /// Its axis: "batch", "heads", "length" or "head dim".
        axis: &'static str,
        /// The size that came.
        given: usize,
        /// The size expected.
        expected: usize,
        /// What the expectation comes from.
        because_of: Argument,
    },
    /// There are no heads, or no key dimension.
    ZeroSize {
        /// The argument at fault.
        argument: Argument,
        /// Its axis: "heads" or "head dim".
        axis: &'static str,
    },
    /// The query heads are not a multiple of the key/value heads.
    HeadsNotDivisible {
        /// Query heads.
        query_heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// The buffer for the log-sum-exp has the wrong length.
    LseLength {
        /// Which: the LSE or the row maxima.
        argument: Argument,
        /// Values that came.
        given: usize,
        /// batch x heads x query length.
        expected: usize,
    },
    /// The scale is NaN or infinite.
    BadScale {
        /// The scale that came.
        given: f32,
    },
    /// A new output of this shape does not fit the address space.
    TooLarge {
        /// (batch, heads, length, dim).
        shape: [usize; 4],
    },
    /// A tensor is longer than positions can be counted: 2^48, or 2^24 where a rule or ALiBi counts them in f32.
    TooLong {
        /// The argument at fault.
        argument: Argument,
        /// Its length.
        given: usize,
        /// The longest allowed.
        limit: usize,
    },
    /// The soft cap is not a positive finite number, or so small that the scale over it is not finite.
    BadSoftcap {
        /// The cap that came.
        given: f32,
    },
    /// A mask, a bias or a block table does not broadcast to what it is for.
    DoesNotBroadcast {
        /// "mask", "bias" or "block_mask".
        argument: &'static str,
        /// Its shape.
        given: [usize; 4],
        /// The shape to which it must broadcast: each size equal or 1.
        expected: [usize; 4],
    },
    /// A list has the wrong number of entries.
    Count {
        /// Which: "alibi_slopes", "sinks", "key_lengths", ...
        argument: &'static str,
        /// Entries that came.
        given: usize,
        /// What was expected.
        expected: usize,
    },
    /// An entry of a list is not what it may be.
    Entry {
        /// Which list.
        argument: &'static str,
        /// Which entry.
        index: usize,
        /// Its value.
        given: f64,
        /// What was expected.
        expected: &'static str,
    },
    /// A length or offset lies beyond the sequence that it counts in.
    Beyond {
        /// Which list.
        argument: &'static str,
        /// Which entry.
        index: usize,
        /// Its value.
        given: usize,
        /// The largest allowed.
        limit: usize,
    },
    /// A list that must ascend does not.
    Decreasing {
        /// Which list.
        argument: &'static str,
        /// The entry that is below the one before.
        index: usize,
        /// Its value.
        given: usize,
        /// The value before.
        before: usize,
    },
    /// T5's buckets and distance do not fit each other.
    BadT5Bias {
        /// Buckets that came.
        buckets: usize,
        /// Distance that came.
        max_distance: usize,
        /// What was expected.
        expected: &'static str,
    },
    /// A window with dilation 0.
    ZeroDilation,
    /// A block-sparse mask with an empty block.
    BlockMaskBlock {
        /// (queries, keys) per block.
        given: [usize; 2],
    },
    /// An index outside the block table.
    BlockMaskIndex {
        /// (batch, head, query block, key block).
        given: [usize; 4],
        /// The table's shape.
        shape: [usize; 4],
    },
    /// An option that does not go with another or with this kind of call.
    NotTogether {
        /// The option.
        argument: &'static str,
        /// With what.
        with: &'static str,
    },
    /// `QKV_ISA` or the requested instruction set cannot be used.
    Isa(IsaError),
}

impl fmt::Display for AttentionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttentionError::ShapeMismatch { argument, axis, given, expected, because_of } => {
                write!(f, "{argument}: {axis} is {given}, expected {expected} to match {because_of}")
            }
            AttentionError::ZeroSize { argument, axis } => {
                write!(f, "{argument}: {axis} is 0, expected at least 1")
            }
            AttentionError::HeadsNotDivisible { query_heads, kv_heads } => {
                write!(f, "query: {query_heads} heads, expected a multiple of the {kv_heads} key/value heads")
            }
            AttentionError::LseLength { argument, given, expected } => {
                write!(f, "{argument}: {given} values, expected batch x heads x query length = {expected}")
            }
            AttentionError::BadScale { given } => {
                write!(f, "scale: {given}, expected a finite number")
            }
            AttentionError::TooLarge { shape } => {
                write!(f, "output: shape {shape:?} does not fit the address space")
            }
            AttentionError::TooLong { argument, given, limit } => {
                write!(f, "{argument}: length {given}, expected at most {limit}")
            }
            AttentionError::BadSoftcap { given } if given.is_finite() && *given > 0.0 => {
                write!(f, "softcap: {given:e}, expected a number by which the scale can be divided")
            }
            AttentionError::BadSoftcap { given } => {
                write!(f, "softcap: {given}, expected a positive finite number")
            }
            AttentionError::DoesNotBroadcast { argument, given, expected } => {
                write!(f, "{argument}: shape {given:?} does not broadcast to {expected:?}")
            }
            AttentionError::Count { argument, given, expected } => {
                write!(f, "{argument}: {given} entries, expected {expected}")
            }
            AttentionError::Entry { argument, index, given, expected } => {
                write!(f, "{argument}[{index}]: {given}, expected {expected}")
            }
            AttentionError::Beyond { argument, index, given, limit } => {
                write!(f, "{argument}[{index}]: {given}, expected at most {limit}")
            }
            AttentionError::Decreasing { argument, index, given, before } => {
                write!(f, "{argument}[{index}]: {given} after {before}, expected ascending")
            }
            AttentionError::BadT5Bias { buckets, max_distance, expected } => {
                write!(f, "t5_bias: {buckets} buckets up to distance {max_distance}, expected {expected}")
            }
            AttentionError::ZeroDilation => write!(f, "window: dilation 0, expected at least 1"),
            AttentionError::BlockMaskBlock { given } => {
                write!(f, "block_mask: blocks of {given:?}, expected at least 1 x 1")
            }
            AttentionError::BlockMaskIndex { given, shape } => {
                write!(f, "block_mask: index {given:?} outside the table of {shape:?}")
            }
            AttentionError::NotTogether { argument, with } => {
                write!(f, "{argument}: not supported together with {with}")
            }
            AttentionError::Isa(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for AttentionError {}

impl From<IsaError> for AttentionError {
    fn from(error: IsaError) -> Self {
        AttentionError::Isa(error)
    }
}
