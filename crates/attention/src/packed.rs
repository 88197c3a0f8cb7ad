//! Sequences of different lengths in one call: packed one after the other, or in the pages of a cache.

use qkv_simd::Isa;

use crate::check::{ascending, check_axis, check_inputs, check_per_sequence, count};
use crate::forward::{check_outputs, run_plain};
use crate::interval::Segment;
use crate::kv_rows::KvRows;
use crate::plan::Sequences;
use crate::shape::Shape;
use crate::{Argument, AttentionError, AttentionSpec, Data, Outputs, PagedRef};

/// Where sequences of different lengths begin and end in a packed batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed<'a> {
    /// Sequence i is rows `query_ends[i]` .. `query_ends[i + 1]` of the queries and outputs: ascending, from 0 to their
    /// length (cu_seqlens).
    pub query_ends: &'a [usize],
    /// The same for keys and values.
    pub key_ends: &'a [usize],
}

/// Attention of sequences packed one after the other along the length of batch 1: (1, heads, total length, dim).
///
/// Alignments, windows and biases count within each sequence, and what the spec gives per batch is per sequence. A
/// sequence's result has the same bits as if it were computed alone. Sequences of length 0 are valid.
///
/// # Errors
/// As [`crate::attention_into`]; where the ends do not ascend from 0 to the length; and for masks, biases, key lengths,
/// documents and block masks, which have no meaning here.
pub fn attention_packed<'a>(
    q: impl Into<Data<'a>>,
    k: impl Into<Data<'a>>,
    v: impl Into<Data<'a>>,
    packed: Packed<'_>,
    spec: &AttentionSpec<'_>,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let shape = check_inputs(q.shape(), k.shape(), v.shape(), spec)?;
    let Packed { query_ends, key_ends } = packed;
    check_packed(&shape, spec)?;
    check_ends("query_ends", query_ends, shape.query_len)?;
    check_ends("key_ends", key_ends, shape.key_len)?;
    count("key_ends", key_ends.len(), query_ends.len())?;
    check_per_sequence(&shape, spec, query_ends.len() - 1)?;
    let segments = query_ends.windows(2).zip(key_ends.windows(2)).enumerate().map(|(index, (query, key))| {
        let segment = Segment {
            batch: 0,
            index,
            first_query: query[0],
            query_len: query[1] - query[0],
            first_key: key[0],
            key_len: key[1] - key[0],
        };
        (segment, 0)
    });
    let sequences = Sequences::Packed(segments.collect());
    run_plain(q, [KvRows::plain(k), KvRows::plain(v)], spec, outputs, (shape, sequences))
}

/// Attention of sequences whose keys and values lie in pages of a pool: prefill chunks and decode steps side by side, in one
/// call and one list of tasks.
///
/// q is packed, (1, query heads, total length, key dim): sequence i has rows `query_ends[i]` .. `query_ends[i + 1]` of it
/// and of the output, and the first `paged.lengths[i]` keys of the pages `paged.tables[i]`. Alignments, windows and biases
/// count within each sequence; bottom-right is the usual alignment. A sequence's result has the same bits as if it were
/// computed alone, or from contiguous keys.
///
/// # Errors
/// As [`attention_packed`]; where the shapes of the pages do not fit, a table is too short for its length, or a page is not
/// there.
pub fn attention_paged<'a>(
    q: impl Into<Data<'a>>,
    query_ends: &[usize],
    paged: PagedRef<'a>,
    spec: &AttentionSpec<'_>,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    let q = q.into();
    let checked = check_pages(&q, query_ends, &paged, spec)?;
    let rows = [paged.keys, paged.values].map(|data| KvRows { data, tables: Some(paged.tables) });
    run_plain(q, rows, spec, outputs, checked)
}

/// Whether [`attention_paged`] would refuse this; nothing is computed, and no key, value or query is looked at. For who has to know
/// before keys and values are there.
///
/// # Errors
/// As [`attention_paged`].
pub fn check_paged<'a>(
    q: impl Into<Data<'a>>,
    query_ends: &[usize],
    paged: PagedRef<'a>,
    spec: &AttentionSpec<'_>,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    let (shape, _) = check_pages(&q.into(), query_ends, &paged, spec)?;
    check_outputs(&shape, outputs)?;
    Isa::active()?;
    Ok(())
}

/// The checks of [`attention_paged`] but for its outputs.
fn check_pages(
    q: &Data<'_>,
    query_ends: &[usize],
    paged: &PagedRef<'_>,
    spec: &AttentionSpec<'_>,
) -> Result<(Shape, Sequences), AttentionError> {
    let &PagedRef { ref keys, ref values, tables, lengths } = paged;
    let [pages, kv_heads, page_size, key_dim] = keys.shape();
    let [value_pages, value_heads, value_page_size, value_dim] = values.shape();
    check_axis(Argument::Value, "batch", value_pages, pages, Argument::Key)?;
    check_axis(Argument::Value, "length", value_page_size, page_size, Argument::Key)?;
    count("tables", tables.len(), lengths.len())?;
    for (index, (table, &given)) in tables.iter().zip(lengths).enumerate() {
        let limit = table.len().saturating_mul(page_size);
        if given > limit {
            return Err(AttentionError::Beyond { argument: "lengths", index, given, limit });
        }
        let used = &table[..given.div_ceil(page_size.max(1))];
        if let Some(&page) = used.iter().find(|&&page| page as usize >= pages) {
            let (given, limit) = (page as usize, pages.saturating_sub(1));
            return Err(AttentionError::Beyond { argument: "tables", index, given, limit });
        }
    }
    // The longest sequence stands for the key length.
    let key_len = lengths.iter().copied().max().unwrap_or(0);
    let shape = check_inputs(
        q.shape(),
        [q.shape()[0], kv_heads, key_len, key_dim],
        [q.shape()[0], value_heads, key_len, value_dim],
        spec,
    )?;
    check_packed(&shape, spec)?;
    check_ends("query_ends", query_ends, shape.query_len)?;
    count("lengths", lengths.len(), query_ends.len() - 1)?;
    check_per_sequence(&shape, spec, lengths.len())?;
    let segments = query_ends.windows(2).zip(lengths).enumerate().map(|(index, (query, &key_len))| {
        let (first_query, query_len) = (query[0], query[1] - query[0]);
        (Segment { batch: 0, index, first_query, query_len, first_key: 0, key_len }, 0)
    });
    Ok((shape, Sequences::Packed(segments.collect())))
}

/// Refuses what has no meaning for a packed batch.
fn check_packed(shape: &Shape, spec: &AttentionSpec<'_>) -> Result<(), AttentionError> {
    check_axis(Argument::Query, "batch", shape.batch, 1, Argument::Query)?;
    for (argument, given) in [
        ("mask", spec.mask.is_some()),
        ("bias", spec.bias.is_some()),
        ("block_mask", spec.block_mask.is_some()),
        ("key_lengths", spec.key_lengths.is_some()),
        ("documents", spec.documents.is_some()),
    ] {
        if given {
            return Err(AttentionError::NotTogether { argument, with: "a packed batch" });
        }
    }
    Ok(())
}

/// Refuses ends that do not ascend from 0 to `length`.
fn check_ends(argument: &'static str, ends: &[usize], length: usize) -> Result<(), AttentionError> {
    ascending(argument, ends, length)?;
    match (ends.first(), ends.last()) {
        (Some(0), Some(&last)) if last == length => Ok(()),
        (Some(0), Some(&given)) => Err(AttentionError::Count { argument, given, expected: length }),
        (Some(&given), _) => Err(AttentionError::Beyond { argument, index: 0, given, limit: 0 }),
        (None, _) => Err(AttentionError::Count { argument, given: 0, expected: 1 }),
    }
}
