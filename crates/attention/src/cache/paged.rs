//! A cache of pages: a pool (pages, heads, page size, dim), a table of pages per sequence, and pages shared
//! until they differ.
//!
//! In memory heads come first, so that pages which follow each other, as those of a sequence do that was stored in one
//! go, are one stream of rows for a head. From memory, f32, dim 128, two threads on Zen 4, pages of 16, against pages
//! first: 32 heads over 32, 4096 keys 0.85 of the time, 32 over 8, 8192 keys 0.93; eight sequences whose pages alternate
//! 1.03.
//!
//! A page has as many references as sequences hold it, and is free at 0. Rows of a page that other sequences
//! hold are never written: an append that begins inside such a page copies it first. Sequences hold exactly
//! the pages that their lengths need.

use core::fmt;

use super::{
    AsIs, CacheError, Layout, Rows, Storage,
    free_pages::FreePages,
    slab::{Slab, filled},
};
use crate::{Argument, Data, PagedRef};

/// What a [`PagedCache`] is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedCacheConfig {
    pages: usize,
    page_size: usize,
    layout: Layout,
}

impl PagedCacheConfig {
    /// A pool of `pages` pages of `page_size` tokens each, in f32.
    #[must_use]
    pub fn new(pages: usize, page_size: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Self {
        Self { pages, page_size, layout: Layout { kv_heads, key_dim, value_dim, storage: Storage::F32 } }
    }

    /// With keys and values stored like this.
    #[must_use]
    pub fn with_storage(mut self, storage: Storage) -> Self {
        self.layout.storage = storage;
        self
    }
}

/// A handle of a sequence in the [`PagedCache`] that made it; once the sequence is freed it is refused, even
/// where its place is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    index: usize,
    /// Counts how often the place was freed.
    generation: u64,
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence {}.{}", self.index, self.generation)
    }
}

/// A place for a sequence.
#[derive(Clone, Debug, Default)]
struct Place {
    generation: u64,
    sequence: Option<Sequence>,
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<u32>,
    length: usize,
}

/// Keys and values of any number of sequences in the pages of one pool.
///
/// ```
/// use qkv_attention::Tensor;
/// use qkv_attention::cache::{PagedCache, PagedCacheConfig};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut cache = PagedCache::new(PagedCacheConfig::new(100, 16, 2, 64, 64))?;
/// let prompt = Tensor::<f32>::zeros([1, 2, 40, 64])?;
/// let first = cache.create();
/// cache.append(first, prompt.view(), prompt.view())?;
/// let second = cache.fork(first)?;
/// assert_eq!((cache.len(second)?, cache.free_pages()), (40, 97));
///
/// // Both share their first two pages; the third, partly filled, is copied.
/// let token = Tensor::<f32>::zeros([1, 2, 1, 64])?;
/// cache.append(second, token.view(), token.view())?;
/// assert_eq!(cache.free_pages(), 96);
/// let view = cache.view(&[first, second])?;
/// assert_eq!(view.as_ref().lengths, [40, 41]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct PagedCache {
    config: PagedCacheConfig,
    keys: Slab,
    values: Slab,
    /// How many sequences hold each page.
    references: Vec<usize>,
    /// Pages without references.
    free: FreePages,
    places: Vec<Place>,
    /// Places without a sequence.
    vacant: Vec<usize>,
}

impl PagedCache {
    /// A pool of free pages, with all its memory.
    ///
    /// # Errors
    /// Where there are no heads, no key dim or no tokens in a page, groups do not divide the dims, or the
    /// memory cannot be had or has more pages than a u32 counts.
    pub fn new(config: PagedCacheConfig) -> Result<Self, CacheError> {
        let PagedCacheConfig { pages, page_size, layout } = config;
        layout.check()?;
        if page_size == 0 {
            return Err(CacheError::Zero { argument: "page_size" });
        }
        let shape = [pages, layout.kv_heads, page_size, layout.key_dim];
        let too_large = CacheError::TooLarge { argument: "pages", shape };
        let count = u32::try_from(pages).map_err(|_| too_large.clone())?;
        let (keys, values) = layout.slabs(pages, page_size)?;
        let references = filled(pages).ok_or(too_large)?;
        let free = FreePages::all(count);
        Ok(Self { config, keys, values, references, free, places: Vec::new(), vacant: Vec::new() })
    }

    /// What it was made from.
    #[must_use]
    pub fn config(&self) -> PagedCacheConfig {
        self.config
    }

    /// Pages of the pool.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.config.pages
    }

    /// Tokens per page.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.config.page_size
    }

    /// Pages that no sequence holds.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free.count()
    }

    /// Bytes of all pages, used or not.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// How many sequences hold a page: more than 1 where it is shared, 0 where it is free or there is none.
    #[must_use]
    pub fn sharers(&self, page: u32) -> usize {
        self.references.get(page as usize).copied().unwrap_or(0)
    }

    /// A new, empty sequence.
    pub fn create(&mut self) -> SequenceId {
        self.place(Sequence::default())
    }

    /// A new sequence that holds the same tokens and shares their pages.
    ///
    /// # Errors
    /// Where the sequence has been freed.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId, CacheError> {
        let sequence = self.sequence(id)?.clone();
        for &page in &sequence.pages {
            self.references[page as usize] += 1;
        }
        Ok(self.place(sequence))
    }

    /// Ends a sequence. Pages that no other holds are free then.
    ///
    /// # Errors
    /// Where it has been freed already.
    pub fn free(&mut self, id: SequenceId) -> Result<(), CacheError> {
        self.sequence(id)?;
        let place = &mut self.places[id.index];
        place.generation += 1;
        let sequence = place.sequence.take().unwrap_or_default();
        self.vacant.push(id.index);
        self.release(&sequence.pages);
        Ok(())
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// Where it has been freed.
    pub fn len(&self, id: SequenceId) -> Result<usize, CacheError> {
        Ok(self.sequence(id)?.length)
    }

    /// Pages of a sequence, in order: as many as its length needs.
    ///
    /// # Errors
    /// Where it has been freed.
    pub fn pages_of(&self, id: SequenceId) -> Result<&[u32], CacheError> {
        Ok(&self.sequence(id)?.pages)
    }

    /// Adds tokens to a sequence: keys and values (1, heads, new tokens, dim) in f32, f16 or bf16.
    ///
    /// # Errors
    /// Where the sequence has been freed, the tensors do not fit the cache or each other, the free pages do
    /// not suffice, or 8-bit storage gets a value that is not finite. The cache is as before then.
    pub fn append<'a>(
        &mut self,
        id: SequenceId,
        k: impl Into<Data<'a>>,
        v: impl Into<Data<'a>>,
    ) -> Result<(), CacheError> {
        self.append_rows(id, k.into(), v.into(), None::<AsIs>)
    }

    /// Adds tokens to a sequence; `prepare` changes each key row before it is stored, in f32, given its
    /// token's position, as rotary embeddings do.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_with<'a>(
        &mut self,
        id: SequenceId,
        k: impl Into<Data<'a>>,
        v: impl Into<Data<'a>>,
        prepare: impl FnMut(usize, &mut [f32]),
    ) -> Result<(), CacheError> {
        self.append_rows(id, k.into(), v.into(), Some(prepare))
    }

    /// Forgets the tokens of a sequence from `length` on, and lets go of pages that it needs no more.
    ///
    /// # Errors
    /// Where the sequence has been freed or has fewer tokens.
    pub fn truncate(&mut self, id: SequenceId, length: usize) -> Result<(), CacheError> {
        let held = self.sequence(id)?.length;
        if length > held {
            return Err(CacheError::Beyond { given: length, length: held });
        }
        let kept = length.div_ceil(self.config.page_size);
        if let Some(sequence) = &mut self.places[id.index].sequence {
            sequence.length = length;
            let gone = sequence.pages.split_off(kept);
            self.release(&gone);
        }
        Ok(())
    }

    /// Sequences for attention to read, in this order; one may come more than once.
    ///
    /// # Errors
    /// Where one has been freed.
    pub fn view(&self, ids: &[SequenceId]) -> Result<PagedView<'_>, CacheError> {
        let PagedCacheConfig { pages, page_size, layout } = self.config;
        let (shape, strides) = ([pages, layout.kv_heads, page_size], [page_size, pages * page_size, 1]);
        let mut view = PagedView {
            keys: self.keys.data(shape, strides),
            values: self.values.data(shape, strides),
            tables: Vec::with_capacity(ids.len()),
            lengths: Vec::with_capacity(ids.len()),
        };
        for &id in ids {
            let sequence = self.sequence(id)?;
            view.tables.push(&sequence.pages);
            view.lengths.push(sequence.length);
        }
        Ok(view)
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence, CacheError> {
        let place = self.places.get(id.index).filter(|place| place.generation == id.generation);
        place.and_then(|place| place.sequence.as_ref()).ok_or(CacheError::Stale { given: id })
    }

    fn place(&mut self, sequence: Sequence) -> SequenceId {
        let index = self.vacant.pop().unwrap_or(self.places.len());
        if index == self.places.len() {
            self.places.push(Place::default());
        }
        let place = &mut self.places[index];
        place.sequence = Some(sequence);
        SequenceId { index, generation: place.generation }
    }

    /// Gives up one reference to each page.
    fn release(&mut self, pages: &[u32]) {
        for &page in pages {
            self.references[page as usize] -= 1;
            if self.references[page as usize] == 0 {
                self.free.give(page);
            }
        }
    }

    fn append_rows<F: FnMut(usize, &mut [f32])>(
        &mut self,
        id: SequenceId,
        k: Data<'_>,
        v: Data<'_>,
        mut prepare: Option<F>,
    ) -> Result<(), CacheError> {
        let Sequence { pages, length } = self.sequence(id)?;
        let new = self.config.layout.check_rows(1, &k, &v)?;
        if new == 0 {
            return Ok(());
        }
        let PagedCacheConfig { pages: all, page_size, layout: Layout { kv_heads, .. } } = self.config;
        let length = *length;
        // The page in which the append begins, where others hold it too.
        let partial = if length.is_multiple_of(page_size) { None } else { pages.last().copied() };
        let shared = partial.filter(|&page| self.references[page as usize] > 1);
        // Pages that stay; from there on the table goes on with free ones, the copy of the shared page being
        // the first.
        let kept = pages.len() - usize::from(shared.is_some());
        let needed = length.saturating_add(new).div_ceil(page_size) - kept;
        let last = kept.checked_sub(1).map(|last| pages[last]);
        let free = self.free.count();
        let Some(taken) = self.free.take(needed, last) else {
            return Err(CacheError::PoolFull { needed, free });
        };

        // Until all rows are stored nothing but the taken pages and the spare rows of the last page is written.
        let Self { keys, values, references, places, .. } = self;
        let Some(sequence) = &mut places[id.index].sequence else {
            return Err(CacheError::Stale { given: id });
        };
        let page = |index: usize| match index.checked_sub(kept) {
            None => sequence.pages[index] as usize,
            Some(index) => taken.pages()[index] as usize,
        };
        if let Some(shared) = shared {
            for head in 0..kv_heads {
                let from = (head * all + shared as usize) * page_size;
                let to = (head * all + page(kept)) * page_size;
                keys.copy_rows(from, to, length % page_size);
                values.copy_rows(from, to, length % page_size);
            }
        }
        let target = |head: usize, index: usize| {
            let position = length + index;
            (head * all + page(position / page_size)) * page_size + position % page_size
        };
        let rows = |argument, data| Rows { argument, data, batch: 0, first: length };
        rows(Argument::Key, &k).store(keys, &mut prepare, target)?;
        rows(Argument::Value, &v).store(values, &mut None::<AsIs>, target)?;

        let taken = taken.keep();
        for &page in &taken {
            references[page as usize] = 1;
        }
        sequence.pages.truncate(kept);
        sequence.pages.extend(taken);
        sequence.length += new;
        if let Some(shared) = shared {
            references[shared as usize] -= 1;
        }
        Ok(())
    }
}

/// Sequences of a [`PagedCache`], borrowed for attention to read.
#[derive(Clone, Debug)]
pub struct PagedView<'a> {
    keys: Data<'a>,
    values: Data<'a>,
    tables: Vec<&'a [u32]>,
    lengths: Vec<usize>,
}

impl PagedView<'_> {
    /// What attention takes.
    #[must_use]
    pub fn as_ref(&self) -> PagedRef<'_> {
        PagedRef {
            keys: self.keys,
            values: self.values,
            tables: self.tables.as_slice(),
            lengths: self.lengths.as_slice(),
        }
    }
}
