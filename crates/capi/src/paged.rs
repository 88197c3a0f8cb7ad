//! The cache of pages, which sequences share until they differ.

use std::collections::HashMap;
use std::sync::RwLock;

use qkv::cache::{PagedCache, PagedCacheConfig, SequenceId};
use qkv::rotary::Rotary;
use qkv::{Outputs, attention_paged};

use crate::attention::{ends, regions, rows};
use crate::cache::{new_tokens, storage};
use crate::handles::{Handles, read, write};
use crate::lists::{is_given, qkv_integers, size};
use crate::options::{Options, Results, Sizes, qkv_attention_options, qkv_attention_outputs};
use crate::region::check_apart;
use crate::rotary::{check_keys, for_keys, qkv_rotary};
use crate::status::{Failure, guard, guard_value, qkv_status, qkv_status::*};
use crate::threads;
use crate::types::*;
use crate::versioned::{Versioned, versioned};
use crate::views::Input;

/// Keys and values of any number of sequences in the pages of one pool.
#[derive(Debug)]
pub struct qkv_paged_cache {
    // Handles are numbers; nothing is ever behind one.
    _opaque: [u8; 0],
}

/// A sequence of a paged cache: a number that is not 0 and never used again.
pub type qkv_sequence = u64;

pub(crate) static CACHES: Handles<Cache> = Handles::new("cache");

#[derive(Debug)]
pub(crate) struct Cache {
    pub(crate) key_dim: usize,
    pages: usize,
    pub(crate) held: RwLock<Held>,
}

#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) cache: PagedCache,
    /// Like it, but for one token.
    pub(crate) trial: PagedCache,
    sequences: HashMap<qkv_sequence, SequenceId>,
    last: qkv_sequence,
}

/// What a paged cache is to be like.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_paged_cache_config {
    /// sizeof(qkv_paged_cache_config).
    pub struct_size: usize,
    /// Pages of the pool.
    pub pages: i64,
    /// Tokens of a page.
    pub page_size: i64,
    /// Key/value heads.
    pub kv_heads: i64,
    /// Dim of a key.
    pub key_dim: i64,
    /// Dim of a value.
    pub value_dim: i64,
    /// For QKV_DTYPE_I8: dims that share a scale, a divisor of both dims; 0 is one scale per token and head.
    pub group: i64,
    /// How keys and values are stored: f32, f16, bf16 or int8.
    pub dtype: qkv_dtype,
    /// For QKV_DTYPE_I8, 0 or 1: whether the range of a group may lie anywhere, instead of around 0.
    pub zero_point: u32,
}

// SAFETY: repr(C), its size first, all numbers.
unsafe impl Versioned for qkv_paged_cache_config {
    const NAME: &'static str = "config";
}

/// Makes a pool of free pages, with all its memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_paged_cache_create(
    config: *const qkv_paged_cache_config,
    cache: *mut *mut qkv_paged_cache,
) -> qkv_status {
    guard(|| {
        let make = || {
            // SAFETY: the caller's promise, see the header's text.
            let given = unsafe { versioned(config, false) }?;
            let [pages, page_size, kv_heads, key_dim, value_dim] = [
                size("pages", given.pages)?,
                size("page_size", given.page_size)?,
                size("kv_heads", given.kv_heads)?,
                size("key_dim", given.key_dim)?,
                size("value_dim", given.value_dim)?,
            ];
            let storage = storage(given.dtype, given.group, given.zero_point)?;
            let pool = |pages, page_size| {
                let config = PagedCacheConfig::new(pages, page_size, kv_heads, key_dim, value_dim);
                PagedCache::new(config.with_storage(storage))
            };
            let (cache, trial) = (pool(pages, page_size)?, pool(1, 1)?);
            let held = Held { cache, trial, sequences: HashMap::new(), last: 0 };
            Ok(Cache { key_dim, pages, held: RwLock::new(held) })
        };
        // SAFETY: as above.
        unsafe { CACHES.give(cache, make) }
    })
}

/// Ends a cache with all its sequences; NULL does nothing. Calls that use it finish first.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_destroy(cache: *mut qkv_paged_cache) -> qkv_status {
    guard(|| CACHES.end(cache))
}

impl Held {
    pub(crate) fn id(&self, sequence: qkv_sequence) -> Result<SequenceId, Failure> {
        self.sequences.get(&sequence).copied().ok_or_else(|| {
            let what = format!("sequence: {sequence}, expected one that was created and not freed");
            Failure::new(QKV_ERROR_SEQUENCE, what)
        })
    }

    fn register(&mut self, id: SequenceId) -> qkv_sequence {
        self.last += 1;
        self.sequences.insert(self.last, id);
        self.last
    }

    /// Adds tokens, with keys rotated to their positions.
    ///
    /// # Safety
    /// The tensors must be readable, and not be written meanwhile.
    pub(crate) unsafe fn append(
        &mut self,
        sequence: qkv_sequence,
        tokens: &[Input; 2],
        rotary: Option<(&Rotary, usize)>,
    ) -> Result<(), Failure> {
        let id = self.id(sequence)?;
        let first = self.cache.len(id)?;
        // SAFETY: the caller's promise.
        unsafe { append(&mut self.cache, id, tokens, rotary, first) }
    }
}

/// Adds tokens to a sequence, with keys rotated to the positions from `first` on.
///
/// # Safety
/// The tensors must be readable, and not be written meanwhile.
pub(crate) unsafe fn append(
    cache: &mut PagedCache,
    id: SequenceId,
    [key, value]: &[Input; 2],
    rotary: Option<(&Rotary, usize)>,
    first: usize,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    let (k, v) = unsafe { (key.data()?, value.data()?) };
    let Some((rotary, key_dim)) = rotary else {
        return Ok(cache.append(id, k, v)?);
    };
    let new = key.shape()[2];
    check_keys(rotary, key_dim, if new == 0 { 0 } else { first.saturating_add(new) })?;
    let held = cache.len(id)?;
    // The position and the length of a row have been found to fit.
    let rotate = |index: usize, row: &mut [f32]| drop(rotary.rotate(row, first + (index - held)));
    Ok(cache.append_with(id, k, v, rotate)?)
}

/// A new, empty sequence; 0 where the cache is not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_sequence(cache: *mut qkv_paged_cache) -> qkv_sequence {
    guard_value(0, || {
        let cache = CACHES.get(cache)?;
        let mut held = write(&cache.held)?;
        let id = held.cache.create();
        Ok(held.register(id))
    })
}

/// A new sequence that holds the same tokens and shares their pages; 0 where cache or sequence are not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_fork(cache: *mut qkv_paged_cache, sequence: qkv_sequence) -> qkv_sequence {
    guard_value(0, || {
        let cache = CACHES.get(cache)?;
        let mut held = write(&cache.held)?;
        let id = held.id(sequence)?;
        let id = held.cache.fork(id)?;
        Ok(held.register(id))
    })
}

/// Ends a sequence. Pages that no other holds are free then.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_free(cache: *mut qkv_paged_cache, sequence: qkv_sequence) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        let mut held = write(&cache.held)?;
        let id = held.id(sequence)?;
        held.cache.free(id)?;
        held.sequences.remove(&sequence);
        Ok(())
    })
}

/// Adds tokens to a sequence: key and value (1, heads, new tokens, dim) in f32, f16 or bf16. Where rotary is not NULL, keys
/// are rotated to their positions. A refused call leaves the cache as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_paged_cache_append(
    cache: *mut qkv_paged_cache,
    sequence: qkv_sequence,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    rotary: *const qkv_rotary,
) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        let rotary = for_keys(rotary, cache.key_dim, 0)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let tokens = new_tokens(key, value)?;
            let rotary = rotary.as_deref().map(|rotary| (rotary, cache.key_dim));
            write(&cache.held)?.append(sequence, &tokens, rotary)
        }
    })
}

/// Forgets the tokens of a sequence from length on, and lets go of pages that it needs no more.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_truncate(
    cache: *mut qkv_paged_cache,
    sequence: qkv_sequence,
    length: i64,
) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        let length = size("length", length)?;
        let mut held = write(&cache.held)?;
        let id = held.id(sequence)?;
        Ok(held.cache.truncate(id, length)?)
    })
}

/// Tokens of a sequence; -1 where cache or sequence are not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_length(cache: *const qkv_paged_cache, sequence: qkv_sequence) -> i64 {
    guard_value(-1, || {
        let cache = CACHES.get(cache)?;
        let held = read(&cache.held)?;
        Ok(held.cache.len(held.id(sequence)?)? as i64)
    })
}

/// Pages of the pool, used or not; -1 where the cache is not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_pages(cache: *const qkv_paged_cache) -> i64 {
    guard_value(-1, || Ok(CACHES.get(cache)?.pages as i64))
}

/// Pages that no sequence holds; -1 where the cache is not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_free_pages(cache: *const qkv_paged_cache) -> i64 {
    guard_value(-1, || Ok(read(&CACHES.get(cache)?.held)?.cache.free_pages() as i64))
}

/// Bytes of all pages, used or not; 0 where the cache is not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_paged_cache_bytes(cache: *const qkv_paged_cache) -> usize {
    guard_value(0, || Ok(read(&CACHES.get(cache)?.held)?.cache.bytes()))
}

/// A copy of a list of sequences.
///
/// # Safety
/// `count` of them must be readable.
pub(crate) unsafe fn copied(list: *const qkv_sequence, count: usize) -> Result<Vec<qkv_sequence>, Failure> {
    if !is_given("sequences", list, count)? {
        return Ok(Vec::new());
    }
    // SAFETY: aligned, not NULL, no longer than the address space, and the caller's promise.
    Ok(unsafe { core::slice::from_raw_parts(list, count) }.to_vec())
}

/// Attention of packed queries over sequences of the cache: prefill chunks and decode steps in one call.
///
/// query is (1, query heads, total length, key dim): sequences[i] has rows query_ends[i] to query_ends[i + 1] of it and of
/// the output, so there is one end more than sequences; a sequence may come more than once. Options as for
/// qkv_attention_packed; QKV_CAUSAL_BOTTOM_RIGHT is the usual alignment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_paged_cache_attention(
    cache: *const qkv_paged_cache,
    sequences: *const qkv_sequence,
    query: *const qkv_tensor,
    query_ends: qkv_integers,
    options: *const qkv_attention_options,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let query = Input::read("query", query)?;
            let query_ends = ends("query_ends", query_ends)?;
            let list = copied(sequences, query_ends.len() - 1)?;
            let options = Options::read(options, Sizes { query: query.shape(), sequences: list.len() })?;
            let results = Results::read(outputs, rows(query.shape()))?;
            check_apart(&results.regions(), &regions(&[query], &options))?;
            let outputs = results.outputs()?;
            read(&cache.held)?.attention(&list, &query, &query_ends, (&options, &[]), outputs)
        }
    })
}

impl Held {
    /// # Safety
    /// The query must be readable, and not be written meanwhile.
    pub(crate) unsafe fn attention(
        &self,
        list: &[qkv_sequence],
        query: &Input,
        query_ends: &[usize],
        (options, positions): (&Options, &[usize]),
        outputs: Outputs<'_>,
    ) -> Result<(), Failure> {
        let ids = list.iter().map(|&sequence| self.id(sequence)).collect::<Result<Vec<_>, _>>()?;
        let view = self.cache.view(&ids)?;
        // SAFETY: the caller's promise; a mask, whose values have not been looked at, is refused before it is read.
        let (spec, q) = unsafe { (options.spec(positions)?, query.data()?) };
        Ok(threads::run(|| attention_paged(q, query_ends, view.as_ref(), &spec, outputs))?)
    }
}
