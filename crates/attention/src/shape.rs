//! The sizes of a call, and the work in it.

use crate::Causal;

/// Sizes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Batch.
    pub batch: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Query length.
    pub query_len: usize,
    /// Key length.
    pub key_len: usize,
    /// Dim of a query and of a key.
    pub key_dim: usize,
    /// Dim of a value and of an output row.
    pub value_dim: usize,
}

impl Shape {
    /// Query heads per key/value head; 0 where there is none.
    #[must_use]
    pub fn group(&self) -> usize {
        self.query_heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// Useful floating-point operations: 2 (dk + dv) for each score, of all keys or of those that a causal mask leaves.
    #[must_use]
    pub fn flops(&self, causal: Option<Causal>) -> f64 {
        let (rows, keys) = (self.query_len as f64, self.key_len as f64);
        // Row i sees clamp(i + 1 + offset, 0, keys) of them; `upto(x)` is the sum of clamp(t, 0, keys) for t <= x.
        let upto = |x: f64| {
            let ramp = x.clamp(0.0, keys);
            ramp * (ramp + 1.0) / 2.0 + (x - keys).max(0.0) * keys
        };
        let per_head = match causal.map(|causal| causal.offset(self.query_len, self.key_len) as f64) {
            None => rows * keys,
            Some(offset) => upto(rows + offset) - upto(offset),
        };
        let heads = self.batch as f64 * self.query_heads as f64;
        per_head * heads * 2.0 * (self.key_dim as f64 + self.value_dim as f64)
    }
}
