//! What can be wrong with a call of a cache: every refusal names the argument, what came and what was
//! expected.

use core::fmt;

use super::SequenceId;
use crate::Argument;

/// Why a call of a cache was refused. The cache holds what it held before.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum CacheError {
    /// A size is 0 that must not be.
    Zero {
        /// Which: "kv_heads", "key_dim", "page_size", "window" or "storage group".
        argument: &'static str,
    },
    /// The groups of dims that share a scale do not divide the dim.
    Group {
        /// Dims per scale that came.
        given: usize,
        /// What they must divide: "key_dim" or "value_dim".
        of: &'static str,
        /// Its size.
        dim: usize,
    },
    /// The capacity has no room for two windows, so that rolling would move rows at nearly every append.
    Window {
        /// The window that came.
        given: usize,
        /// The capacity.
        capacity: usize,
    },
    /// The cache does not fit the address space, or the memory cannot be had.
    TooLarge {
        /// "keys", "values", "batch" or "pages".
        argument: &'static str,
        /// (batch, heads, capacity, dim) or (pages, heads, page size, dim).
        shape: [usize; 4],
    },
    /// Rows of a type that caches do not take.
    Type {
        /// The argument at fault.
        argument: Argument,
        /// The type that came.
        given: &'static str,
    },
    /// An axis does not fit the cache.
    Shape {
        /// The argument at fault.
        argument: Argument,
        /// Its axis: "batch", "heads", "length" or "head dim".
        axis: &'static str,
        /// The size that came.
        given: usize,
        /// The size expected.
        expected: usize,
    },
    /// A value that 8-bit storage has no scale for.
    NotFinite {
        /// The argument at fault.
        argument: Argument,
        /// Its (batch, head, position).
        row: [usize; 3],
        /// The value; where keys are changed on the way in, the changed one.
        given: f32,
    },
    /// The new tokens do not fit.
    Full {
        /// Of which batch.
        batch: usize,
        /// Tokens it holds.
        length: usize,
        /// Tokens that came.
        given: usize,
        /// Tokens it can hold.
        capacity: usize,
    },
    /// More new tokens in one call than a rolling cache has room for beside its window.
    TooMany {
        /// Tokens that came.
        given: usize,
        /// capacity - window.
        limit: usize,
    },
    /// The pool has too few free pages.
    PoolFull {
        /// Pages that the call needs, copies of shared ones among them.
        needed: usize,
        /// Pages that are free.
        free: usize,
    },
    /// There is no such batch.
    Batch {
        /// The index that came.
        given: usize,
        /// The number of batches.
        batches: usize,
    },
    /// A length to truncate to that lies beyond the end.
    Beyond {
        /// The length that came.
        given: usize,
        /// The tokens held.
        length: usize,
    },
    /// The sequence was freed, or never was.
    Stale {
        /// The handle that came.
        given: SequenceId,
    },
}

impl fmt::Display for CacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CacheError::Zero { argument } => write!(f, "{argument}: 0, expected at least 1"),
            CacheError::Group { given, of, dim } => {
                write!(f, "storage: groups of {given} dims, expected a divisor of {of} = {dim}")
            }
            CacheError::Window { given, capacity } => {
                write!(f, "window: {given}, expected at most half the capacity of {capacity}")
            }
            CacheError::TooLarge { argument, shape } => {
                write!(f, "{argument}: shape {shape:?} does not fit the address space or the memory")
            }
            CacheError::Type { argument, given } => {
                write!(f, "{argument}: {given}, expected f32, f16 or bf16")
            }
            CacheError::Shape { argument, axis, given, expected } => {
                write!(f, "{argument}: {axis} is {given}, expected {expected}")
            }
            CacheError::NotFinite { argument, row, given } => {
                write!(f, "{argument}: {given} in row {row:?}, expected finite values for 8-bit storage")
            }
            CacheError::Full { batch, length, given, capacity } => write!(
                f,
                "key: {given} new tokens for batch {batch}, expected at most {} after {length} of {capacity}",
                capacity - length
            ),
            CacheError::TooMany { given, limit } => {
                write!(f, "key: {given} new tokens, expected at most capacity - window = {limit}")
            }
            CacheError::PoolFull { needed, free } => {
                write!(
                    f,
                    "key: the new tokens need {needed} pages, expected at most the {free} that are free"
                )
            }
            CacheError::Batch { given, batches } => {
                write!(f, "batch: {given}, expected an index below {batches}")
            }
            CacheError::Beyond { given, length } => {
                write!(f, "length: {given}, expected at most the {length} tokens held")
            }
            CacheError::Stale { given } => {
                write!(f, "id: {given}, expected a sequence that has not been freed")
            }
        }
    }
}

impl core::error::Error for CacheError {}
