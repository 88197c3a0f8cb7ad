//! A step of decoding over sequences of a paged cache.

use std::collections::HashMap;

use qkv::cache::{CacheError, PagedCache, SequenceId};
use qkv::{Argument, AttentionError, Outputs, PagedRef, check_paged};

use crate::attention::regions;
use crate::cache::new_tokens;
use crate::handles::write;
use crate::options::{Options, Results, Sizes, qkv_attention_options, qkv_attention_outputs};
use crate::paged::{CACHES, Held, append, copied, qkv_paged_cache, qkv_sequence};
use crate::region::check_apart;
use crate::status::{Failure, guard, qkv_status, qkv_status::*};
use crate::types::*;
use crate::views::{Input, as_packed, data_mut};

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
            let ids = step.list.iter().map(|&sequence| held.id(sequence)).collect::<Result<Vec<_>, _>>()?;
            let before =
                ids.iter().map(|&id| Ok(held.cache.len(id)?)).collect::<Result<Vec<_>, Failure>>()?;
            // All of it before the first token is added: an append may copy a page, which could not be taken back.
            step.check_tokens(&mut held.trial, cache.key_dim, &before)?;
            let (needed, free) = (pages_needed(&held.cache, &ids)?, held.cache.free_pages());
            if needed > free {
                return Err(CacheError::PoolFull { needed, free }.into());
            }
            step.check_attention(&held.cache, &before)?;
            let result = step.run(&mut held, cache.key_dim, &before);
            if result.is_err() {
                // Only by a mistake of ours.
                for (&id, &length) in ids.iter().zip(&before) {
                    held.cache.truncate(id, length)?;
                }
            }
            result
        }
    })
}

/// Pages that one more token for each of these takes: a new one where its last page is full, a copy where others hold that
/// page too. The last to come to a shared page writes into it.
fn pages_needed(cache: &PagedCache, ids: &[SequenceId]) -> Result<usize, Failure> {
    let mut needed = 0;
    let mut copies = HashMap::<u32, usize>::new();
    for &id in ids {
        let is_full = cache.len(id)?.is_multiple_of(cache.page_size());
        match cache.pages_of(id)?.last().filter(|_| !is_full) {
            Some(&page) if cache.sharers(page) > 1 => {
                let copies = copies.entry(page).or_default();
                if cache.sharers(page) - *copies > 1 {
                    *copies += 1;
                    needed += 1;
                }
            }
            Some(_) => {}
            None => needed += 1,
        }
    }
    Ok(needed)
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
            for (input, argument) in
                [(&query, Argument::Query), (&tokens[0], Argument::Key), (&tokens[1], Argument::Value)]
            {
                for (axis, index, expected) in [("batch", 0, batch), ("length", 2, 1)] {
                    let given = input.shape()[index];
                    if given != expected {
                        let because_of = Argument::Query;
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

    /// Refuses tokens that the sequences would refuse, by adding them to others of the same storage.
    ///
    /// # Safety
    /// The tensors must be readable, and not be written meanwhile.
    unsafe fn check_tokens(
        &self,
        trial: &mut PagedCache,
        key_dim: usize,
        before: &[usize],
    ) -> Result<(), Failure> {
        let rotary = self.options.rotary.as_deref().map(|rotary| (rotary, key_dim));
        let id = trial.create();
        let all = before.iter().enumerate().try_for_each(|(index, &position)| {
            let token = self.tokens.map(|input| input.of_batch(index));
            // SAFETY: the caller's promise.
            unsafe { append(trial, id, &token, rotary, position) }?;
            Ok(trial.truncate(id, 0)?)
        });
        trial.free(id)?;
        all
    }

    /// Refuses what attention would refuse once the tokens are there: for sequences of the lengths that will be, all of the pool's
    /// first page.
    ///
    /// # Safety
    /// As `attention::compute`.
    unsafe fn check_attention(&self, cache: &PagedCache, before: &[usize]) -> Result<(), Failure> {
        let lengths: Vec<usize> = before.iter().map(|&length| length + 1).collect();
        let pages = |length: usize| length.div_ceil(cache.page_size());
        let longest = vec![0; pages(lengths.iter().copied().max().unwrap_or(0))];
        let tables: Vec<&[u32]> = lengths.iter().map(|&length| &longest[..pages(length)]).collect();
        let view = cache.view(&[])?;
        let paged = PagedRef { tables: &tables, lengths: &lengths, ..view.as_ref() };
        let query_ends: Vec<usize> = (0..=self.list.len()).collect();
        // SAFETY: the caller's promise, in all of them; masks are refused before they are read.
        let (spec, q, out) = unsafe {
            let out = data_mut(&as_packed(self.results.output))?;
            (self.options.spec(before)?, self.query.data()?, out)
        };
        Ok(check_paged(q, &query_ends, paged, &spec, Outputs::new(out))?)
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
