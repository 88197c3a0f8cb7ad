//! Rotary positions, and rows that are moved one by one: turned on the way or not, into a result or into a cache.
//!
//! The Rust API turns rows of f32; here a row of any type is widened, turned and rounded once.

use core::marker::PhantomData;

use half::{bf16, f16};
use pyo3::prelude::*;
use qkv::rotary::{Pairing, Rotary, RotaryError};
use qkv::{Data, TensorRef};

use crate::array::{Array, DType};
use crate::error::bad_value;
use crate::flash::{settled, tensor};
use crate::pool;

/// Turns the rows of `x` (batch, heads, length, dim) to their positions, into `out` of the same shape and type.
///
/// cos, sin
///     (positions, r / 2), float32, bfloat16 or float16: the first r dims of a row are turned.
/// positions
///     int64 (batch * length,): the table's row for each token; None: token i has row i.
/// interleaved
///     Whether pairs are dims (0, 1), (2, 3), ... and not (i, i + r / 2).
///
/// `qkv.onnx.rotary_embedding` is the public way in.
#[pyfunction]
pub(crate) fn rotate<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    cos: &Bound<'py, PyAny>,
    sin: &Bound<'py, PyAny>,
    positions: Option<&Bound<'py, PyAny>>,
    interleaved: bool,
    out: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let x = tensor("X", x, 4, "(batch, heads, length, dim)")?;
    let mut out = settled(Array::output("Y", out)?);
    out.expect_shape(&x.shape)?;
    out.expect_dtype(&[x.dtype])?;
    let [batch, heads, length, dim] = [x.shape[0], x.shape[1], x.shape[2], x.shape[3]];
    let positions = positions.map(|positions| Array::input("position_ids", positions)).transpose()?;
    let tokens = batch.saturating_mul(length);
    if let Some(positions) = &positions {
        positions.expect_dtype(&[DType::I64])?;
        positions.expect_shape(&[tokens])?;
    }
    let tables = Tables::read(["cos_cache", "sin_cache"], [cos, sin], dim, interleaved)?;
    let from = x.data()?;
    let mut to = Rows::new(&mut out)?;
    // Some tokens at a time: what is copied for them is small, however many there are.
    let step = (MOST_VALUES / tables.pairs()).clamp(1, MOST_TOKENS);
    // Where there are no heads or dims there may be tokens without end, and nothing to move.
    let tokens = if heads == 0 || dim == 0 { 0 } else { tokens };
    for first in (0..tokens).step_by(step) {
        let chunk = first..tokens.min(first + step);
        let positions = match &positions {
            Some(positions) => positions.counts_of(chunk.clone())?,
            None => chunk.clone().collect(),
        };
        if let Some(position) = positions.iter().find(|&&position| position >= tables.max_length()) {
            let expected = format!("a row of the {} in the table", tables.max_length());
            return Err(bad_value("position_ids", position.to_string(), expected));
        }
        let rows = distinct(positions.clone());
        let table = tables.rows(&rows)?;
        let place = |token: usize| [token / length, token % length];
        let moves: Vec<Move> = chunk
            .zip(positions)
            .map(|(token, position)| Move {
                from: place(token),
                to: place(token),
                position: row_of(&rows, position),
            })
            .collect();
        let work = moves.len() as f64 * heads as f64 * dim as f64 * 4.0;
        pool::run(py, work, || move_rows(&from, &mut to, &moves, Some(&table)))?
            .map_err(|error| refused("position_ids", &error))?;
    }
    Ok(())
}

/// The most values of each table, and the most tokens, that [`rotate`] copies at a time.
const MOST_VALUES: usize = 1 << 18;
const MOST_TOKENS: usize = 1 << 14;

/// Tables of cosines and sines as they were given. Only the rows that are used are read: a table is as long as the longest
/// sequence could be.
#[derive(Debug)]
pub(crate) struct Tables<'py> {
    cos: Array<'py>,
    sin: Array<'py>,
    head_dim: usize,
    pairing: Pairing,
}

impl<'py> Tables<'py> {
    /// Those that turn rows of `head_dim`.
    pub(crate) fn read(
        names: [&'static str; 2],
        [cos, sin]: [&Bound<'py, PyAny>; 2],
        head_dim: usize,
        interleaved: bool,
    ) -> PyResult<Self> {
        let [cos, sin] = [Array::input(names[0], cos)?, Array::input(names[1], sin)?];
        cos.expect_rank(2, "(positions, r / 2)")?;
        sin.expect_shape(&cos.shape)?;
        let pairing = if interleaved { Pairing::Interleaved } else { Pairing::Halves };
        let tables = Self { cos, sin, head_dim, pairing };
        // Refuses types and sizes.
        tables.rows(&[])?;
        Ok(tables)
    }

    /// Positions that there are rows for.
    pub(crate) fn max_length(&self) -> usize {
        self.cos.shape[0]
    }

    /// Pairs of dims that are turned, at least 1.
    fn pairs(&self) -> usize {
        self.cos.shape[1]
    }

    /// A table of these rows alone, which are in the tables.
    pub(crate) fn rows(&self, rows: &[usize]) -> PyResult<Rotary> {
        let (cos, sin) = (self.cos.rows_widened(rows)?, self.sin.rows_widened(rows)?);
        Rotary::from_tables(cos, sin, self.pairs().saturating_mul(2), self.head_dim, self.pairing)
            .map_err(|error| refused(self.cos.name, &error))
    }
}

/// Positions in ascending order, each once.
pub(crate) fn distinct(mut positions: Vec<usize>) -> Vec<usize> {
    positions.sort_unstable();
    positions.dedup();
    positions
}

/// Where a position is among distinct ones.
pub(crate) fn row_of(distinct: &[usize], position: usize) -> usize {
    distinct.partition_point(|&row| row < position)
}

/// The exception for an error of the Rust API.
pub(crate) fn refused(name: &str, error: &RotaryError) -> PyErr {
    match *error {
        RotaryError::Position { given, max_length, .. } => {
            bad_value(name, given.to_string(), format!("a row of the {max_length} in the table"))
        }
        ref other => pyo3::exceptions::PyValueError::new_err(format!("{name}: {other}")),
    }
}

/// A token on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    /// (batch, index) that it comes from.
    pub(crate) from: [usize; 2],
    /// (batch or page, index) that it goes to.
    pub(crate) to: [usize; 2],
    /// Its position, where rows are turned.
    pub(crate) position: usize,
}

/// Rows (batch, heads, length, dim) that are written.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    data: *mut u8,
    shape: [usize; 4],
    /// In values.
    strides: [isize; 3],
    dtype: DType,
    life: PhantomData<&'a mut u8>,
}

// SAFETY: it is an exclusive borrow of values, like &mut [f32].
unsafe impl Send for Rows<'_> {}

impl<'a> Rows<'a> {
    /// Those of an output: an array that has come from [`Array::output`] or [`Array::new`].
    pub(crate) fn new(array: &'a mut Array<'_>) -> PyResult<Self> {
        // Refuses what cannot be written row by row: other types, other numbers of axes, rows that are not contiguous.
        array.data_mut()?;
        let size = |axis: usize| array.shape[axis];
        let stride = |axis: usize| array.strides[axis];
        Ok(Self {
            data: array.data,
            shape: [size(0), size(1), size(2), size(3)],
            strides: [stride(0), stride(1), stride(2)],
            dtype: array.dtype,
            life: PhantomData,
        })
    }

    /// One row.
    fn row<T: Value>(&mut self, batch: usize, head: usize, index: usize) -> &mut [T] {
        let [batches, heads, length, dim] = self.shape;
        assert!(batch < batches && head < heads && index < length && self.dtype == T::DTYPE);
        if dim == 0 {
            return &mut [];
        }
        let offset = batch as isize * self.strides[0]
            + head as isize * self.strides[1]
            + index as isize * self.strides[2];
        // SAFETY: the three indices are below their sizes, so that `dim` values of this type lie there, aligned, in memory that
        // is borrowed exclusively.
        unsafe { core::slice::from_raw_parts_mut(self.data.cast::<T>().wrapping_offset(offset), dim) }
    }
}

/// A type of values.
trait Value: Copy {
    const DTYPE: DType;
    fn widened(self) -> f32;
    fn rounded(value: f32) -> Self;
}

macro_rules! values {
    ($($t:ty, $dtype:ident, |$x:ident| $widened:expr, |$y:ident| $rounded:expr;)*) => {
        $(impl Value for $t {
            const DTYPE: DType = DType::$dtype;
            fn widened(self) -> f32 {
                let $x = self;
                $widened
            }
            fn rounded($y: f32) -> Self {
                $rounded
            }
        })*
    };
}

values! {
    f32, F32, |x| x, |y| y;
    f16, F16, |x| x.to_f32(), |y| f16::from_f32(y);
    bf16, Bf16, |x| x.to_f32(), |y| bf16::from_f32(y);
}

/// Moves the rows of all heads of these tokens; with a table they are turned to their positions.
///
/// # Errors
/// Where a position is not in the table; what came before it has been moved then.
///
/// # Panics
/// If a token is not in `from` or `to`, or these differ in their types, heads or dims.
pub(crate) fn move_rows(
    from: &Data<'_>,
    to: &mut Rows<'_>,
    moves: &[Move],
    table: Option<&Rotary>,
) -> Result<(), RotaryError> {
    match from {
        Data::F32(from) => move_values(from, to, moves, table),
        Data::F16(from) => move_values(from, to, moves, table),
        Data::Bf16(from) => move_values(from, to, moves, table),
        // Arrays of Python have no such values.
        _ => unreachable!("an array of {}", from.type_name()),
    }
}

fn move_values<T: Value>(
    from: &TensorRef<'_, T>,
    to: &mut Rows<'_>,
    moves: &[Move],
    table: Option<&Rotary>,
) -> Result<(), RotaryError> {
    let [_, heads, _, dim] = from.shape();
    let mut turned = vec![0.0f32; if table.is_some() { dim } else { 0 }];
    for &Move { from: [batch, index], to: [page, slot], position } in moves {
        for head in 0..heads {
            let from = from.row(batch, head, index);
            let to = to.row::<T>(page, head, slot);
            let Some(table) = table else {
                to.copy_from_slice(from);
                continue;
            };
            for (turned, from) in turned.iter_mut().zip(from) {
                *turned = from.widened();
            }
            table.rotate(&mut turned, position)?;
            for (to, turned) in to.iter_mut().zip(&turned) {
                *to = T::rounded(*turned);
            }
        }
    }
    Ok(())
}
