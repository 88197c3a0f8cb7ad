//! The cache of pages, which sequences share until they differ, and decoding with it.

use std::collections::HashMap;
use std::sync::RwLock;

use qkv::cache::{PagedCache, PagedCacheConfig, SequenceId};
use qkv::rotary::Rotary;
use qkv::{AttentionError, Outputs, attention_paged};

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
use crate::views::{Input, as_packed};

/// Keys and values of any number of sequences in the pages of one pool.
#[derive(Debug)]
pub struct qkv_paged_cache {
    // Handles are numbers; nothing is ever behind one.
    _opaque: [u8; 0],
}

/// A sequence of a paged cache: a number that is not 0 and never used again.
pub type qkv_sequence = u64;

static CACHES: Handles<Cache> = Handles::new("cache");

#[derive(Debug)]
struct Cache {
    key_dim: usize,
    pages: usize,
    held: RwLock<Held>,
}

#[derive(Debug)]
struct Held {
    cache: PagedCache,
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
            let config = PagedCacheConfig::new(pages, page_size, kv_heads, key_dim, value_dim)
                .with_storage(storage(given.dtype, given.group, given.zero_point)?);
            let held = Held { cache: PagedCache::new(config)?, sequences: HashMap::new(), last: 0 };
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
    fn id(&self, sequence: qkv_sequence) -> Result<SequenceId, Failure> {
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
    unsafe fn append(
        &mut self,
        sequence: qkv_sequence,
        [key, value]: &[Input; 2],
        rotary: Option<(&Rotary, usize)>,
    ) -> Result<(), Failure> {
        let id = self.id(sequence)?;
        // SAFETY: the caller's promise.
        let (k, v) = unsafe { (key.data()?, value.data()?) };
        let Some((rotary, key_dim)) = rotary else {
            return Ok(self.cache.append(id, k, v)?);
        };
        let new = key.shape()[2];
        let end = self.cache.len(id)?.saturating_add(new);
        check_keys(rotary, key_dim, if new == 0 { 0 } else { end })?;
        // The position and the length of a row have been found to fit.
        Ok(self.cache.append_with(id, k, v, |position, row| drop(rotary.rotate(row, position)))?)
    }
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
unsafe fn copied(list: *const qkv_sequence, count: usize) -> Result<Vec<qkv_sequence>, Failure> {
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
    unsafe fn attention(
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

/// A step of decoding, one token for each of several sequences: adds key and value (sequences, heads, 1, dim), token i to
/// sequences[i], and then attends with query (sequences, query heads, 1, key dim), each over its own sequence.
///
/// The list has as many entries as the query's batch, none twice. With options->rotary the new keys are rotated too, and the
/// queries, where rotary_positions are not given, to the same positions. A refused call leaves the sequences as they were.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_paged_decode(
    cache: *mut qkv_paged_cache,
    sequences: *const qkv_sequence,
    query: *const qkv_tensor,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    options: *const qkv_attention_options,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let step = Step::read([query, key, value], sequences, options, outputs)?;
            let mut held = write(&cache.held)?;
            let before: Result<Vec<_>, Failure> =
                step.list.iter().map(|&sequence| Ok(held.cache.len(held.id(sequence)?)?)).collect();
            let before = before?;
            let result = step.run(&mut held, cache.key_dim, &before);
            if result.is_err() {
                for (&sequence, &length) in step.list.iter().zip(&before) {
                    let id = held.id(sequence)?;
                    // Those that the call did not come to hold what they held.
                    held.cache.truncate(id, length)?;
                }
            }
            result
        }
    })
}

/// A decode step, looked at.
struct Step {
    list: Vec<qkv_sequence>,
    query: Input,
    tokens: [Input; 2],
    options: Options,
    results: Results,
}

impl Step {
    /// # Safety
    /// Each must be NULL, misaligned, or lead to what it says.
    unsafe fn read(
        [query, key, value]: [*const qkv_tensor; 3],
        sequences: *const qkv_sequence,
        options: *const qkv_attention_options,
        outputs: *const qkv_attention_outputs,
    ) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            let query = Input::read("query", query)?;
            let tokens = new_tokens(key, value)?;
            let [batch, heads, length, dim] = query.shape();
            for (input, argument) in [
                (&query, qkv::Argument::Query),
                (&tokens[0], qkv::Argument::Key),
                (&tokens[1], qkv::Argument::Value),
            ] {
                for (axis, index, expected) in [("batch", 0, batch), ("length", 2, 1)] {
                    let given = input.shape()[index];
                    if given != expected {
                        let because_of = qkv::Argument::Query;
                        return Err(AttentionError::ShapeMismatch {
                            argument,
                            axis,
                            given,
                            expected,
                            because_of,
                        }
                        .into());
                    }
                }
            }
            let list = copied(sequences, batch)?;
            let mut sorted = list.clone();
            sorted.sort_unstable();
            if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                let what = format!("sequences: {} comes twice, expected once at most", twice[0]);
                return Err(Failure::new(QKV_ERROR_VALUE, what));
            }
            // As the packed call will see it: one row of `batch` tokens.
            let packed = [1, heads, batch, dim];
            let options = Options::read(options, Sizes { query: packed, sequences: batch })?;
            let results = Results::read(outputs, batch * heads * length)?;
            let read = regions(&[query, tokens[0], tokens[1]], &options);
            check_apart(&results.regions(), &read)?;
            Ok(Self { list, query: query.as_packed(), tokens, options, results })
        }
    }

    /// # Safety
    /// As `attention::compute`.
    unsafe fn run(&self, held: &mut Held, key_dim: usize, before: &[usize]) -> Result<(), Failure> {
        let rotary = self.options.rotary.as_deref().map(|rotary| (rotary, key_dim));
        for (index, &sequence) in self.list.iter().enumerate() {
            let token = self.tokens.map(|input| input.of_batch(index));
            // SAFETY: the caller's promise.
            unsafe { held.append(sequence, &token, rotary) }?;
        }
        let query_ends: Vec<usize> = (0..=self.list.len()).collect();
        // LSE and maxima of a packed call are (heads, sequences), those asked for (sequences, heads).
        let [_, heads, count, _] = self.query.shape();
        let (mut lse, mut maxima) = (vec![0.0; heads * count], vec![0.0; heads * count]);
        let mut results = self.results;
        results.output = as_packed(results.output);
        let [has_lse, has_maxima] = [results.has_lse(), results.has_maxima()];
        // SAFETY: the caller's promise.
        let mut outputs = unsafe { results.outputs() }?;
        outputs.lse = has_lse.then_some(lse.as_mut_slice());
        outputs.maxima = has_maxima.then_some(maxima.as_mut_slice());
        // SAFETY: the caller's promise.
        unsafe { held.attention(&self.list, &self.query, &query_ends, (&self.options, before), outputs) }?;
        let turned = |to: &mut [f32], from: &[f32]| {
            for (at, value) in to.iter_mut().enumerate() {
                let (sequence, head) = (at / heads, at % heads);
                *value = from[head * count + sequence];
            }
        };
        // SAFETY: the caller's promise, in both; the call above has ended.
        if let (true, Some(to)) = (has_lse, unsafe { results.lse() }) {
            turned(to, &lse);
        }
        // SAFETY: as above.
        if let (true, Some(to)) = (has_maxima, unsafe { results.maxima() }) {
            turned(to, &maxima);
        }
        Ok(())
    }
}
