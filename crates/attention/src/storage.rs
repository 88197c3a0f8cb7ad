//! Storage types: what queries, keys, values and outputs may consist of. Everything is computed in f32.
//!
//! | type | one value | queries | keys, values | outputs |
//! | --- | --- | --- | --- | --- |
//! | f32, f16, bf16 | itself, widened exactly | yes | yes | yes, rounded once |
//! | 8-bit integers | `scale (q - zero)`, in f32 | yes | yes | no |
//!
//! The scales of 8-bit values lie beside them, (batch, heads, length, groups): one per token and head, or one for each
//! of several equal groups of dims; groups of 32 make the values of llama.cpp's `q8_0`.
//!
//! Widening happens once per block of keys, for all query heads of the group: into scratch, or in registers where there are few
//! query rows; f32 is read in place.

use half::{bf16, f16};
use qkv_simd::Simd;

use crate::row_runs::RowKind;
use crate::{TensorError, TensorMut, TensorRef};

/// A borrowed tensor (batch, heads, length, dim) of any storage type.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Data<'a> {
    /// 32 bits.
    F32(TensorRef<'a, f32>),
    /// IEEE binary16.
    F16(TensorRef<'a, f16>),
    /// bfloat16.
    Bf16(TensorRef<'a, bf16>),
    /// 8-bit integers with scales.
    Int8(Int8Ref<'a>),
}

/// 8-bit values (batch, heads, length, dim) that stand for `scale (q - zero)`.
#[derive(Clone, Copy, Debug)]
pub struct Int8Ref<'a> {
    values: TensorRef<'a, i8>,
    scales: TensorRef<'a, f32>,
    zeros: Option<TensorRef<'a, f32>>,
}

/// A borrowed tensor (batch, heads, length, dim) that is written.
#[derive(Debug)]
#[non_exhaustive]
pub enum DataMut<'a> {
    /// 32 bits.
    F32(TensorMut<'a, f32>),
    /// IEEE binary16, rounded to the nearest, ties to even.
    F16(TensorMut<'a, f16>),
    /// bfloat16, rounded to the nearest, ties to even.
    Bf16(TensorMut<'a, bf16>),
}

impl<'a> Int8Ref<'a> {
    /// Values with their scales, and zero points where they have any.
    ///
    /// `scales` and `zeros` are (batch, heads, length, groups), where the groups divide the dim: dim d belongs to group
    /// d / (dim / groups).
    ///
    /// # Errors
    /// Where the shapes do not fit each other.
    pub fn new(
        values: TensorRef<'a, i8>,
        scales: TensorRef<'a, f32>,
        zeros: Option<TensorRef<'a, f32>>,
    ) -> Result<Self, TensorError> {
        let dim = values.shape()[3];
        for beside in [Some(scales), zeros].into_iter().flatten() {
            let [.., groups] = beside.shape();
            let fits = beside.shape()[..3] == values.shape()[..3]
                && (dim == 0 || groups > 0 && dim.is_multiple_of(groups));
            if !fits || groups != scales.shape()[3] {
                return Err(TensorError::ScalesDoNotFit { scales: beside.shape(), values: values.shape() });
            }
        }
        Ok(Self { values, scales, zeros })
    }

    /// The integers.
    #[must_use]
    pub fn values(&self) -> TensorRef<'a, i8> {
        self.values
    }

    /// The scales.
    #[must_use]
    pub fn scales(&self) -> TensorRef<'a, f32> {
        self.scales
    }

    /// The zero points.
    #[must_use]
    pub fn zeros(&self) -> Option<TensorRef<'a, f32>> {
        self.zeros
    }
}

macro_rules! from {
    ($($View:ty => $Data:ident::$variant:ident;)*) => {
        $(impl<'a> From<$View> for $Data<'a> {
            fn from(tensor: $View) -> Self {
                $Data::$variant(tensor)
            }
        })*
    };
}

from! {
    TensorRef<'a, f32> => Data::F32;
    TensorRef<'a, f16> => Data::F16;
    TensorRef<'a, bf16> => Data::Bf16;
    Int8Ref<'a> => Data::Int8;
    TensorMut<'a, f32> => DataMut::F32;
    TensorMut<'a, f16> => DataMut::F16;
    TensorMut<'a, bf16> => DataMut::Bf16;
}

impl Data<'_> {
    /// Sizes: (batch, heads, length, dim).
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        match self {
            Data::F32(x) => x.shape(),
            Data::F16(x) => x.shape(),
            Data::Bf16(x) => x.shape(),
            Data::Int8(x) => x.values.shape(),
        }
    }

    /// Where a row begins, bytes from one position to the next, and bytes of a row without its scales.
    #[inline(always)]
    pub(crate) fn row_memory(&self, [batch, head, position]: [usize; 3]) -> (*const u8, isize, usize) {
        match self {
            Data::F32(x) => x.row_memory(batch, head, position),
            Data::F16(x) => x.row_memory(batch, head, position),
            Data::Bf16(x) => x.row_memory(batch, head, position),
            Data::Int8(x) => x.values.row_memory(batch, head, position),
        }
    }

    /// Position `position` of all batches, as the positions of one batch: (1, heads, batch, dim).
    pub(crate) fn across_batches(&self, position: usize) -> Self {
        match self {
            Data::F32(x) => Data::F32(x.across_batches(position)),
            Data::F16(x) => Data::F16(x.across_batches(position)),
            Data::Bf16(x) => Data::Bf16(x.across_batches(position)),
            Data::Int8(x) => Data::Int8(Int8Ref {
                values: x.values.across_batches(position),
                scales: x.scales.across_batches(position),
                zeros: x.zeros.map(|zeros| zeros.across_batches(position)),
            }),
        }
    }

    /// Bytes of one row, scales and zero points among them: what reading it costs.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        let [.., dim] = self.shape();
        match self {
            Data::F32(_) => 4 * dim,
            Data::F16(_) | Data::Bf16(_) => 2 * dim,
            Data::Int8(x) => dim + 4 * x.scales.shape()[3] * if x.zeros.is_some() { 2 } else { 1 },
        }
    }

    /// What rows consist of, where they can be widened in registers: not 8-bit values with zero points or several scales.
    pub(crate) fn row_kind(&self) -> Option<RowKind> {
        match self {
            Data::F32(_) => Some(RowKind::F32),
            Data::F16(_) => Some(RowKind::F16),
            Data::Bf16(_) => Some(RowKind::Bf16),
            Data::Int8(x) => (x.zeros.is_none() && x.scales.shape()[3] == 1).then_some(RowKind::Int8),
        }
    }

    /// "f32", "f16", "bf16" or "int8".
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Data::F32(_) => "f32",
            Data::F16(_) => "f16",
            Data::Bf16(_) => "bf16",
            Data::Int8(_) => "int8",
        }
    }

    /// The f32 tensor, where it is one.
    pub(crate) fn as_f32(&self) -> Option<&TensorRef<'_, f32>> {
        match self {
            Data::F32(x) => Some(x),
            _ => None,
        }
    }

    /// Widens `count` rows from (batch, head, position) on into `to`, [count][dim]; `asks_ahead`: and asks for those that follow.
    #[inline(always)]
    pub(crate) fn widen_rows<S: Simd>(
        &self,
        s: S,
        [batch, head, position]: [usize; 3],
        count: usize,
        to: &mut [f32],
        asks_ahead: bool,
    ) {
        let dim = self.shape()[3];
        debug_assert_eq!(to.len(), count * dim);
        match self {
            Data::F32(x) => widen(s, x, None, [batch, head, position], count, (to, asks_ahead)),
            Data::F16(x) => widen(s, x, None, [batch, head, position], count, (to, asks_ahead)),
            Data::Bf16(x) => widen(s, x, None, [batch, head, position], count, (to, asks_ahead)),
            Data::Int8(x) if x.zeros.is_none() && x.scales.shape()[3] == 1 => {
                widen(s, &x.values, Some(&x.scales), [batch, head, position], count, (to, asks_ahead));
            }
            Data::Int8(x) => {
                widen(s, &x.values, None, [batch, head, position], count, (to, asks_ahead));
                let groups = x.scales.shape()[3];
                for (i, row) in to.chunks_exact_mut(dim.max(1)).enumerate() {
                    let scales = x.scales.row(batch, head, position + i);
                    let zeros = x.zeros.map(|zeros| zeros.row(batch, head, position + i));
                    let size = dim / groups.max(1);
                    for group in 0..groups {
                        let zero = match zeros {
                            Some(zeros) => zeros[group],
                            None => 0.0,
                        };
                        scale(s, scales[group], zero, &mut row[group * size..][..size]);
                    }
                }
            }
        }
    }
}

/// A type that widens to f32.
pub(crate) trait Element: Copy {
    /// Whether rows of it have a scale.
    const SCALED: bool = false;
    /// Whether it is narrower than f32, so that a line of it is more work.
    const NARROW: bool = size_of::<Self>() < size_of::<f32>();
    /// `LANES` values from `p` on.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F32;
    /// `n` values from `p` on, at most `LANES`; the other lanes are 0.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(s: S, p: *const Self, n: usize) -> S::F32 {
        let mut lanes = [0.0; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: i < n.
            *lane = unsafe { *p.add(i) }.widened();
        }
        s.load(&lanes)
    }
    /// One value.
    fn widened(self) -> f32;
}

macro_rules! elements {
    ($($t:ty, $load:ident, |$x:ident| $widened:expr $(, { $($own:tt)* })?;)*) => {
        $(impl Element for $t {
            $($($own)*)?
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F32 {
                // SAFETY: the caller's promise; the half types are their bits.
                unsafe { s.$load(p.cast()) }
            }
            #[inline(always)]
            fn widened(self) -> f32 {
                let $x = self;
                $widened
            }
        })*
    };
}

elements! {
    f32, load_ptr, |x| x, {
        #[inline(always)]
        unsafe fn load_partial<S: Simd>(s: S, p: *const f32, n: usize) -> S::F32 {
            // SAFETY: the caller's promise.
            unsafe { s.load_partial(p, n) }
        }
    };
    f16, load_f16, |x| x.to_f32();
    bf16, load_bf16, |x| x.to_f32();
    i8, load_i8, |x| f32::from(x), { const SCALED: bool = true; };
}

/// Rows ahead of the one being widened that are asked for: about the time of a memory access.
const AHEAD: usize = 16;

/// Widens rows, a tight loop over their vectors; times a scale per row, where there are `scales`.
#[inline(always)]
fn widen<S: Simd, T: Element>(
    s: S,
    from: &TensorRef<'_, T>,
    scales: Option<&TensorRef<'_, f32>>,
    [batch, head, position]: [usize; 3],
    count: usize,
    (to, asks_ahead): (&mut [f32], bool),
) {
    let dim = from.shape()[3];
    if count == 0 || dim == 0 {
        return;
    }
    // The last row exists, and with it all before.
    debug_assert!(position + count <= from.shape()[2]);
    let (first, stride) = (from.row_ptr(batch, head, position), from.position_stride());
    let whole = dim / S::LANES * S::LANES;
    for (i, to) in to.chunks_exact_mut(dim).take(count).enumerate() {
        let row = first.wrapping_offset(i as isize * stride);
        if asks_ahead {
            let later = first.wrapping_offset((i + AHEAD) as isize * stride).cast::<u8>();
            for at in (0..dim * size_of::<T>()).step_by(64) {
                s.prefetch_l2(later.wrapping_add(at).cast());
            }
        }
        if let Some(scales) = scales {
            let scale = s.splat(scales.row(batch, head, position + i)[0]);
            for at in (0..whole).step_by(S::LANES) {
                // SAFETY: `LANES` values lie from `at` on in the row and in `to`.
                unsafe { s.store_ptr(s.mul(scale, T::load(s, row.add(at))), to.as_mut_ptr().add(at)) };
            }
            for (at, to) in to.iter_mut().enumerate().skip(whole) {
                // SAFETY: `at` is below the dim.
                *to = scales.row(batch, head, position + i)[0] * unsafe { *row.add(at) }.widened();
            }
            continue;
        }
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: as above.
            unsafe { s.store_ptr(T::load(s, row.add(at)), to.as_mut_ptr().add(at)) };
        }
        for (at, to) in to.iter_mut().enumerate().skip(whole) {
            // SAFETY: `at` is below the dim.
            *to = unsafe { *row.add(at) }.widened();
        }
    }
}

/// `scale (x - zero)` in place.
#[inline(always)]
fn scale<S: Simd>(s: S, scale: f32, zero: f32, values: &mut [f32]) {
    let mut chunks = values.chunks_exact_mut(S::LANES);
    for x in &mut chunks {
        s.store(s.mul(s.splat(scale), s.sub(s.load(x), s.splat(zero))), x);
    }
    for x in chunks.into_remainder() {
        *x = scale * (*x - zero);
    }
}

impl<'a> DataMut<'a> {
    /// Sizes: (batch, heads, length, dim).
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        match self {
            DataMut::F32(x) => x.shape(),
            DataMut::F16(x) => x.shape(),
            DataMut::Bf16(x) => x.shape(),
        }
    }

    /// The f32 tensor, where it is one.
    pub(crate) fn as_f32(&self) -> Option<&TensorMut<'a, f32>> {
        match self {
            DataMut::F32(x) => Some(x),
            _ => None,
        }
    }

    /// Where a row begins, bytes from one position to the next, and bytes of a row.
    #[inline(always)]
    pub(crate) fn row_memory(&self, [batch, head, position]: [usize; 3]) -> (*const u8, isize, usize) {
        match self {
            DataMut::F32(x) => x.row_memory(batch, head, position),
            DataMut::F16(x) => x.row_memory(batch, head, position),
            DataMut::Bf16(x) => x.row_memory(batch, head, position),
        }
    }

    /// Stores one row, rounded to the type.
    ///
    /// # Safety
    /// The row must exist, `from` have its length, and no other thread access the row.
    #[inline(always)]
    pub(crate) unsafe fn store_row(&self, [batch, head, position]: [usize; 3], from: &[f32]) {
        debug_assert_eq!(from.len(), self.shape()[3]);
        // SAFETY: the caller's promise, in all three.
        unsafe {
            match self {
                DataMut::F32(x) => {
                    x.row_ptr(batch, head, position).copy_from_nonoverlapping(from.as_ptr(), from.len())
                }
                DataMut::F16(x) => {
                    let to = x.row_ptr(batch, head, position);
                    for (i, &value) in from.iter().enumerate() {
                        to.add(i).write(f16::from_f32(value));
                    }
                }
                DataMut::Bf16(x) => {
                    let to = x.row_ptr(batch, head, position);
                    for (i, &value) in from.iter().enumerate() {
                        to.add(i).write(bf16::from_f32(value));
                    }
                }
            }
        }
    }
}

/// Keys and values of sequences that lie in pages of a pool.
///
/// Key j of sequence i is row `j % page_size` of page `tables[i][j / page_size]`; `keys` and `values` are (pages, heads, page
/// size, dim), with any strides, so that (pages, page size, heads, dim) is read in place as well.
#[derive(Clone, Copy, Debug)]
pub struct PagedRef<'a> {
    /// (pages, key/value heads, page size, key dim).
    pub keys: Data<'a>,
    /// (pages, key/value heads, page size, value dim).
    pub values: Data<'a>,
    /// The pages of each sequence, in order.
    pub tables: &'a [&'a [u32]],
    /// The number of keys of each sequence.
    pub lengths: &'a [usize],
}
