//! What is measured: sizes, how many operations they take, and the lists that the benches and `measure` share.
//!
//! Operations are useful ones. A product of an m x k and a k x n matrix takes 2 m k n. Attention takes 4 d for each
//! score (2 d for q . k, 2 d for its share of the weighted sum); its exponentials count for nothing, and a causal mask
//! leaves half of the scores. That half is by convention exactly half (the diagonal would add 1/S), as the peers'
//! scripts count it too, so that figures can be compared.

use std::fmt;

use serde::Serialize;

/// Sizes of a call of attention with as many keys as queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AttentionShape {
    /// Batch.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Length of queries and keys.
    pub len: usize,
    /// Dim of queries, keys and values.
    pub dim: usize,
    /// Whether query i sees keys 0 ..= i only.
    pub causal: bool,
}

impl AttentionShape {
    /// Every query sees every key; as many key/value heads as query heads.
    #[must_use]
    pub const fn full(batch: usize, heads: usize, len: usize, dim: usize) -> Self {
        Self { batch, heads, kv_heads: heads, len, dim, causal: false }
    }

    /// [`Self::full`] under a causal mask.
    #[must_use]
    pub const fn causal(batch: usize, heads: usize, len: usize, dim: usize) -> Self {
        Self { causal: true, ..Self::full(batch, heads, len, dim) }
    }

    /// Useful operations of one call.
    #[must_use]
    pub fn flops(&self) -> f64 {
        let scores = [self.batch, self.heads, self.len, self.len].map(|n| n as f64).iter().product::<f64>();
        4.0 * self.dim as f64 * scores * if self.causal { 0.5 } else { 1.0 }
    }

    /// (batch, heads, length, dim) of the queries and of the output.
    #[must_use]
    pub fn query_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.len, self.dim]
    }

    /// (batch, heads, length, dim) of the keys and of the values.
    #[must_use]
    pub fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.len, self.dim]
    }
}

impl fmt::Display for AttentionShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, heads, kv_heads, len, dim, causal } = self;
        write!(f, "{} b{batch} h{heads}", if *causal { "causal" } else { "full" })?;
        if kv_heads != heads {
            write!(f, "/{kv_heads}")?;
        }
        write!(f, " s{len} d{dim}")
    }
}

/// Sizes of a matrix product: (m, k) times (k, n).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GemmShape {
    /// Rows of A and of C.
    pub m: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Columns of B and of C.
    pub n: usize,
}

impl GemmShape {
    /// (m, k, n).
    #[must_use]
    pub const fn new(m: usize, k: usize, n: usize) -> Self {
        Self { m, k, n }
    }

    /// A square one.
    #[must_use]
    pub const fn square(n: usize) -> Self {
        Self::new(n, n, n)
    }

    /// Operations of one product.
    #[must_use]
    pub fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.k as f64 * self.n as f64
    }

    /// Bytes that a product must at least read: both operands once.
    #[must_use]
    pub fn bytes_read(&self) -> f64 {
        (size_of::<f32>() * self.k) as f64 * (self.m + self.n) as f64
    }
}

impl fmt::Display for GemmShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.m, self.k, self.n)
    }
}

/// Square products.
pub const GEMM_SQUARE: [GemmShape; 6] = [
    GemmShape::square(64),
    GemmShape::square(128),
    GemmShape::square(256),
    GemmShape::square(512),
    GemmShape::square(1024),
    GemmShape::square(2048),
];

/// Vectors and thin matrices against weights, and the layers of a small transformer (384 and 768 wide).
pub const GEMM_SKINNY: [GemmShape; 5] = [
    GemmShape::new(1, 4096, 4096),
    GemmShape::new(8, 4096, 4096),
    GemmShape::new(128, 384, 384),
    GemmShape::new(128, 1536, 384),
    GemmShape::new(512, 3072, 768),
];

/// Attention for the benches: two lengths at two dims, then the shapes of encoders of short texts. Each is run full and
/// causal, beside peers that are up to twenty times slower, hence two heads at the long length.
pub const ATTENTION: [AttentionShape; 7] = [
    AttentionShape::full(1, 12, 512, 64),
    AttentionShape::full(1, 12, 512, 128),
    AttentionShape::full(1, 2, 2048, 64),
    AttentionShape::full(1, 2, 2048, 128),
    AttentionShape::full(8, 12, 128, 64),
    AttentionShape::full(32, 12, 128, 32),
    AttentionShape::full(1, 12, 32, 64),
];
