//! Attention over tensors: batches, packed sequences, pages of the caller's own; and the merge of results.

use qkv::merge::{Part, merge};
use qkv::{
    Argument, AttentionError, AttentionSpec, Data, DataMut, Outputs, Packed, PagedRef, TensorMut,
    attention_into, attention_packed, attention_paged,
};

use crate::lists::{is_given, qkv_floats, qkv_integers};
use crate::options::{Options, Results, Sizes, qkv_attention_options, qkv_attention_outputs};
use crate::region::{Region, check_apart};
use crate::status::{Failure, guard, qkv_status, qkv_status::*};
use crate::threads;
use crate::types::qkv_tensor;
use crate::views::Input;

/// Queries, keys and values, looked at.
///
/// # Safety
/// Each must be NULL, misaligned, or a descriptor whose pointers are NULL or lead to what they say.
pub(crate) unsafe fn inputs(
    query: *const qkv_tensor,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
) -> Result<[Input; 3], Failure> {
    // SAFETY: the caller's promise.
    unsafe { Ok([Input::read("query", query)?, Input::read("key", key)?, Input::read("value", value)?]) }
}

/// Rows of a result: what LSE and maxima have. No overflow: a tensor's number of values has been found to fit.
pub(crate) fn rows([batch, heads, length, _]: [usize; 4]) -> usize {
    batch * heads * length
}

/// Memory of inputs and of options.
pub(crate) fn regions(inputs: &[Input], options: &Options) -> Vec<Region> {
    inputs.iter().flat_map(Input::regions).chain(options.regions()).collect()
}

/// All that can be wrong with a call but its outputs, looked at without computing anything.
///
/// The Rust crate checks the output after everything else and before it computes, so one that cannot fit, a batch too
/// many and nothing in it, asks for the checks alone.
pub(crate) fn check_only([q, k, v]: [Data<'_>; 3], spec: &AttentionSpec<'_>) -> Result<(), AttentionError> {
    let none = TensorMut::<f32>::from_slice(&mut [], [q.shape()[0] + 1, 0, 0, 0]);
    let none: DataMut<'_> = none.map_err(|_| AttentionError::TooLarge { shape: q.shape() })?.into();
    match attention_into(q, k, v, spec, Outputs::new(none)) {
        Err(AttentionError::ShapeMismatch { argument: Argument::Output, .. }) => Ok(()),
        other => other,
    }
}

/// Computes a call whose parts have been looked at.
///
/// # Safety
/// All memory that is described must be there: inputs, mask and bias readable and not written meanwhile, outputs
/// writable and not accessed by others.
pub(crate) unsafe fn compute(
    inputs: &[Input; 3],
    options: &Options,
    results: &Results,
) -> Result<(), Failure> {
    check_apart(&results.regions(), &regions(inputs, options))?;
    // SAFETY: the caller's promise; the mask's values are checked below, before any is used.
    let (spec, [q, k, v], outputs) = unsafe {
        let [q, k, v] = inputs;
        (options.spec(&[])?, [q.data()?, k.data()?, v.data()?], results.outputs()?)
    };
    if options.has_mask() {
        check_only([q, k, v], &spec)?;
        // SAFETY: the caller's promise.
        unsafe { options.check_mask() }?;
    }
    Ok(threads::run(|| attention_into(q, k, v, &spec, outputs))?)
}

/// Attention: output = softmax(scale query key^T + masks) value.
///
/// query is (batch, query heads, query length, key dim), key (batch, key/value heads, key length, key dim), value (batch,
/// key/value heads, key length, value dim), output (batch, query heads, query length, value dim). Query head h reads
/// key/value head h / (query heads / key/value heads). A query that sees no key gives 0. options may be NULL.
///
/// A decode step is the same call with few queries: keys are then read in parts, by all threads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_attention(
    query: *const qkv_tensor,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    options: *const qkv_attention_options,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let inputs = inputs(query, key, value)?;
            let query = inputs[0].shape();
            let options = Options::read(options, Sizes { query, sequences: query[0] })?;
            let results = Results::read(outputs, rows(query))?;
            compute(&inputs, &options, &results)
        }
    })
}

/// Attention of sequences packed one after the other along the length of batch 1: (1, heads, total length, dim).
///
/// Sequence i is rows query_ends[i] to query_ends[i + 1] of query and output, and rows key_ends[i] to key_ends[i + 1] of
/// key and value; both lists ascend from 0 to the total length (cu_seqlens). Alignments, windows and biases count within a
/// sequence. Options that are indexed by query or key of the whole call (mask, bias, block_mask, key_lengths, documents)
/// have no meaning here and are refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_attention_packed(
    query: *const qkv_tensor,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    query_ends: qkv_integers,
    key_ends: qkv_integers,
    options: *const qkv_attention_options,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let inputs = inputs(query, key, value)?;
            let query = inputs[0].shape();
            let query_ends = ends("query_ends", query_ends)?;
            let key_ends = ends("key_ends", key_ends)?;
            let options = Options::read(options, Sizes { query, sequences: query_ends.len() - 1 })?;
            let results = Results::read(outputs, rows(query))?;
            check_apart(&results.regions(), &regions(&inputs, &options))?;
            let [q, k, v] = [inputs[0].data()?, inputs[1].data()?, inputs[2].data()?];
            let (spec, outputs) = (options.spec(&[])?, results.outputs()?);
            let packed = Packed { query_ends: &query_ends, key_ends: &key_ends };
            Ok(threads::run(|| attention_packed(q, k, v, packed, &spec, outputs))?)
        }
    })
}

/// A list of ends, which has at least one.
///
/// # Safety
/// It must be readable.
pub(crate) unsafe fn ends(argument: &'static str, list: qkv_integers) -> Result<Vec<usize>, Failure> {
    // SAFETY: the caller's promise.
    match unsafe { list.copied(argument, &[]) }? {
        None => Err(Failure::null(argument)),
        Some(list) if list.is_empty() => {
            Err(AttentionError::Count { argument, given: 0, expected: 1 }.into())
        }
        Some(list) => Ok(list),
    }
}

/// Keys and values in pages of the caller's own pool.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_pages {
    /// (pages, key/value heads, page size, key dim), any strides on the first three.
    pub keys: *const qkv_tensor,
    /// (pages, key/value heads, page size, value dim).
    pub values: *const qkv_tensor,
    /// The pages of each sequence, in order: row i of (sequences, tables_stride). Only those that a length needs are read.
    pub tables: *const u32,
    /// Entries from one row of tables to the next.
    pub tables_stride: usize,
    /// Keys of each sequence.
    pub lengths: qkv_integers,
}

/// Attention of packed queries over keys and values in pages: prefill chunks and decode steps in one call.
///
/// query is (1, query heads, total length, key dim): sequence i has rows query_ends[i] to query_ends[i + 1] of it and of
/// the output, and the first pages->lengths[i] keys of its pages. Options as for qkv_attention_packed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_attention_paged(
    query: *const qkv_tensor,
    query_ends: qkv_integers,
    pages: *const qkv_pages,
    options: *const qkv_attention_options,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let query = Input::read("query", query)?;
            let query_ends = ends("query_ends", query_ends)?;
            let pages = crate::views::copy("pages", pages)?;
            let inputs = [query, Input::read("keys", pages.keys)?, Input::read("values", pages.values)?];
            let [keys, values] = [inputs[1].data()?, inputs[2].data()?];
            let sequences = query_ends.len() - 1;
            let lengths = pages.lengths.copied("lengths", &[sequences])?.unwrap_or_default();
            let page_size = inputs[1].shape()[2];
            let tables = tables(&pages, &lengths, page_size)?;
            let options = Options::read(options, Sizes { query: query.shape(), sequences })?;
            let results = Results::read(outputs, rows(query.shape()))?;
            let mut read = regions(&inputs, &options);
            // Tables are read where they lie; their entries have the size of a float.
            let entries =
                pages.tables_stride.saturating_mul(if pages.tables.is_null() { 0 } else { lengths.len() });
            read.push(Region::list("tables", pages.tables.cast_mut().cast(), entries)?);
            check_apart(&results.regions(), &read)?;
            let (spec, outputs) = (options.spec(&[])?, results.outputs()?);
            let paged = PagedRef { keys, values, tables: &tables, lengths: &lengths };
            let q = query.data()?;
            Ok(threads::run(|| attention_paged(q, &query_ends, paged, &spec, outputs))?)
        }
    })
}

/// The part of each table that its length needs.
///
/// # Safety
/// Those parts must be readable for `'a`, and not be written in that time.
unsafe fn tables<'a>(
    pages: &qkv_pages,
    lengths: &[usize],
    page_size: usize,
) -> Result<Vec<&'a [u32]>, Failure> {
    let count = pages.tables_stride.saturating_mul(lengths.len());
    let given = is_given("tables", pages.tables, count)?;
    let rows = lengths.iter().enumerate().map(|(index, &length)| {
        let needed = length.div_ceil(page_size.max(1));
        if needed > pages.tables_stride {
            let limit = pages.tables_stride.saturating_mul(page_size);
            return Err(AttentionError::Beyond { argument: "lengths", index, given: length, limit }.into());
        }
        if needed == 0 || !given {
            return Ok(&[][..]);
        }
        // SAFETY: inside the tables, by the count that was looked at, and the caller's promise.
        Ok(unsafe { core::slice::from_raw_parts(pages.tables.add(index * pages.tables_stride), needed) })
    });
    rows.collect()
}

/// One side of a merge: an output (batch, heads, length, dim) of f32 and its LSE, contiguous (batch, heads, length).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_part {
    /// The output.
    pub output: *const qkv_tensor,
    /// Its log-sum-exp.
    pub lse: qkv_floats,
}

/// Merges attention over two disjoint sets of keys into attention over both: split keys, shared prefixes, parts of a
/// sequence on other machines.
///
/// A side that saw no key (LSE -infinity) has no weight. A sink may be counted in one of the sides only. outputs->lse may be
/// left out; outputs->maxima must be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_merge(
    a: *const qkv_part,
    b: *const qkv_part,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let [a, b] = [crate::views::copy("a", a)?, crate::views::copy("b", b)?];
            let [out_a, out_b] = [Input::read("a.output", a.output)?, Input::read("b.output", b.output)?];
            let rows = rows(out_a.shape());
            let results = Results::read(outputs, rows)?;
            if results.has_maxima() {
                let what = "maxima: not supported together with a merge";
                return Err(Failure::new(QKV_ERROR_NOT_SUPPORTED, what));
            }
            let [lse_a, lse_b] = [lse("a.lse", a.lse, rows)?, lse("b.lse", b.lse, rows)?];
            let read: Vec<Region> = out_a.regions().chain(out_b.regions()).collect();
            check_apart(&results.regions(), &read)?;
            // The Rust crate would ask for a row of memory, however long, to merge nothing.
            if rows == 0 && [out_b.shape(), results.output.shape] == [out_a.shape(); 2] {
                return Ok(());
            }
            let [a, b] = [Part { out: out_a.f32()?, lse: &lse_a }, Part { out: out_b.f32()?, lse: &lse_b }];
            let Outputs { out, lse, .. } = results.outputs()?;
            let mut unasked = Vec::new();
            let lse = match lse {
                Some(lse) => lse,
                None => {
                    unasked.resize(rows, 0.0);
                    &mut unasked
                }
            };
            Ok(merge(a, b, out, lse)?)
        }
    })
}

/// A copy of one side's LSE.
///
/// # Safety
/// It must be readable.
unsafe fn lse(argument: &'static str, list: qkv_floats, rows: usize) -> Result<Vec<f32>, Failure> {
    // SAFETY: the caller's promise.
    match unsafe { list.copied(argument, &[rows]) }? {
        Some(list) => Ok(list),
        None if rows == 0 => Ok(Vec::new()),
        None => Err(Failure::null(argument)),
    }
}
