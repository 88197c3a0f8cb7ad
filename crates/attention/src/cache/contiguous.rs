//! A cache with a stretch of memory per batch: (batch, heads, capacity, dim), lengths per batch, and rolling.
//!
//! A rolling cache moves the last `window` tokens of a batch to the front when an append does not fit, which
//! with room for two windows costs at most two row copies per token; keys stay in order and contiguous, so
//! attention needs no ring.

use core::ops::Range;

use super::{
    AsIs, CacheError, Layout, Rows, Storage,
    slab::{Slab, filled},
};
use crate::{Argument, Data};

/// What a [`KvCache`] is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCacheConfig {
    batch: usize,
    capacity: usize,
    window: Option<usize>,
    layout: Layout,
}

impl KvCacheConfig {
    /// Room for `capacity` tokens in each batch, in f32, not rolling.
    #[must_use]
    pub fn new(batch: usize, kv_heads: usize, capacity: usize, key_dim: usize, value_dim: usize) -> Self {
        let layout = Layout { kv_heads, key_dim, value_dim, storage: Storage::F32 };
        Self { batch, capacity, window: None, layout }
    }

    /// With keys and values stored like this.
    #[must_use]
    pub fn with_storage(mut self, storage: Storage) -> Self {
        self.layout.storage = storage;
        self
    }

    /// Rolling: when new tokens do not fit, all but the last `window` are dropped. At most half the capacity;
    /// `None` does not roll.
    #[must_use]
    pub fn with_window(self, window: impl Into<Option<usize>>) -> Self {
        Self { window: window.into(), ..self }
    }
}

/// Keys and values of a batch of sequences, each of its own length.
///
/// ```
/// use qkv_attention::Tensor;
/// use qkv_attention::cache::{KvCache, KvCacheConfig, Storage};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = KvCacheConfig::new(1, 2, 1024, 64, 64).with_storage(Storage::F16);
/// let mut cache = KvCache::new(config)?;
/// let (k, v) = (Tensor::<f32>::zeros([1, 2, 5, 64])?, Tensor::<f32>::zeros([1, 2, 5, 64])?);
/// cache.append(k.view(), v.view())?;
/// assert_eq!(cache.keys().shape(), [1, 2, 5, 64]);
/// assert_eq!(cache.lengths(), [5]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct KvCache {
    config: KvCacheConfig,
    keys: Slab,
    values: Slab,
    lengths: Vec<usize>,
    dropped: Vec<usize>,
}

impl KvCache {
    /// An empty cache, with all its memory.
    ///
    /// # Errors
    /// Where there are no heads or no key dim, groups do not divide the dims, the window is 0 or more than
    /// half the capacity, or the memory cannot be had.
    pub fn new(config: KvCacheConfig) -> Result<Self, CacheError> {
        config.layout.check()?;
        match config.window {
            Some(0) => return Err(CacheError::Zero { argument: "window" }),
            Some(given) if given > config.capacity / 2 => {
                return Err(CacheError::Window { given, capacity: config.capacity });
            }
            _ => {}
        }
        let (keys, values) = config.layout.slabs(config.batch, config.capacity)?;
        let KvCacheConfig { batch, capacity, layout, .. } = config;
        let shape = [batch, layout.kv_heads, capacity, layout.key_dim];
        let counts = || filled(batch).ok_or(CacheError::TooLarge { argument: "batch", shape });
        Ok(Self { config, keys, values, lengths: counts()?, dropped: counts()? })
    }

    /// What it was made from.
    #[must_use]
    pub fn config(&self) -> KvCacheConfig {
        self.config
    }

    /// The most tokens that a batch can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.config.capacity
    }

    /// Bytes of keys and values, used or not.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// Tokens held, per batch: the spec's key lengths for [`keys`](Self::keys) and [`values`](Self::values).
    #[must_use]
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Tokens that rolling has dropped in front of a batch: row j of it is the token at position `dropped` +
    /// j.
    ///
    /// # Errors
    /// Where there is no such batch.
    pub fn dropped(&self, batch: usize) -> Result<usize, CacheError> {
        self.check_batch(batch)?;
        Ok(self.dropped[batch])
    }

    /// The keys: (batch, heads, longest length, key dim). Rows from a batch's own length on mean nothing.
    #[must_use]
    pub fn keys(&self) -> Data<'_> {
        self.view(&self.keys)
    }

    /// The values: (batch, heads, longest length, value dim). Rows from a batch's own length on mean nothing.
    #[must_use]
    pub fn values(&self) -> Data<'_> {
        self.view(&self.values)
    }

    /// Adds tokens to every batch: keys and values (batch, heads, new tokens, dim) in f32, f16 or bf16.
    ///
    /// # Errors
    /// Where the tensors do not fit the cache or each other, a batch is full, a rolling cache gets more than
    /// capacity - window tokens, or 8-bit storage a value that is not finite. The cache is as before then.
    pub fn append<'a>(&mut self, k: impl Into<Data<'a>>, v: impl Into<Data<'a>>) -> Result<(), CacheError> {
        self.append_rows(0..self.config.batch, k.into(), v.into(), None::<AsIs>)
    }

    /// Adds tokens to every batch; `prepare` changes each key row before it is stored, in f32, given its
    /// token's position (tokens dropped in front count), as rotary embeddings do.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_with<'a>(
        &mut self,
        k: impl Into<Data<'a>>,
        v: impl Into<Data<'a>>,
        prepare: impl FnMut(usize, &mut [f32]),
    ) -> Result<(), CacheError> {
        self.append_rows(0..self.config.batch, k.into(), v.into(), Some(prepare))
    }

    /// Adds tokens to one batch: keys and values (1, heads, new tokens, dim).
    ///
    /// # Errors
    /// As [`append`](Self::append), or where there is no such batch.
    pub fn append_to<'a>(
        &mut self,
        batch: usize,
        k: impl Into<Data<'a>>,
        v: impl Into<Data<'a>>,
    ) -> Result<(), CacheError> {
        self.check_batch(batch)?;
        self.append_rows(batch..batch + 1, k.into(), v.into(), None::<AsIs>)
    }

    /// Adds tokens to one batch; `prepare` changes each key row before it is stored, as in
    /// [`append_with`](Self::append_with).
    ///
    /// # Errors
    /// As [`append_to`](Self::append_to).
    pub fn append_to_with<'a>(
        &mut self,
        batch: usize,
        k: impl Into<Data<'a>>,
        v: impl Into<Data<'a>>,
        prepare: impl FnMut(usize, &mut [f32]),
    ) -> Result<(), CacheError> {
        self.check_batch(batch)?;
        self.append_rows(batch..batch + 1, k.into(), v.into(), Some(prepare))
    }

    /// Forgets the rows of a batch from `length` on, as when drafted tokens are rejected. What rolling has
    /// dropped stays dropped.
    ///
    /// # Errors
    /// Where there is no such batch or it holds fewer tokens.
    pub fn truncate(&mut self, batch: usize, length: usize) -> Result<(), CacheError> {
        self.check_batch(batch)?;
        if length > self.lengths[batch] {
            return Err(CacheError::Beyond { given: length, length: self.lengths[batch] });
        }
        self.lengths[batch] = length;
        Ok(())
    }

    /// Empties one batch, whose positions begin at 0 again.
    ///
    /// # Errors
    /// Where there is no such batch.
    pub fn clear(&mut self, batch: usize) -> Result<(), CacheError> {
        self.check_batch(batch)?;
        (self.lengths[batch], self.dropped[batch]) = (0, 0);
        Ok(())
    }

    /// Empties every batch; the memory stays.
    pub fn reset(&mut self) {
        self.lengths.fill(0);
        self.dropped.fill(0);
    }

    fn check_batch(&self, given: usize) -> Result<(), CacheError> {
        let batches = self.config.batch;
        if given < batches { Ok(()) } else { Err(CacheError::Batch { given, batches }) }
    }

    fn view<'a>(&self, slab: &'a Slab) -> Data<'a> {
        let KvCacheConfig { batch, capacity, layout, .. } = self.config;
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        slab.data([batch, layout.kv_heads, longest], [layout.kv_heads * capacity, capacity, 1])
    }

    /// Whether a batch must roll for `new` tokens.
    fn must_roll(&self, batch: usize, new: usize) -> Result<bool, CacheError> {
        let (length, capacity) = (self.lengths[batch], self.config.capacity);
        let fits = new <= capacity - length;
        match self.config.window {
            None if !fits => Err(CacheError::Full { batch, length, given: new, capacity }),
            // Whatever the length is, so that a size of appends that works once works always.
            Some(window) if new > capacity - window => {
                Err(CacheError::TooMany { given: new, limit: capacity - window })
            }
            _ => Ok(!fits),
        }
    }

    fn append_rows<F: FnMut(usize, &mut [f32])>(
        &mut self,
        batches: Range<usize>,
        k: Data<'_>,
        v: Data<'_>,
        mut prepare: Option<F>,
    ) -> Result<(), CacheError> {
        let new = self.config.layout.check_rows(batches.len(), &k, &v)?;
        let mut rolls = false;
        for batch in batches.clone() {
            rolls |= self.must_roll(batch, new)?;
        }
        let (heads, capacity) = (self.config.layout.kv_heads, self.config.capacity);
        let rows = |batch: usize, lengths: &[usize], dropped: &[usize]| {
            let (source, first) = (batch - batches.start, dropped[batch] + lengths[batch]);
            let keys = Rows { argument: Argument::Key, data: &k, batch: source, first };
            let values = Rows { argument: Argument::Value, data: &v, batch: source, first };
            (keys, values)
        };
        if rolls {
            // Rolling overwrites rows that a refusal must keep, so everything is converted beside the cache
            // first.
            let (mut new_keys, mut new_values) = self.config.layout.slabs(batches.len(), new)?;
            for batch in batches.clone() {
                let (keys, values) = rows(batch, &self.lengths, &self.dropped);
                let target = |head, index| ((batch - batches.start) * heads + head) * new + index;
                keys.store(&mut new_keys, &mut prepare, target)?;
                values.store(&mut new_values, &mut None::<AsIs>, target)?;
            }
            for batch in batches.clone() {
                if new > capacity - self.lengths[batch] {
                    self.roll(batch);
                }
                for head in 0..heads {
                    let from = ((batch - batches.start) * heads + head) * new;
                    let to = (batch * heads + head) * capacity + self.lengths[batch];
                    self.keys.take_rows(&new_keys, from, to, new);
                    self.values.take_rows(&new_values, from, to, new);
                }
            }
        } else {
            for batch in batches.clone() {
                let (keys, values) = rows(batch, &self.lengths, &self.dropped);
                let end = self.lengths[batch];
                let target = |head, index| (batch * heads + head) * capacity + end + index;
                keys.store(&mut self.keys, &mut prepare, target)?;
                values.store(&mut self.values, &mut None::<AsIs>, target)?;
            }
        }
        for length in &mut self.lengths[batches] {
            *length += new;
        }
        Ok(())
    }

    /// Moves the last `window` tokens of a batch to the front.
    fn roll(&mut self, batch: usize) {
        let (heads, capacity, length) =
            (self.config.layout.kv_heads, self.config.capacity, self.lengths[batch]);
        let kept = self.config.window.map_or(0, |window| window.min(length));
        for head in 0..heads {
            let front = (batch * heads + head) * capacity;
            self.keys.copy_rows(front + length - kept, front, kept);
            self.values.copy_rows(front + length - kept, front, kept);
        }
        self.dropped[batch] += length - kept;
        self.lengths[batch] = kept;
    }
}
