//! Block-sparse masks: a table of which blocks of keys a block of queries sees, at any block size.
//!
//! The table has one bit per (batch or all, head or all, query block, key block). It is made from lists of indices or
//! from a predicate on blocks; the dense mask is never built.

use core::ops::Range;

use crate::AttentionError;
use crate::tensor::has_room;

/// Which key blocks the queries of a query block see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMask {
    /// Queries and keys per block.
    block: [usize; 2],
    /// (batch or 1, heads or 1, query blocks, key blocks).
    shape: [usize; 4],
    /// One bit each, rows of whole words.
    bits: Vec<u64>,
}

impl BlockMask {
    /// A table of `shape` = (batch or 1, query heads or 1, query blocks, key blocks) in which no block is seen yet, for
    /// blocks of `block` = (queries, keys).
    ///
    /// # Errors
    /// Where a block size is 0, or the table does not fit the address space or the memory that is to be had.
    pub fn empty(shape: [usize; 4], block: [usize; 2]) -> Result<Self, AttentionError> {
        if block.contains(&0) {
            return Err(AttentionError::BlockMaskBlock { given: block });
        }
        let words = shape[3]
            .div_ceil(64)
            .checked_mul(shape[2])
            .and_then(|n| n.checked_mul(shape[1]))
            .and_then(|n| n.checked_mul(shape[0]))
            .filter(|&n| n < isize::MAX as usize / 8 && has_room::<u64>(n))
            .ok_or(AttentionError::TooLarge { shape })?;
        Ok(Self { block, shape, bits: vec![0; words] })
    }

    /// The table in which exactly the blocks (batch, head, query block, key block) are seen for which `sees` says so.
    ///
    /// # Errors
    /// As [`Self::empty`].
    pub fn from_fn(
        shape: [usize; 4],
        block: [usize; 2],
        mut sees: impl FnMut([usize; 4]) -> bool,
    ) -> Result<Self, AttentionError> {
        let mut mask = Self::empty(shape, block)?;
        // Of no blocks there may be any number of rows.
        let batches = if shape.contains(&0) { 0 } else { shape[0] };
        for batch in 0..batches {
            for head in 0..shape[1] {
                for query in 0..shape[2] {
                    for key in 0..shape[3] {
                        if sees([batch, head, query, key]) {
                            mask.set([batch, head, query, key]);
                        }
                    }
                }
            }
        }
        Ok(mask)
    }

    /// The table in which the given blocks (batch, head, query block, key block) are seen.
    ///
    /// # Errors
    /// As [`Self::empty`], and where an index is out of range.
    pub fn from_indices(
        shape: [usize; 4],
        block: [usize; 2],
        seen: impl IntoIterator<Item = [usize; 4]>,
    ) -> Result<Self, AttentionError> {
        let mut mask = Self::empty(shape, block)?;
        for index in seen {
            if index.into_iter().zip(shape).any(|(i, size)| i >= size) {
                return Err(AttentionError::BlockMaskIndex { given: index, shape });
            }
            mask.set(index);
        }
        Ok(mask)
    }

    /// (queries, keys) per block.
    #[must_use]
    pub fn block(&self) -> [usize; 2] {
        self.block
    }

    /// (batch or 1, heads or 1, query blocks, key blocks).
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Whether query i of (batch, head) sees key j by this mask.
    ///
    /// # Panics
    /// If an index is outside the table; one of 1 batch or head stands for any number.
    #[must_use]
    pub fn sees(&self, batch: usize, head: usize, query: usize, key: usize) -> bool {
        let (query, key) = (query / self.block[0], key / self.block[1]);
        let [batches, heads, ..] = self.shape;
        assert!(
            (batch < batches || batches == 1) && (head < heads || heads == 1),
            "batch {batch}, head {head}"
        );
        assert!(query < self.shape[2] && key < self.shape[3], "block {query}, {key}");
        self.row(batch, head, query)[key / 64] >> (key % 64) & 1 == 1
    }

    /// Whether any query of `queries` sees the key block that `key` is in, and whether all do.
    pub(crate) fn sees_block(
        &self,
        batch: usize,
        head: usize,
        queries: &Range<usize>,
        key: usize,
    ) -> (bool, bool) {
        let block = key / self.block[1];
        let (mut any, mut all) = (false, true);
        for query in queries.start / self.block[0]..queries.end.div_ceil(self.block[0]) {
            let sees = self.row(batch, head, query)[block / 64] >> (block % 64) & 1 == 1;
            any |= sees;
            all &= sees;
        }
        (any, all)
    }

    fn words(&self) -> usize {
        self.shape[3].div_ceil(64)
    }

    fn row(&self, batch: usize, head: usize, query_block: usize) -> &[u64] {
        let [batches, heads, query_blocks, _] = self.shape;
        let (batch, head) = (batch.min(batches - 1), head.min(heads - 1));
        &self.bits[((batch * heads + head) * query_blocks + query_block) * self.words()..][..self.words()]
    }

    fn set(&mut self, [batch, head, query, key]: [usize; 4]) {
        let row = ((batch * self.shape[1] + head) * self.shape[2] + query) * self.words();
        self.bits[row + key / 64] |= 1 << (key % 64);
    }
}
