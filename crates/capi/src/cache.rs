//! The cache with a stretch of memory per batch, and decoding with it.

use std::sync::{Arc, RwLock};

use qkv::cache::{KvCache, KvCacheConfig, Storage};
use qkv::rotary::Rotary;
use qkv::{AttentionError, attention_into};

use crate::attention::{check_only, regions, rows};
use crate::handles::{Handles, read, write};
use crate::lists::{flag, size};
use crate::options::{Options, Results, Sizes, qkv_attention_options, qkv_attention_outputs};
use crate::region::check_apart;
use crate::rotary::{check_keys, for_keys, qkv_rotary};
use crate::status::{Failure, guard, guard_value, qkv_status, qkv_status::*};
use crate::threads;
use crate::types::*;
use crate::versioned::{Versioned, versioned};
use crate::views::Input;

/// Keys and values of a batch of sequences, each of its own length.
#[derive(Debug)]
pub struct qkv_cache {
    // Handles are numbers; nothing is ever behind one.
    _opaque: [u8; 0],
}

static CACHES: Handles<Cache> = Handles::new("cache");

#[derive(Debug)]
struct Cache {
    batch: usize,
    key_dim: usize,
    cache: RwLock<KvCache>,
}

/// What a cache is to be like.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_cache_config {
    /// sizeof(qkv_cache_config).
    pub struct_size: usize,
    /// Sequences.
    pub batch: i64,
    /// Key/value heads.
    pub kv_heads: i64,
    /// The most tokens of a sequence.
    pub capacity: i64,
    /// Dim of a key.
    pub key_dim: i64,
    /// Dim of a value.
    pub value_dim: i64,
    /// Not 0: rolling. When new tokens do not fit, all but the last window of a sequence are dropped; at most half the
    /// capacity. More than capacity - window tokens in one append are refused.
    pub window: i64,
    /// For QKV_DTYPE_I8: dims that share a scale, a divisor of both dims; 0 is one scale per token and head.
    pub group: i64,
    /// How keys and values are stored: f32, f16, bf16 or int8.
    pub dtype: qkv_dtype,
    /// For QKV_DTYPE_I8, 0 or 1: whether the range of a group may lie anywhere, instead of around 0.
    pub zero_point: u32,
}

// SAFETY: repr(C), its size first, all numbers.
unsafe impl Versioned for qkv_cache_config {
    const NAME: &'static str = "config";
}

/// The storage that a configuration asks for.
pub(crate) fn storage(dtype: qkv_dtype, group: i64, zero_point: u32) -> Result<Storage, Failure> {
    let (group, zero_point) = (size("group", group)?, flag("zero_point", zero_point)?);
    let plain = match dtype {
        QKV_DTYPE_F32 => Storage::F32,
        QKV_DTYPE_F16 => Storage::F16,
        QKV_DTYPE_BF16 => Storage::Bf16,
        QKV_DTYPE_I8 => return Ok(Storage::Int8 { group: (group != 0).then_some(group), zero_point }),
        other => {
            let what = format!("dtype: {other}, expected that of f32, f16, bf16 or int8");
            return Err(Failure::new(QKV_ERROR_DTYPE, what));
        }
    };
    if group != 0 || zero_point {
        return Err(Failure::new(
            QKV_ERROR_VALUE,
            "group, zero_point: given, expected 0 without QKV_DTYPE_I8",
        ));
    }
    Ok(plain)
}

/// Makes an empty cache, with all its memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_cache_create(
    config: *const qkv_cache_config,
    cache: *mut *mut qkv_cache,
) -> qkv_status {
    guard(|| {
        let make = || {
            // SAFETY: the caller's promise, see the header's text.
            let given = unsafe { versioned(config, false) }?;
            let [batch, kv_heads, capacity, key_dim, value_dim, window] = [
                size("batch", given.batch)?,
                size("kv_heads", given.kv_heads)?,
                size("capacity", given.capacity)?,
                size("key_dim", given.key_dim)?,
                size("value_dim", given.value_dim)?,
                size("window", given.window)?,
            ];
            let config = KvCacheConfig::new(batch, kv_heads, capacity, key_dim, value_dim)
                .with_storage(storage(given.dtype, given.group, given.zero_point)?)
                .with_window((window != 0).then_some(window));
            Ok(Cache { batch, key_dim, cache: RwLock::new(KvCache::new(config)?) })
        };
        // SAFETY: as above.
        unsafe { CACHES.give(cache, make) }
    })
}

/// Ends a cache; NULL does nothing. Calls that use it finish first.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_cache_destroy(cache: *mut qkv_cache) -> qkv_status {
    guard(|| CACHES.end(cache))
}

/// Keys and values, looked at.
///
/// # Safety
/// Each must be NULL, misaligned, or a descriptor whose pointers are NULL or lead to what they say.
pub(crate) unsafe fn new_tokens(
    key: *const qkv_tensor,
    value: *const qkv_tensor,
) -> Result<[Input; 2], Failure> {
    // SAFETY: the caller's promise.
    unsafe { Ok([Input::read("key", key)?, Input::read("value", value)?]) }
}

impl Cache {
    /// Adds tokens to the batches of `which`, one or all, with keys rotated to their positions.
    ///
    /// # Safety
    /// The tensors must be readable, and not be written meanwhile.
    unsafe fn append(
        &self,
        cache: &mut KvCache,
        which: Option<usize>,
        [key, value]: &[Input; 2],
        rotary: Option<&Rotary>,
    ) -> Result<(), Failure> {
        // SAFETY: the caller's promise.
        let (k, v) = unsafe { (key.data()?, value.data()?) };
        let Some(rotary) = rotary else {
            let appended = match which {
                Some(batch) => cache.append_to(batch, k, v),
                None => cache.append(k, v),
            };
            return appended.map_err(Failure::from);
        };
        let batches = which.map_or(0..self.batch, |batch| batch..batch.saturating_add(1));
        let new = key.shape()[2];
        for batch in batches {
            let end = cache.dropped(batch)? + cache.lengths()[batch] + new;
            check_keys(rotary, self.key_dim, if new == 0 { 0 } else { end })?;
        }
        // The position and the length of a row have been found to fit.
        let rotate = |position: usize, row: &mut [f32]| drop(rotary.rotate(row, position));
        let appended = match which {
            Some(batch) => cache.append_to_with(batch, k, v, rotate),
            None => cache.append_with(k, v, rotate),
        };
        appended.map_err(Failure::from)
    }
}

/// Adds tokens to every sequence: key and value (batch, heads, new tokens, dim) in f32, f16 or bf16. Where rotary is not
/// NULL, keys are rotated to their positions. A refused call leaves the cache as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_cache_append(
    cache: *mut qkv_cache,
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
            cache.append(&mut *write(&cache.cache)?, None, &tokens, rotary.as_deref())
        }
    })
}

/// Adds tokens to one sequence: key and value (1, heads, new tokens, dim); else as qkv_cache_append.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_cache_append_to(
    cache: *mut qkv_cache,
    batch: i64,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    rotary: *const qkv_rotary,
) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        let rotary = for_keys(rotary, cache.key_dim, 0)?;
        let batch = size("batch", batch)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let tokens = new_tokens(key, value)?;
            cache.append(&mut *write(&cache.cache)?, Some(batch), &tokens, rotary.as_deref())
        }
    })
}

/// Forgets the tokens of a sequence from length on, as when drafted tokens are rejected.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_cache_truncate(cache: *mut qkv_cache, batch: i64, length: i64) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        let (batch, length) = (size("batch", batch)?, size("length", length)?);
        Ok(write(&cache.cache)?.truncate(batch, length)?)
    })
}

/// Empties one sequence, whose positions begin at 0 again.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_cache_clear(cache: *mut qkv_cache, batch: i64) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        Ok(write(&cache.cache)?.clear(size("batch", batch)?)?)
    })
}

/// Tokens that a sequence holds; -1 where cache or batch are not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_cache_length(cache: *const qkv_cache, batch: i64) -> i64 {
    guard_value(-1, || {
        let cache = CACHES.get(cache)?;
        let (cache, batch) = (read(&cache.cache)?, size("batch", batch)?);
        cache.dropped(batch)?;
        Ok(cache.lengths()[batch] as i64)
    })
}

/// Tokens that rolling has dropped in front of a sequence; -1 where cache or batch are not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_cache_dropped(cache: *const qkv_cache, batch: i64) -> i64 {
    guard_value(-1, || {
        let cache = CACHES.get(cache)?;
        Ok(read(&cache.cache)?.dropped(size("batch", batch)?)? as i64)
    })
}

/// Bytes of keys and values, used or not; 0 where the cache is not there.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_cache_bytes(cache: *const qkv_cache) -> usize {
    guard_value(0, || Ok(read(&CACHES.get(cache)?.cache)?.bytes()))
}

/// Attention of query (batch, query heads, query length, key dim) over what the cache holds.
///
/// Key lengths are the cache's own, and options->key_lengths is refused; options may be NULL. With more than one query per
/// sequence, QKV_CAUSAL_BOTTOM_RIGHT is the usual alignment. Calls that only read a cache run side by side.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_cache_attention(
    cache: *const qkv_cache,
    query: *const qkv_tensor,
    options: *const qkv_attention_options,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        let cache = CACHES.get(cache)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let asked = Asked::read(query, options, outputs)?;
            asked.run(&*read(&cache.cache)?, &[])
        }
    })
}

/// A step of decoding: adds key and value to every sequence, as qkv_cache_append, and then is qkv_cache_attention.
///
/// With options->rotary the new keys are rotated too, and the queries, where rotary_positions are not given, to the
/// positions of the new tokens; then there must be as many queries as tokens. Where attention is refused, the new tokens are
/// forgotten again (what rolling has dropped stays dropped).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_decode(
    cache: *mut qkv_cache,
    query: *const qkv_tensor,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    options: *const qkv_attention_options,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        let cache: Arc<Cache> = CACHES.get(cache)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let asked = Asked::read(query, options, outputs)?;
            let tokens = new_tokens(key, value)?;
            let new = tokens[0].shape()[2];
            let rotary = asked.options.rotary.as_deref();
            if rotary.is_some() && asked.options.positions.is_none() && asked.query.shape()[2] != new {
                let (given, expected) = (asked.query.shape()[2], new);
                let argument = qkv::Argument::Query;
                let because_of = qkv::Argument::Key;
                return Err(AttentionError::ShapeMismatch {
                    argument,
                    axis: "length",
                    given,
                    expected,
                    because_of,
                }
                .into());
            }
            let mut held = write(&cache.cache)?;
            cache.append(&mut held, None, &tokens, rotary)?;
            let mut positions = Vec::new();
            for batch in 0..cache.batch {
                let end = held.dropped(batch)? + held.lengths()[batch];
                positions.extend(end - new..end);
            }
            let result = asked.run(&held, &positions);
            if result.is_err() {
                for batch in 0..cache.batch {
                    let length = held.lengths()[batch] - new;
                    held.truncate(batch, length)?;
                }
            }
            result
        }
    })
}

/// Attention over a cache, looked at.
struct Asked {
    query: Input,
    options: Options,
    results: Results,
}

impl Asked {
    /// # Safety
    /// Each must be NULL, misaligned, or lead to what it says.
    unsafe fn read(
        query: *const qkv_tensor,
        options: *const qkv_attention_options,
        outputs: *const qkv_attention_outputs,
    ) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            let query = Input::read("query", query)?;
            let shape = query.shape();
            let options = Options::read(options, Sizes { query: shape, sequences: shape[0] })?;
            if options.key_lengths.is_some() {
                let with = "a cache, which has its own";
                return Err(AttentionError::NotTogether { argument: "key_lengths", with }.into());
            }
            let results = Results::read(outputs, rows(shape))?;
            check_apart(&results.regions(), &regions(&[query], &options))?;
            Ok(Self { query, options, results })
        }
    }

    /// # Safety
    /// As `attention::compute`.
    unsafe fn run(&self, cache: &KvCache, positions: &[usize]) -> Result<(), Failure> {
        // SAFETY: the caller's promise; the mask's values are checked below, before any is used.
        let (mut spec, q, outputs) =
            unsafe { (self.options.spec(positions)?, self.query.data()?, self.results.outputs()?) };
        spec.key_lengths = Some(cache.lengths());
        let [k, v] = [cache.keys(), cache.values()];
        if self.options.has_mask() {
            check_only([q, k, v], &spec)?;
            // SAFETY: the caller's promise.
            unsafe { self.options.check_mask() }?;
        }
        Ok(threads::run(|| attention_into(q, k, v, &spec, outputs))?)
    }
}
