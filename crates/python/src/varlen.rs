//! Sequences of different lengths packed one after the other, their keys packed as well or in pages: `flash_attn_varlen_func`.

use pyo3::prelude::*;
use qkv::{Packed, PagedRef, attention_packed, attention_paged};

use crate::array::{Array, DType};
use crate::error::{Names, bad_value};
use crate::flash::{
    Asked, Options, Training, empty_rows_up, expect_type_of, int32, integer, outputs, tensor, with_probs,
};
use crate::pool;

/// Names of the arguments.
const NAMES: Names = Names { key_lengths: "cu_seqlens_k", ..Names::ATTENTION };

/// As they came: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
#[derive(Debug, FromPyObject)]
pub(crate) struct Lengths<'py>(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// `qkv.flash_attn.flash_attn_varlen_func`, which documents it.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "arguments of a Python function")]
pub(crate) fn flash_attn_varlen_func<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    lengths: Lengths<'py>,
    asked: Asked<'py>,
    training: Training<'py>,
    block_table: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let wants_lse = training.wants_lse()?;
    let packed = "(total length, heads, dim)";
    let (rank, axes) =
        if block_table.is_some() { (4, "(pages, page size, heads, dim)") } else { (3, packed) };
    let q = tensor("q", q, 3, packed)?;
    let (mut k, mut v) = (tensor("k", k, rank, axes)?, tensor("v", v, rank, axes)?);
    expect_type_of(&k, &q)?;
    expect_type_of(&v, &q)?;
    let (total, heads, dim) = (q.shape[0], q.shape[1], v.shape[rank - 1]);
    let Lengths(query_ends, key_ends, most_queries, most_keys) = lengths;
    let mut query_ends = ends("cu_seqlens_q", &query_ends, None, Some(total))?;
    let limit = block_table.is_none().then_some(k.shape[0]);
    let mut key_ends = ends("cu_seqlens_k", &key_ends, Some(query_ends.len()), limit)?;
    for (name, given, ends) in
        [("max_seqlen_q", most_queries, &query_ends), ("max_seqlen_k", most_keys, &key_ends)]
    {
        let longest = ends.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0);
        let given = integer(name, &given)?;
        if i64::try_from(longest).is_ok_and(|longest| given < longest) {
            return Err(bad_value(
                name,
                given.to_string(),
                format!("at least {longest}, the longest sequence"),
            ));
        }
    }
    let mut options = Options::read(&asked, query_ends.len() - 1, heads)?;
    let used = query_ends.last().copied().unwrap_or(0);
    let has_tail = used < total;
    if has_tail {
        // Rows of no sequence are one that has no keys.
        query_ends.push(total);
        key_ends.push(key_ends.last().copied().unwrap_or(0));
        options = options.and_one_more(heads);
    }
    let spec = options.spec();
    let key_lengths: Vec<usize> = key_ends.windows(2).map(|ends| ends[1] - ends[0]).collect();
    let scores: f64 = query_ends
        .windows(2)
        .zip(&key_lengths)
        .map(|(ends, &keys)| (ends[1] - ends[0]) as f64 * keys as f64)
        .sum();
    let work = scores * heads as f64 * 2.0 * (q.shape[2] + dim) as f64;

    let tables = match block_table {
        Some(table) => {
            let (pages, page_size) = (k.shape[0], k.shape[1]);
            let sequences = key_lengths.len() - usize::from(has_tail);
            let table = Table::read("block_table", table, sequences)?;
            table.expect_room("cu_seqlens_k", &key_lengths[..sequences], page_size)?;
            Some(table.used("block_table", &key_lengths[..sequences], pages, page_size)?)
        }
        None => {
            // The rest belongs to no sequence.
            let keys = key_ends.last().copied().unwrap_or(0);
            v.expect_shape(&[k.shape[0], k.shape[1], dim])?;
            (k.shape[0], v.shape[0]) = (keys, keys);
            None
        }
    };
    let [q, k, v] = [q, k, v].map(|array| array.with_rank(4).swapped(1, 2));
    let mut out = Array::new("out", &q, q.dtype, &[total, heads, dim])?.with_rank(4).swapped(1, 2);
    let mut lse = match wants_lse {
        true => Some(Array::new("softmax_lse", &q, DType::F32, &[heads, total])?),
        false => None,
    };
    let (data_q, data_k, data_v) = (q.data()?, k.data()?, v.data()?);
    let results = outputs(&mut out, &mut lse)?;
    let done = match &tables {
        Some(tables) => {
            let mut tables = tables.rows();
            tables.resize(key_lengths.len(), &[]);
            let paged = PagedRef { keys: data_k, values: data_v, tables: &tables, lengths: &key_lengths };
            pool::run(py, work, || attention_paged(data_q, &query_ends, paged, &spec, results))?
        }
        None => {
            let packed = Packed { query_ends: &query_ends, key_ends: &key_ends };
            pool::run(py, work, || attention_packed(data_q, data_k, data_v, packed, &spec, results))?
        }
    };
    done.map_err(|error| NAMES.exception(&error))?;
    if let Some(lse) = &mut lse {
        empty_rows_up(lse.floats_mut()?);
    }
    with_probs(out, lse)
}

/// Ends of sequences: ascending from 0 to `total` at most.
fn ends(
    name: &'static str,
    object: &Bound<'_, PyAny>,
    count: Option<usize>,
    total: Option<usize>,
) -> PyResult<Vec<usize>> {
    let list = int32(name, object, count)?;
    let mut ends: Vec<usize> = Vec::with_capacity(list.len() + 1);
    for (index, &given) in list.iter().enumerate() {
        let fits = usize::try_from(given).ok().filter(|&end| ends.last().is_none_or(|&before| before <= end));
        let Some(end) = fits.filter(|&end| index > 0 || end == 0) else {
            let expected = match ends.last() {
                Some(before) => format!("at least {before}, the entry before"),
                None => "0".to_owned(),
            };
            return Err(bad_value(&format!("{name}[{index}]"), given.to_string(), expected));
        };
        ends.push(end);
    }
    match ends.last() {
        None => Err(bad_value(name, "no entries", "0 and the end of each sequence")),
        Some(&last) if total.is_some_and(|total| last > total) => {
            let total = total.unwrap_or(0);
            Err(bad_value(
                &format!("{name}[{}]", ends.len() - 1),
                last.to_string(),
                format!("at most the length, {total}"),
            ))
        }
        Some(_) => Ok(ends),
    }
}

/// A block table as it came: any numbers.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Vec<i64>,
    sequences: usize,
    width: usize,
}

/// The pages of each sequence; 0 in place of those that it does not reach.
#[derive(Debug)]
pub(crate) struct Pages {
    pages: Vec<u32>,
    sequences: usize,
    width: usize,
}

impl Table {
    /// int32 (sequences, pages).
    pub(crate) fn read(name: &'static str, object: &Bound<'_, PyAny>, sequences: usize) -> PyResult<Self> {
        let array = Array::input(name, object)?;
        array.expect_dtype(&[DType::I32])?;
        array.expect_rank(2, "(batch, pages of a sequence)")?;
        let width = array.shape[1];
        array.expect_shape(&[sequences, width])?;
        Ok(Self { entries: array.to_integers()?, sequences, width })
    }

    /// One page for each sequence.
    pub(crate) fn of_one(entries: Vec<i64>) -> Self {
        Self { sequences: entries.len(), entries, width: 1 }
    }

    /// Keys of a sequence for which there are entries.
    pub(crate) fn capacity(&self, page_size: usize) -> usize {
        self.width.saturating_mul(page_size)
    }

    /// Refuses lengths, named `name`, beyond that.
    fn expect_room(&self, name: &str, lengths: &[usize], page_size: usize) -> PyResult<()> {
        let limit = self.capacity(page_size);
        match lengths.iter().position(|&length| length > limit) {
            None => Ok(()),
            Some(index) => {
                let given = format!("sequence {index} has {} keys", lengths[index]);
                Err(bad_value(name, given, format!("at most the {limit} of block_table's pages")))
            }
        }
    }

    /// The entries that sequences of these lengths reach, which must be pages; there must be room for them.
    pub(crate) fn used(
        &self,
        name: &str,
        lengths: &[usize],
        pages: usize,
        page_size: usize,
    ) -> PyResult<Pages> {
        let mut used = vec![0; self.entries.len()];
        for (sequence, &length) in lengths.iter().enumerate() {
            for column in 0..length.div_ceil(page_size.max(1)).min(self.width) {
                let index = sequence * self.width + column;
                let given = self.entries[index];
                let page = u32::try_from(given).ok().filter(|&page| (page as usize) < pages);
                let Some(page) = page else {
                    let name = if self.width == 1 && name == "cache_batch_idx" {
                        format!("{name}[{sequence}]")
                    } else {
                        format!("{name}[{sequence}, {column}]")
                    };
                    return Err(bad_value(&name, given.to_string(), format!("at least 0 and below {pages}")));
                };
                used[index] = page;
            }
        }
        Ok(Pages { pages: used, sequences: self.sequences, width: self.width })
    }
}

impl Pages {
    /// Of each sequence.
    pub(crate) fn rows(&self) -> Vec<&[u32]> {
        (0..self.sequences).map(|sequence| &self.pages[sequence * self.width..][..self.width]).collect()
    }
}
