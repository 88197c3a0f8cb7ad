//! Rows of one storage type: conversion on the way in, copies, and views.
//!
//! 8-bit rows are quantised as they come, each group of dims on its own:
//!
//! - symmetric: scale = max |x| / 127, q = round(x / scale);
//! - with a zero point: min..=max onto -128..=127, so scale = (max - min) / 255 and zero = -128 - min /
//!   scale, which is not rounded, so that no part of the range is lost.
//!
//! Either way a value comes back as scale (q - zero), half a scale away at most. Where all values lie close
//! together far from 0, the zero point would have more digits than f32 and q would drown in it: the scale is
//! at least max |x| / 2^16.

use core::fmt;

use half::{bf16, f16};

use super::CacheError;
use super::pool::Pool;
use crate::{Data, Int8Ref, TensorError, TensorRef};

/// What a cache's keys and values consist of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Storage {
    /// 32 bits.
    #[default]
    F32,
    /// IEEE binary16, rounded to the nearest, ties to even; from 65520 on infinite.
    F16,
    /// bfloat16, rounded to the nearest, ties to even.
    Bf16,
    /// 8-bit integers with scales; NaN and infinity are refused.
    Int8 {
        /// Dims per scale, a divisor of the key and value dims; `None`: one scale per token and head. 32
        /// makes the values of llama.cpp's `q8_0`, with scales in f32.
        group: Option<usize>,
        /// Whether the range of a group may lie anywhere, instead of around 0: twice as fine where the values
        /// have one sign, for one more f32 per scale.
        zero_point: bool,
    },
}

impl Storage {
    /// Whether groups fit a dim.
    pub(super) fn check(self, of: &'static str, dim: usize) -> Result<(), CacheError> {
        match self {
            Storage::Int8 { group: Some(0), .. } => Err(CacheError::Zero { argument: "storage group" }),
            Storage::Int8 { group: Some(given), .. } if !dim.is_multiple_of(given) => {
                Err(CacheError::Group { given, of, dim })
            }
            _ => Ok(()),
        }
    }
}

/// Rows of one type.
#[derive(Clone)]
pub(super) struct Slab {
    values: Values,
    dim: usize,
    /// Scales per row.
    groups: usize,
}

#[derive(Clone)]
enum Values {
    F32(Pool<f32>),
    F16(Pool<f16>),
    Bf16(Pool<bf16>),
    Int8 { values: Pool<i8>, scales: Pool<f32>, zeros: Option<Pool<f32>> },
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab").field("dim", &self.dim).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl Slab {
    /// Zeros: (.., .., .., dim), row-major.
    pub(super) fn new(
        storage: Storage,
        argument: &'static str,
        shape: [usize; 4],
    ) -> Result<Self, CacheError> {
        let too_large = CacheError::TooLarge { argument, shape };
        let [a, b, c, dim] = shape;
        let groups = match storage {
            Storage::Int8 { group: Some(group), .. } => dim / group,
            _ => 1,
        };
        // As if no axis were 0: strides are made of these products whatever the sizes.
        let product =
            |sizes: &[usize]| sizes.iter().try_fold(1usize, |all, &size| all.checked_mul(size.max(1)));
        let most = product(&shape).ok_or(too_large.clone())?;
        let rows = a * b * c;
        // What views ask of offsets; then they cannot fail.
        if isize::try_from(most.saturating_mul(size_of::<f64>())).is_err() {
            return Err(too_large);
        }
        let values = (|| {
            Some(match storage {
                Storage::F32 => Values::F32(Pool::zeros(rows * dim)?),
                Storage::F16 => Values::F16(Pool::zeros(rows * dim)?),
                Storage::Bf16 => Values::Bf16(Pool::zeros(rows * dim)?),
                Storage::Int8 { zero_point, .. } => Values::Int8 {
                    values: Pool::zeros(rows * dim)?,
                    scales: Pool::zeros(rows * groups)?,
                    zeros: if zero_point { Some(Pool::zeros(rows * groups)?) } else { None },
                },
            })
        })();
        Ok(Self { values: values.ok_or(too_large)?, dim, groups })
    }

    /// Bytes of all rows with their scales and zero points.
    pub(super) fn bytes(&self) -> usize {
        match &self.values {
            Values::F32(values) => size_of_val::<[_]>(values),
            Values::F16(values) => size_of_val::<[_]>(values),
            Values::Bf16(values) => size_of_val::<[_]>(values),
            Values::Int8 { values, scales, zeros } => {
                let zeros = zeros.as_deref().unwrap_or_default();
                values.len() + size_of_val::<[_]>(scales) + size_of_val(zeros)
            }
        }
    }

    /// Converts and writes one row. 8-bit storage refuses a value that is not finite, and hands it back with
    /// the row as it was.
    pub(super) fn write_row(&mut self, row: usize, from: &[f32]) -> Result<(), f32> {
        debug_assert_eq!(from.len(), self.dim);
        let at = row * self.dim;
        match &mut self.values {
            Values::F32(to) => to[at..at + self.dim].copy_from_slice(from),
            Values::F16(to) => {
                to[at..at + self.dim].iter_mut().zip(from).for_each(|(to, &x)| *to = f16::from_f32(x))
            }
            Values::Bf16(to) => {
                to[at..at + self.dim].iter_mut().zip(from).for_each(|(to, &x)| *to = bf16::from_f32(x))
            }
            Values::Int8 { values, scales, zeros } => {
                if let Some(&given) = from.iter().find(|x| !x.is_finite()) {
                    return Err(given);
                }
                if from.is_empty() {
                    return Ok(());
                }
                let size = self.dim / self.groups;
                let values = values[at..at + self.dim].chunks_exact_mut(size);
                for (group, (to, from)) in values.zip(from.chunks_exact(size)).enumerate() {
                    let beside = row * self.groups + group;
                    match zeros {
                        None => scales[beside] = quantise(from, to),
                        Some(zeros) => (scales[beside], zeros[beside]) = quantise_range(from, to),
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies one row of a tensor that has the slab's own type; false, and nothing is done, where it has
    /// another.
    pub(super) fn copy_same(&mut self, row: usize, data: &Data<'_>, [b, h, p]: [usize; 3]) -> bool {
        let to = row * self.dim..(row + 1) * self.dim;
        match (&mut self.values, data) {
            (Values::F32(values), Data::F32(x)) => values[to].copy_from_slice(x.row(b, h, p)),
            (Values::F16(values), Data::F16(x)) => values[to].copy_from_slice(x.row(b, h, p)),
            (Values::Bf16(values), Data::Bf16(x)) => values[to].copy_from_slice(x.row(b, h, p)),
            _ => return false,
        }
        true
    }

    /// Moves rows within the slab; the two stretches may overlap.
    pub(super) fn copy_rows(&mut self, from: usize, to: usize, count: usize) {
        fn copy<T: Copy>(values: &mut [T], size: usize, [from, to, count]: [usize; 3]) {
            values.copy_within(from * size..(from + count) * size, to * size);
        }
        let (rows, dim) = ([from, to, count], self.dim);
        match &mut self.values {
            Values::F32(values) => copy(values, dim, rows),
            Values::F16(values) => copy(values, dim, rows),
            Values::Bf16(values) => copy(values, dim, rows),
            Values::Int8 { values, scales, zeros } => {
                copy(values, dim, rows);
                copy(scales, self.groups, rows);
                if let Some(zeros) = zeros {
                    copy(zeros, self.groups, rows);
                }
            }
        }
    }

    /// Takes rows from another slab of the same storage and dim.
    pub(super) fn take_rows(&mut self, other: &Slab, from: usize, to: usize, count: usize) {
        fn take<T: Copy>(values: &mut [T], other: &[T], size: usize, [from, to, count]: [usize; 3]) {
            values[to * size..(to + count) * size]
                .copy_from_slice(&other[from * size..(from + count) * size]);
        }
        let (rows, dim, groups) = ([from, to, count], self.dim, self.groups);
        match (&mut self.values, &other.values) {
            (Values::F32(values), Values::F32(other)) => take(values, other, dim, rows),
            (Values::F16(values), Values::F16(other)) => take(values, other, dim, rows),
            (Values::Bf16(values), Values::Bf16(other)) => take(values, other, dim, rows),
            (
                Values::Int8 { values, scales, zeros },
                Values::Int8 { values: values1, scales: scales1, zeros: zeros1 },
            ) => {
                take(values, values1, dim, rows);
                take(scales, scales1, groups, rows);
                if let (Some(zeros), Some(zeros1)) = (zeros, zeros1) {
                    take(zeros, zeros1, groups, rows);
                }
            }
            _ => unreachable!("slabs of one cache have one storage"),
        }
    }

    /// A view (.., .., .., dim) of the rows from the first on, with strides of the outer three axes in rows.
    ///
    /// # Panics
    /// If a row lies outside the slab.
    pub(super) fn data(&self, [a, b, c]: [usize; 3], strides: [usize; 3]) -> Data<'_> {
        fn view<T>(
            values: &[T],
            [a, b, c]: [usize; 3],
            strides: [usize; 3],
            size: usize,
        ) -> Result<TensorRef<'_, T>, TensorError> {
            let [a1, b1, c1] = strides.map(|rows| (rows * size) as isize);
            TensorRef::from_slice_strided(values, 0, [a, b, c, size], [a1, b1, c1, 1])
        }
        let (rows, dim, groups) = ([a, b, c], self.dim, self.groups);
        let data = match &self.values {
            Values::F32(values) => view(values, rows, strides, dim).map(Data::F32),
            Values::F16(values) => view(values, rows, strides, dim).map(Data::F16),
            Values::Bf16(values) => view(values, rows, strides, dim).map(Data::Bf16),
            Values::Int8 { values, scales, zeros } => (|| {
                let values = view(values, rows, strides, dim)?;
                let scales = view(scales, rows, strides, groups)?;
                let zeros = match zeros {
                    Some(zeros) => Some(view(zeros, rows, strides, groups)?),
                    None => None,
                };
                Int8Ref::new(values, scales, zeros).map(Data::Int8)
            })(),
        };
        data.expect("a view of rows that the slab has")
    }
}

/// Zeros, or None where the memory cannot be had.
pub(super) fn filled<T: Copy + Default>(count: usize) -> Option<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).ok()?;
    values.resize(count, T::default());
    Some(values)
}

/// Values beyond are quantised as this one: a little less than the largest, so that it does not come back as
/// infinity.
const LIMIT: f32 = f32::MAX * (1.0 - 1.0 / 1048576.0);

/// Symmetric: the scale. It is a normal number, so that quotients are too.
fn quantise(from: &[f32], to: &mut [i8]) -> f32 {
    let largest = from.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = (largest.min(LIMIT) / 127.0).max(f32::MIN_POSITIVE);
    for (to, x) in to.iter_mut().zip(from) {
        // Rounded to even by the addition: the sum has no digits below 1. A call of rint would not be vectorised.
        const ROUND: f32 = 12_582_912.0;
        *to = (x / scale + ROUND - ROUND) as i8;
    }
    scale
}

/// With a zero point: scale and zero. In f64, for the difference of large numbers and the sum of a small and
/// a large one.
fn quantise_range(from: &[f32], to: &mut [i8]) -> (f32, f32) {
    let (low, high) =
        from.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &x| (low.min(x), high.max(x)));
    let [low, high] = [low, high].map(|x| f64::from(x.clamp(-LIMIT, LIMIT)));
    let scale = ((high - low) / 255.0).max(low.abs().max(high.abs()) / 65536.0) as f32;
    let scale = scale.max(f32::MIN_POSITIVE);
    let zero = (-128.0 - low / f64::from(scale)) as f32;
    for (to, &x) in to.iter_mut().zip(from) {
        *to = (f64::from(x) / f64::from(scale) + f64::from(zero)).round_ties_even() as i8;
    }
    (scale, zero)
}
