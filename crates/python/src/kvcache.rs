//! Attention over caches of keys and values, contiguous or in pages, after new tokens were added in place:
//! `flash_attn_with_kvcache`.
//!
//! Rows of a contiguous cache that are chosen by index are pages too, each as long as the cache.

use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyTuple};
use qkv::rotary::Rotary;
use qkv::{
    AttentionError, AttentionSpec, Data, Outputs, PagedRef, QueryRotary, TensorMut, TensorRef,
    attention_into, attention_paged,
};

use crate::array::{Array, DType, own};
use crate::copy::{Source, gather};
use crate::error::{Names, bad_value};
use crate::flash::{
    Asked, Options, empty_rows_up, expect_type_of, flag, int32, integer, outputs, settled, tensor,
};
use crate::pool;
use crate::rotary::{Move, Rows, Tables, distinct, move_rows, refused, row_of};
use crate::torch_tensor::not_exported;
use crate::varlen::{Pages, Table};

/// Names of the arguments.
const NAMES: Names =
    Names { key: "k_cache", value: "v_cache", key_lengths: "cache_seqlens", ..Names::ATTENTION };

/// Sequences are counted in lists; so many do not fill the memory, even where an empty array claims to have more.
const MOST_SEQUENCES: usize = 1 << 24;

const BSHD: &str = "(batch, length, heads, dim)";

type Object<'py> = Option<Bound<'py, PyAny>>;

/// As they came: k, v, rotary_cos, rotary_sin, rotary_interleaved.
#[derive(Debug, FromPyObject)]
pub(crate) struct New<'py>(Object<'py>, Object<'py>, Object<'py>, Object<'py>, Bound<'py, PyAny>);

/// As they came: cache_seqlens, cache_batch_idx, cache_leftpad, block_table.
#[derive(Debug, FromPyObject)]
pub(crate) struct Places<'py>(Object<'py>, Object<'py>, Object<'py>, Object<'py>);

/// As they came: num_splits, return_softmax_lse.
#[derive(Debug, FromPyObject)]
pub(crate) struct Rest<'py>(Bound<'py, PyAny>, Bound<'py, PyAny>);

/// `qkv.flash_attn.flash_attn_with_kvcache`, which documents it.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(crate) fn flash_attn_with_kvcache<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k_cache: &Bound<'py, PyAny>,
    v_cache: &Bound<'py, PyAny>,
    new: New<'py>,
    places: Places<'py>,
    asked: Asked<'py>,
    rest: Rest<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let Rest(num_splits, return_lse) = rest;
    let wants_lse = flag("return_softmax_lse", &return_lse)?;
    if integer("num_splits", &num_splits)? < 0 {
        return Err(bad_value("num_splits", num_splits.to_string(), "0 or more"));
    }
    let New(k, v, cos, sin, interleaved) = new;
    let interleaved = flag("rotary_interleaved", &interleaved)?;
    let mut q = tensor("q", q, 4, BSHD)?;
    let (batch, length, heads, dim) = (q.shape[0], q.shape[1], q.shape[2], q.shape[3]);
    if batch > MOST_SEQUENCES {
        return Err(bad_value("q", format!("batch is {batch}"), format!("at most {MOST_SEQUENCES}")));
    }
    let options = Options::read(&asked, batch, heads)?;

    let new = match (k, v) {
        (Some(k), Some(v)) => Some([tensor("k", &k, 4, BSHD)?, tensor("v", &v, 4, BSHD)?]),
        (None, None) => None,
        (None, Some(_)) => return Err(bad_value("v", "given without k", "both or none")),
        (Some(_), None) => return Err(bad_value("v", "None with k given", "both or none")),
    };
    let mut keys = cache("k_cache", k_cache, new.is_some())?;
    let mut values = cache("v_cache", v_cache, new.is_some())?;
    for array in [&keys, &values].into_iter().chain(new.iter().flatten()) {
        expect_type_of(array, &q)?;
    }
    let [rows, page_size] = [keys.shape[0], keys.shape[1]];
    let value_dim = values.shape[3];
    values.expect_shape(&[rows, page_size, keys.shape[2], value_dim])?;
    let added = match &new {
        Some([k, v]) => {
            k.expect_shape(&[batch, k.shape[1], keys.shape[2], keys.shape[3]])?;
            v.expect_shape(&[batch, k.shape[1], keys.shape[2], value_dim])?;
            k.shape[1]
        }
        None => 0,
    };

    let Places(cache_seqlens, cache_batch_idx, cache_leftpad, block_table) = places;
    let (named, table_given) = which(block_table.as_ref(), cache_batch_idx.as_ref(), batch, rows)?;
    let capacity = table_given.as_ref().map_or(page_size, |table| table.capacity(page_size));
    if new.is_some() && cache_seqlens.is_none() {
        return Err(bad_value("cache_seqlens", "None with k given", "the lengths that k is appended to"));
    }
    let before = lengths(cache_seqlens.as_ref(), batch, capacity, added)?;
    let starts = cache_leftpad.as_ref().map(|list| left_padding(list, &before)).transpose()?;
    let after: Vec<usize> = before.iter().map(|length| length + added).collect();
    let pages = table_given.map(|table| table.used(named, &after, rows, page_size)).transpose()?;

    let tables = pages.as_ref().map(Pages::rows);
    let mut spec = options.spec();
    spec.key_starts = starts.as_deref();
    let ends: Vec<usize> =
        if pages.is_some() { (0..=batch).map(|i| i * length).collect() } else { Vec::new() };
    let sequences = Sequences { tables: tables.as_deref(), query_ends: &ends, lengths: &after };
    let exception = |error: AttentionError| NAMES.exception(&error);

    if pages.is_none() {
        // The caches may have room for more sequences than there are.
        (keys.shape[0], values.shape[0]) = (batch, batch);
    }
    let (mut keys, mut values) = (keys.swapped(1, 2), values.swapped(1, 2));
    q = if pages.is_some() { flat(q)? } else { q.swapped(1, 2) };
    let turning = match (cos, sin) {
        (Some(cos), Some(sin)) if new.is_some() => {
            Some(Tables::read(["rotary_cos", "rotary_sin"], [&cos, &sin], dim, interleaved)?)
        }
        (Some(_), Some(_)) => return Err(bad_value("rotary_cos", "given without k", "new keys with it")),
        (None, None) => None,
        _ => return Err(bad_value("rotary_cos, rotary_sin", "one of them", "both or none")),
    };
    // What the attention itself could refuse it refuses now, for no queries at all: nothing is written before.
    sequences.attend_none(q.data()?.shape(), [keys.data()?, values.data()?], &spec).map_err(exception)?;
    let mut out = Array::new("out", &q, q.dtype, &[batch, length, heads, value_dim])?;
    let mut lse = match wants_lse {
        true => Some(Array::new("softmax_lse", &q, DType::F32, &[batch, heads, length])?),
        false => None,
    };
    out = if pages.is_some() { flat(out)? } else { out.swapped(1, 2) };

    // A query's position is its key's where they are ordered, else that of the first new key.
    let step = usize::from(options.causal || options.window.is_some());
    let turning = match &turning {
        Some(tables) => Some(turning_of(tables, &before, added, length, step)?),
        None => None,
    };
    let values_beside = if pages.is_some() && wants_lse { batch * length * heads } else { 0 };
    let mut beside: Vec<f32> = reserved("softmax_lse", values_beside)?;
    beside.resize(values_beside, 0.0);
    if let Some([k, v]) = new {
        let (k, v) = (k.swapped(1, 2), v.swapped(1, 2));
        keys.expect_apart_from([&q, &k, &v, &values])?;
        values.expect_apart_from([&q, &k, &v])?;
        let mut moves = moves(&before, added, sequences.tables, page_size);
        expect_distinct(named, &moves)?;
        if let Some(turning) = &turning {
            for token in &mut moves {
                token.position = row_of(&turning.rows, token.position);
            }
        }
        append(py, &k, &mut keys, &moves, turning.as_ref().map(|turning| &turning.table))?;
        append(py, &v, &mut values, &moves, None)?;
    }
    if let Some(Turning { table, queries, .. }) = &turning {
        spec.rotary = Some(QueryRotary { table, positions: queries });
    }

    let longest = after.iter().copied().max().unwrap_or(0) as f64;
    let work = batch as f64 * length as f64 * heads as f64 * longest * 2.0 * (dim + value_dim) as f64;
    let (data_q, data_k, data_v) = (q.data()?, keys.data()?, values.data()?);
    let results = match (&pages, &mut lse) {
        (Some(_), Some(_)) => Outputs::new(out.data_mut()?).with_lse(&mut beside),
        _ => outputs(&mut out, &mut lse)?,
    };
    pool::run(py, work, || sequences.attend(data_q, [data_k, data_v], &spec, results))?.map_err(exception)?;
    if added > 0 {
        keys.into_result(true)?;
        values.into_result(true)?;
    }
    let out = out.into_result(false)?;
    let Some(mut lse) = lse else { return Ok(out) };
    let to = lse.floats_mut()?;
    if pages.is_some() {
        // (heads, batch, length) as (batch, heads, length).
        for (row, to) in to.chunks_exact_mut(length.max(1)).enumerate() {
            let (sequence, head) = (row / heads, row % heads);
            to.copy_from_slice(&beside[(head * batch + sequence) * length..][..length]);
        }
    }
    empty_rows_up(to);
    Ok(PyTuple::new(py, [out, lse.into_result(false)?])?.into_any())
}

/// What says where the keys of each sequence are, and its name: a block table, an index, or nothing where they are in the
/// cache's rows one after the other.
fn which(
    block_table: Option<&Bound<'_, PyAny>>,
    cache_batch_idx: Option<&Bound<'_, PyAny>>,
    batch: usize,
    rows: usize,
) -> PyResult<(&'static str, Option<Table>)> {
    match (block_table, cache_batch_idx) {
        (Some(_), Some(_)) => Err(bad_value("cache_batch_idx", "given with block_table", "one of them")),
        (Some(block_table), None) => {
            Ok(("block_table", Some(Table::read("block_table", block_table, batch)?)))
        }
        (None, Some(index)) => {
            let index = int32("cache_batch_idx", index, Some(batch))?;
            Ok(("cache_batch_idx", Some(Table::of_one(index))))
        }
        (None, None) if batch > rows => {
            let given = format!("batch is {rows}");
            Err(bad_value("k_cache", given, format!("at least {batch} as q has")))
        }
        (None, None) => Ok(("k_cache", None)),
    }
}

/// How new keys and queries are turned.
#[derive(Debug)]
struct Turning {
    /// The positions that they have, ascending.
    rows: Vec<usize>,
    /// The rows of the tables for these.
    table: Rotary,
    /// Which of them each query has, batch by batch.
    queries: Vec<usize>,
}

/// How they are turned from these positions on, all of which must be in the tables.
fn turning_of(
    tables: &Tables<'_>,
    before: &[usize],
    added: usize,
    length: usize,
    step: usize,
) -> PyResult<Turning> {
    let turned = added.max(if length > 0 { step * (length - 1) + 1 } else { 0 });
    let furthest = if turned > 0 { before.iter().max().map_or(0, |&before| before + turned) } else { 0 };
    if furthest > tables.max_length() {
        let given = format!("{} positions", tables.max_length());
        return Err(bad_value("rotary_cos", given, format!("{furthest} or more for these lengths")));
    }
    let mut queries: Vec<usize> = reserved("q", before.len().saturating_mul(length))?;
    queries.extend(before.iter().flat_map(|&before| (0..length).map(move |i| before + i * step)));
    let mut used = reserved("k", before.len().saturating_mul(added).saturating_add(queries.len()))?;
    used.extend(before.iter().flat_map(|&before| before..before + added));
    used.extend_from_slice(&queries);
    let rows = distinct(used);
    let table = tables.rows(&rows)?;
    for position in &mut queries {
        *position = row_of(&rows, *position);
    }
    Ok(Turning { rows, table, queries })
}

/// A cache: (batch or pages, length, heads, dim). It is never copied.
fn cache<'py>(name: &'static str, object: &Bound<'py, PyAny>, is_written: bool) -> PyResult<Array<'py>> {
    let array = if is_written { Array::output(name, object)? } else { Array::input(name, object)? };
    array.expect_dtype(&DType::FLOATS)?;
    array.expect_rank(4, "(batch or pages, length, heads, dim)")?;
    if !array.has_contiguous_rows() {
        let given = format!("a last axis of stride {}", array.strides[3]);
        return Err(bad_value(name, given, "a contiguous one (stride 1)"));
    }
    Ok(settled(array))
}

/// Keys of each sequence before the call, with room for `added` more.
fn lengths(
    object: Option<&Bound<'_, PyAny>>,
    batch: usize,
    capacity: usize,
    added: usize,
) -> PyResult<Vec<usize>> {
    const NAME: &str = "cache_seqlens";
    let Some(object) = object else { return Ok(vec![capacity; batch]) };
    let failed = |error| not_exported(object.py(), NAME, error);
    let is_number = object.is_instance_of::<PyInt>() || !object.hasattr("__dlpack__").map_err(failed)?;
    let given =
        if is_number { vec![integer(NAME, object)?; batch] } else { int32(NAME, object, Some(batch))? };
    let room = capacity.checked_sub(added);
    given
        .iter()
        .enumerate()
        .map(|(index, &given)| {
            let fits = usize::try_from(given).ok().filter(|&length| room.is_some_and(|room| length <= room));
            fits.ok_or_else(|| {
                let expected =
                    format!("0 or more, and room for {added} more keys in the capacity of {capacity}");
                bad_value(&format!("{NAME}[{index}]"), given.to_string(), expected)
            })
        })
        .collect()
}

/// The first key of each sequence that is there.
fn left_padding(object: &Bound<'_, PyAny>, lengths: &[usize]) -> PyResult<Vec<usize>> {
    const NAME: &str = "cache_leftpad";
    let given = int32(NAME, object, Some(lengths.len()))?;
    let starts = given.iter().zip(lengths).enumerate().map(|(index, (&given, &length))| {
        usize::try_from(given).ok().filter(|&start| start <= length).ok_or_else(|| {
            let expected = format!("at least 0 and at most the {length} keys of cache_seqlens");
            bad_value(&format!("{NAME}[{index}]"), given.to_string(), expected)
        })
    });
    starts.collect()
}

/// (batch, length, heads, dim) as (1, heads, batch * length, dim): a view where the axes allow it.
fn flat(mut array: Array<'_>) -> PyResult<Array<'_>> {
    let [batch, length, heads, dim] = [array.shape[0], array.shape[1], array.shape[2], array.shape[3]];
    let rows = |array: &Array<'_>| match (batch, length) {
        (_, 1) => Some(array.strides[0]),
        (1, _) => Some(array.strides[1]),
        _ if Some(array.strides[0]) == array.strides[1].checked_mul(length as isize) => {
            Some(array.strides[1])
        }
        _ => None,
    };
    let stride = match rows(&array) {
        Some(stride) => stride,
        None => {
            let byte_strides = array.byte_strides();
            let source = Source { data: array.data, shape: &array.shape, byte_strides: &byte_strides };
            // SAFETY: every element lies in the memory of the array; it is read unaligned, and an integer has no invalid bits.
            let (copied, data, strides) = unsafe {
                match array.dtype.size() {
                    2 => own(gather(&source, false, |p| p.cast::<u16>().read_unaligned())?),
                    _ => own(gather(&source, false, |p| p.cast::<u32>().read_unaligned())?),
                }
            };
            (array.copied, array.data, array.strides) = (Some(copied), data, strides);
            array.strides[1]
        }
    };
    array.strides = vec![0, array.strides[2], stride, 1];
    array.shape = vec![1, heads, batch * length, dim];
    Ok(array)
}

/// An empty list with room for so many, or `MemoryError`: what claims to be large need not be.
fn reserved<T>(name: &str, count: usize) -> PyResult<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(count).map_err(|_| {
        PyMemoryError::new_err(format!("{name}: a list of {count} entries does not fit the memory"))
    })?;
    Ok(list)
}

/// Where each new token comes from and goes to.
fn moves(before: &[usize], added: usize, tables: Option<&[&[u32]]>, page_size: usize) -> Vec<Move> {
    let tokens = before
        .iter()
        .enumerate()
        .flat_map(|(sequence, &before)| (0..added).map(move |i| (sequence, i, before + i)));
    tokens
        .map(|(sequence, i, position)| {
            // There is room, so that there is a page.
            let page = tables.map_or(sequence, |tables| tables[sequence][position / page_size] as usize);
            Move { from: [sequence, i], to: [page, position % page_size], position }
        })
        .collect()
}

/// Refuses tokens that go to the same place.
fn expect_distinct(name: &str, moves: &[Move]) -> PyResult<()> {
    let mut places: Vec<[usize; 2]> = moves.iter().map(|token| token.to).collect();
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => {
            let given = format!("two new keys in row {} of page {}", pair[0][1], pair[0][0]);
            Err(bad_value(name, given, "a row for each"))
        }
    }
}

/// Adds tokens to a cache, whose heads, dim and type are theirs.
fn append(
    py: Python<'_>,
    from: &Array<'_>,
    to: &mut Array<'_>,
    moves: &[Move],
    table: Option<&Rotary>,
) -> PyResult<()> {
    let data = from.data()?;
    let work = moves.len() as f64 * from.shape[1] as f64 * from.shape[3] as f64 * 4.0;
    let mut rows = Rows::new(to)?;
    pool::run(py, work, || move_rows(&data, &mut rows, moves, table))?
        .map_err(|error| refused("rotary_cos", &error))
}

/// Which queries and keys belong together.
#[derive(Clone, Copy, Debug)]
struct Sequences<'a> {
    /// The pages of each sequence; None: sequence i is row i of the caches.
    tables: Option<&'a [&'a [u32]]>,
    /// With tables: the rows of q that each sequence has.
    query_ends: &'a [usize],
    lengths: &'a [usize],
}

impl Sequences<'_> {
    /// Attention.
    fn attend(
        &self,
        q: Data<'_>,
        [keys, values]: [Data<'_>; 2],
        spec: &AttentionSpec<'_>,
        outputs: Outputs<'_>,
    ) -> Result<(), AttentionError> {
        match self.tables {
            Some(tables) => {
                let paged = PagedRef { keys, values, tables, lengths: self.lengths };
                attention_paged(q, self.query_ends, paged, spec, outputs)
            }
            None => attention_into(q, keys, values, &spec.clone().with_key_lengths(self.lengths), outputs),
        }
    }

    /// Attention of no queries of this shape: nothing but its checks.
    fn attend_none(
        &self,
        [batch, heads, _, dim]: [usize; 4],
        [keys, values]: [Data<'_>; 2],
        spec: &AttentionSpec<'_>,
    ) -> Result<(), AttentionError> {
        let none = || AttentionError::TooLarge { shape: [batch, heads, 0, dim] };
        let value_dim = values.shape()[3];
        let q = TensorRef::<f32>::from_slice(&[], [batch, heads, 0, dim]).map_err(|_| none())?;
        let out = TensorMut::<f32>::from_slice(&mut [], [batch, heads, 0, value_dim]).map_err(|_| none())?;
        let ends = vec![0; self.query_ends.len()];
        Sequences { query_ends: &ends, ..*self }.attend(q.into(), [keys, values], spec, Outputs::new(out))
    }
}
