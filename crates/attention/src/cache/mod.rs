//! Key/value caches: what decoding keeps of the tokens before, in place for attention to read.
//!
//! [`KvCache`] gives every batch its own stretch of memory and can roll; [`PagedCache`] hands out pages of a
//! pool, which sequences share until they differ. Both store f32, f16, bf16 or 8-bit integers ([`Storage`])
//! whatever type of rows comes, and give views that attention reads as they lie.
//!
//! A call that is refused leaves the cache as it was: new rows go where no live row lies, and count once all
//! are there.

mod contiguous;
mod error;
mod free_pages;
mod paged;
mod pool;
mod slab;

pub use contiguous::{KvCache, KvCacheConfig};
pub use error::CacheError;
pub use paged::{PagedCache, PagedCacheConfig, PagedView, SequenceId};
pub use slab::Storage;

use crate::{Argument, Data};
use slab::Slab;

/// What a cache's rows are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    storage: Storage,
}

impl Layout {
    fn check(&self) -> Result<(), CacheError> {
        for (argument, size) in [("kv_heads", self.kv_heads), ("key_dim", self.key_dim)] {
            if size == 0 {
                return Err(CacheError::Zero { argument });
            }
        }
        self.storage.check("key_dim", self.key_dim)?;
        self.storage.check("value_dim", self.value_dim)
    }

    /// The keys and the values of `outer` stretches of `rows` rows per head.
    fn slabs(&self, outer: usize, rows: usize) -> Result<(Slab, Slab), CacheError> {
        let keys = Slab::new(self.storage, "keys", [outer, self.kv_heads, rows, self.key_dim])?;
        let values = Slab::new(self.storage, "values", [outer, self.kv_heads, rows, self.value_dim])?;
        Ok((keys, values))
    }

    /// The number of new tokens, where keys and values fit the cache and each other.
    fn check_rows(&self, batch: usize, k: &Data<'_>, v: &Data<'_>) -> Result<usize, CacheError> {
        let length = k.shape()[2];
        for (argument, data, dim) in [(Argument::Key, k, self.key_dim), (Argument::Value, v, self.value_dim)]
        {
            if let Data::Int8(_) = data {
                return Err(CacheError::Type { argument, given: data.type_name() });
            }
            let axes = ["batch", "heads", "length", "head dim"];
            let expected = [batch, self.kv_heads, length, dim];
            for (axis, (given, expected)) in axes.into_iter().zip(data.shape().into_iter().zip(expected)) {
                if given != expected {
                    return Err(CacheError::Shape { argument, axis, given, expected });
                }
            }
        }
        Ok(length)
    }
}

/// What is called for keys that are stored as they come.
type AsIs = fn(usize, &mut [f32]);

/// New rows of one batch.
struct Rows<'a> {
    argument: Argument,
    data: &'a Data<'a>,
    batch: usize,
    /// The position of the first.
    first: usize,
}

impl Rows<'_> {
    /// Converts the rows and writes each where `target` (of its head and index) says. `prepare` sees each
    /// before, with its position.
    fn store<F: FnMut(usize, &mut [f32])>(
        &self,
        slab: &mut Slab,
        prepare: &mut Option<F>,
        target: impl Fn(usize, usize) -> usize,
    ) -> Result<(), CacheError> {
        let [_, heads, length, dim] = self.data.shape();
        let mut row = vec![0.0f32; if heads * length == 0 { 0 } else { dim }];
        for head in 0..heads {
            for index in 0..length {
                let (source, target) = ([self.batch, head, index], target(head, index));
                if prepare.is_none() && slab.copy_same(target, self.data, source) {
                    continue;
                }
                widen(self.data, source, &mut row);
                if let Some(prepare) = prepare {
                    prepare(self.first + index, &mut row);
                }
                slab.write_row(target, &row).map_err(|given| CacheError::NotFinite {
                    argument: self.argument,
                    row: source,
                    given,
                })?;
            }
        }
        Ok(())
    }
}

/// One row in f32.
fn widen(data: &Data<'_>, [batch, head, position]: [usize; 3], to: &mut [f32]) {
    match data {
        Data::F32(x) => to.copy_from_slice(x.row(batch, head, position)),
        Data::F16(x) => to.iter_mut().zip(x.row(batch, head, position)).for_each(|(to, x)| *to = x.to_f32()),
        Data::Bf16(x) => to.iter_mut().zip(x.row(batch, head, position)).for_each(|(to, x)| *to = x.to_f32()),
        Data::Int8(_) => unreachable!("refused before rows are read"),
    }
}
