//! Views of memory as (batch, heads, length, dim) with any strides on the outer three axes.
//!
//! A layout is nothing but strides: BHSD and BSHD, a slice of a packed QKV projection, a cache with spare capacity and
//! a broadcast batch (stride 0) are all read in place. Only the last axis, the head dimension, must be contiguous.
//! Views are checked when they are made; the kernels then trust them.

use core::marker::PhantomData;

use crate::TensorError;

/// Sizes, and strides in values, of one view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) shape: [usize; 4],
    /// Of batch, heads and length; the head dim's is 1.
    pub(crate) strides: [isize; 3],
}

impl Geometry {
    /// Row-major strides of a contiguous BHSD tensor.
    fn contiguous(shape: [usize; 4]) -> Result<Self, TensorError> {
        let too_large = TensorError::TooLarge { shape };
        let row = shape[3];
        let head = row.checked_mul(shape[2]).ok_or(too_large.clone())?;
        let batch = head.checked_mul(shape[1]).ok_or(too_large.clone())?;
        let all = batch.checked_mul(shape[0]).ok_or(too_large.clone())?;
        if isize::try_from(all.saturating_mul(size_of::<f64>())).is_err() {
            return Err(too_large);
        }
        Ok(Self { shape, strides: [batch as isize, head as isize, row as isize] })
    }

    fn strided(shape: [usize; 4], strides: [isize; 4]) -> Result<Self, TensorError> {
        if strides[3] != 1 && shape[3] > 1 {
            return Err(TensorError::LastAxisNotContiguous { stride: strides[3] });
        }
        let geometry = Self { shape, strides: [strides[0], strides[1], strides[2]] };
        extent(shape, strides).ok_or(TensorError::TooLarge { shape })?;
        Ok(geometry)
    }

    /// Checks a view whose last axis may have any stride too, against a buffer (offset, length) if there is one.
    fn check_any(
        shape: [usize; 4],
        strides: [isize; 4],
        buffer: Option<(usize, usize)>,
    ) -> Result<(), TensorError> {
        let too_large = TensorError::TooLarge { shape };
        let (low, high) = extent(shape, strides).ok_or(too_large)?;
        match buffer {
            Some((offset, buffer)) => check_inside(shape, strides, (low, high), (offset, buffer)),
            None => Ok(()),
        }
    }

    fn all_strides(&self) -> [isize; 4] {
        [self.strides[0], self.strides[1], self.strides[2], 1]
    }

    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Where all elements lie in a buffer of `buffer` values with element (0, 0, 0, 0) at `offset`, or the refusal.
    fn check_bounds(&self, offset: usize, buffer: usize) -> Result<(), TensorError> {
        Self::check_any(self.shape, self.all_strides(), Some((offset, buffer)))
    }

    /// Refuses strides with which two elements share an address.
    ///
    /// Sorted by stride, each axis must step over all that the smaller ones reach: sufficient, and true of every
    /// layout that slicing and permuting a contiguous buffer can make.
    fn check_disjoint(&self) -> Result<(), TensorError> {
        if self.is_empty() {
            return Ok(());
        }
        let mut axes: Vec<(usize, usize)> = self
            .shape
            .into_iter()
            .zip(self.all_strides())
            .filter(|&(size, _)| size > 1)
            .map(|(size, stride)| (stride.unsigned_abs(), size))
            .collect();
        axes.sort_unstable();
        let mut reach = 1usize;
        for (stride, size) in axes {
            if stride < reach {
                return Err(TensorError::Overlapping { shape: self.shape, strides: self.all_strides() });
            }
            // No overflow: `extent` has been computed for these numbers.
            reach += stride * (size - 1);
        }
        Ok(())
    }

    /// Offset of the first value of a row.
    pub(crate) fn row(&self, batch: usize, head: usize, position: usize) -> isize {
        debug_assert!(batch < self.shape[0] && head < self.shape[1] && position < self.shape[2]);
        let [b, h, s] = self.strides;
        batch as isize * b + head as isize * h + position as isize * s
    }
}

/// The lowest and highest offset of an element from element (0, 0, 0, 0); (0, -1) when empty. None on overflow.
fn extent(shape: [usize; 4], strides: [isize; 4]) -> Option<(isize, isize)> {
    if shape.contains(&0) {
        return Some((0, -1));
    }
    let (mut low, mut high) = (0isize, 0isize);
    for (size, stride) in shape.into_iter().zip(strides) {
        let reach = isize::try_from(size - 1).ok()?.checked_mul(stride)?;
        if reach < 0 {
            low = low.checked_add(reach)?;
        } else {
            high = high.checked_add(reach)?;
        }
    }
    // Distances in bytes must fit as well, and the number of elements with them.
    high.checked_sub(low)?.checked_add(1)?.checked_mul(size_of::<f64>() as isize)?;
    Some((low, high))
}

/// Refuses a view of which an element lies outside its buffer: (lowest, highest) offset, (start, length) of the buffer.
fn check_inside(
    shape: [usize; 4],
    strides: [isize; 4],
    (low, high): (isize, isize),
    (offset, buffer): (usize, usize),
) -> Result<(), TensorError> {
    let inside = match isize::try_from(offset) {
        Ok(_) if high < low => offset <= buffer,
        Ok(start) => {
            start.checked_add(low).is_some_and(|first| first >= 0)
                && start.checked_add(high).is_some_and(|last| last.unsigned_abs() < buffer)
        }
        Err(_) => false,
    };
    if inside { Ok(()) } else { Err(TensorError::OutOfBounds { shape, strides, offset, buffer }) }
}

/// A borrowed tensor (batch, heads, length, dim) that is read.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a, T = f32> {
    ptr: *const T,
    geometry: Geometry,
    life: PhantomData<&'a [T]>,
}

// SAFETY: a TensorRef is a shared borrow of values, like &[T].
unsafe impl<T: Sync> Send for TensorRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for TensorRef<'_, T> {}

/// A borrowed tensor (batch, heads, length, dim) that is written: no two elements share their memory.
#[derive(Debug)]
pub struct TensorMut<'a, T = f32> {
    ptr: *mut T,
    geometry: Geometry,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a TensorMut is an exclusive borrow of values, like &mut [T].
unsafe impl<T: Send> Send for TensorMut<'_, T> {}
// SAFETY: as above; `&TensorMut` gives out no access to values by itself.
unsafe impl<T: Sync> Sync for TensorMut<'_, T> {}

impl<'a, T> TensorRef<'a, T> {
    /// A contiguous tensor: (batch, heads, length, dim), row-major, from the start of `data`.
    ///
    /// # Errors
    /// Where `data` is shorter than the shape needs.
    pub fn from_slice(data: &'a [T], shape: [usize; 4]) -> Result<Self, TensorError> {
        let geometry = Geometry::contiguous(shape)?;
        geometry.check_bounds(0, data.len())?;
        Ok(Self { ptr: data.as_ptr(), geometry, life: PhantomData })
    }

    /// A tensor with element (0, 0, 0, 0) at `offset` in `data` and the given strides, in values, of any sign; 0
    /// broadcasts.
    ///
    /// # Errors
    /// Where an element lies outside `data`, the last stride is not 1, or the numbers overflow.
    pub fn from_slice_strided(
        data: &'a [T],
        offset: usize,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self, TensorError> {
        let geometry = Geometry::strided(shape, strides)?;
        geometry.check_bounds(offset, data.len())?;
        Ok(Self { ptr: data.as_ptr().wrapping_add(offset), geometry, life: PhantomData })
    }

    /// A contiguous (batch, length, heads, dim) buffer, seen as (batch, heads, length, dim); `shape` is in the latter
    /// order.
    ///
    /// # Errors
    /// Where `data` is shorter than the shape needs.
    pub fn from_slice_bshd(data: &'a [T], shape: [usize; 4]) -> Result<Self, TensorError> {
        Self::from_slice_strided(data, 0, shape, bshd_strides(shape)?)
    }

    /// A tensor at a pointer.
    ///
    /// # Errors
    /// Where the last stride is not 1 or the numbers overflow.
    ///
    /// # Safety
    /// Every element must be valid for reads during `'a`, and not be written in that time.
    pub unsafe fn from_raw_parts(
        ptr: *const T,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self, TensorError> {
        let geometry = Geometry::strided(shape, strides)?;
        Ok(Self { ptr, geometry, life: PhantomData })
    }

    /// One row: the `dim` values of (batch, head, position).
    ///
    /// # Panics
    /// If an index is not below its size.
    #[must_use]
    pub fn row(&self, batch: usize, head: usize, position: usize) -> &'a [T] {
        let [batches, heads, length, dim] = self.geometry.shape;
        assert!(batch < batches && head < heads && position < length);
        if dim == 0 {
            return &[];
        }
        // SAFETY: the element exists, so its row of `dim` values lies in the borrowed memory.
        unsafe { core::slice::from_raw_parts(self.row_ptr(batch, head, position), dim) }
    }

    /// The address of a row, for the kernels.
    pub(crate) fn row_ptr(&self, batch: usize, head: usize, position: usize) -> *const T {
        self.ptr.wrapping_offset(self.geometry.row(batch, head, position))
    }

    /// Position `position` of all batches, as the positions of one batch: (1, heads, batch, dim).
    pub(crate) fn across_batches(&self, position: usize) -> Self {
        let Geometry { shape: [batch, heads, _, dim], strides: [batch_stride, head_stride, position_stride] } =
            self.geometry;
        let geometry = Geometry { shape: [1, heads, batch, dim], strides: [0, head_stride, batch_stride] };
        let ptr = self.ptr.wrapping_offset(position as isize * position_stride);
        Self { ptr, geometry, life: PhantomData }
    }
}

impl<'a, T> TensorMut<'a, T> {
    /// A contiguous tensor: (batch, heads, length, dim), row-major, from the start of `data`.
    ///
    /// # Errors
    /// Where `data` is shorter than the shape needs.
    pub fn from_slice(data: &'a mut [T], shape: [usize; 4]) -> Result<Self, TensorError> {
        let geometry = TensorRef::from_slice(data, shape)?.geometry;
        Ok(Self { ptr: data.as_mut_ptr(), geometry, life: PhantomData })
    }

    /// A tensor with element (0, 0, 0, 0) at `offset` in `data` and the given strides in values, of any sign.
    ///
    /// # Errors
    /// Where an element lies outside `data`, two elements overlap, the last stride is not 1, or the numbers overflow.
    pub fn from_slice_strided(
        data: &'a mut [T],
        offset: usize,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self, TensorError> {
        let geometry = TensorRef::from_slice_strided(data, offset, shape, strides)?.geometry;
        geometry.check_disjoint()?;
        Ok(Self { ptr: data.as_mut_ptr().wrapping_add(offset), geometry, life: PhantomData })
    }

    /// A contiguous (batch, length, heads, dim) buffer, seen as (batch, heads, length, dim); `shape` is in the latter
    /// order.
    ///
    /// # Errors
    /// Where `data` is shorter than the shape needs.
    pub fn from_slice_bshd(data: &'a mut [T], shape: [usize; 4]) -> Result<Self, TensorError> {
        Self::from_slice_strided(data, 0, shape, bshd_strides(shape)?)
    }

    /// A tensor at a pointer.
    ///
    /// # Errors
    /// Where two elements overlap, the last stride is not 1 or the numbers overflow.
    ///
    /// # Safety
    /// Every element must be valid for writes during `'a`, and nothing else may access it in that time.
    pub unsafe fn from_raw_parts(
        ptr: *mut T,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self, TensorError> {
        let geometry = Geometry::strided(shape, strides)?;
        geometry.check_disjoint()?;
        Ok(Self { ptr, geometry, life: PhantomData })
    }

    /// The same memory, read.
    #[must_use]
    pub fn as_ref(&self) -> TensorRef<'_, T> {
        TensorRef { ptr: self.ptr, geometry: self.geometry, life: PhantomData }
    }

    /// The same memory for a shorter time.
    #[must_use]
    pub fn reborrow(&mut self) -> TensorMut<'_, T> {
        TensorMut { ptr: self.ptr, geometry: self.geometry, life: PhantomData }
    }

    /// The address of a row, for the kernels: each row is written by one task only.
    pub(crate) fn row_ptr(&self, batch: usize, head: usize, position: usize) -> *mut T {
        self.ptr.wrapping_offset(self.geometry.row(batch, head, position))
    }
}

/// What both views can be asked.
macro_rules! geometry_of {
    ($View:ident) => {
        impl<T> $View<'_, T> {
            /// Sizes: (batch, heads, length, dim).
            #[must_use]
            pub fn shape(&self) -> [usize; 4] {
                self.geometry.shape
            }

            /// Strides in values, the last always 1.
            #[must_use]
            pub fn strides(&self) -> [isize; 4] {
                self.geometry.all_strides()
            }

            /// Values from one position to the next.
            pub(crate) fn position_stride(&self) -> isize {
                self.geometry.strides[2]
            }

            /// Where a row begins, bytes from one position to the next, and bytes of a row.
            #[inline(always)]
            pub(crate) fn row_memory(
                &self,
                batch: usize,
                head: usize,
                position: usize,
            ) -> (*const u8, isize, usize) {
                let size = size_of::<T>();
                let stride = self.position_stride() * size as isize;
                (self.row_ptr(batch, head, position) as *const u8, stride, size * self.geometry.shape[3])
            }
        }
    };
}
geometry_of!(TensorRef);
geometry_of!(TensorMut);

/// Strides of a (batch, heads, length, dim) view of a contiguous (batch, length, heads, dim) buffer.
fn bshd_strides(shape: [usize; 4]) -> Result<[isize; 4], TensorError> {
    let [batch, heads, length, dim] = shape;
    // The same products in another order: if these fit, so do those.
    let g = Geometry::contiguous([batch, length, heads, dim])?;
    Ok([g.strides[0], g.strides[2], g.strides[1], 1])
}

/// Whether `count` values could be allocated now: asked before `vec!`, which would abort the process, and which has zeros
/// cheaper than a vector that is filled.
pub(crate) fn has_room<T>(count: usize) -> bool {
    Vec::<T>::new().try_reserve_exact(count).is_ok()
}

/// An owned contiguous tensor (batch, heads, length, dim).
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<T = f32> {
    data: Vec<T>,
    shape: [usize; 4],
}

impl Tensor<f32> {
    /// All zeros. (Of f32; [`Tensor::filled`] makes the other types.)
    ///
    /// # Errors
    /// Where the shape does not fit the address space.
    pub fn zeros(shape: [usize; 4]) -> Result<Self, TensorError> {
        Self::filled(shape, 0.0)
    }
}

impl<T: Copy + Default> Tensor<T> {
    /// All `value`.
    ///
    /// # Errors
    /// Where the shape does not fit the address space, or the memory is not to be had.
    pub fn filled(shape: [usize; 4], value: T) -> Result<Self, TensorError> {
        Geometry::contiguous(shape)?;
        if !has_room::<T>(shape.iter().product()) {
            return Err(TensorError::TooLarge { shape });
        }
        Ok(Self { data: vec![value; shape.iter().product()], shape })
    }

    /// Made by calling `f` for each element in row-major order with its index (batch, head, position, dim).
    ///
    /// # Errors
    /// Where the shape does not fit the address space.
    pub fn from_fn(shape: [usize; 4], mut f: impl FnMut([usize; 4]) -> T) -> Result<Self, TensorError> {
        let mut tensor = Self::filled(shape, T::default())?;
        let [_, heads, length, dim] = shape;
        for (i, value) in tensor.data.iter_mut().enumerate() {
            let (row, d) = (i / dim, i % dim);
            let (head, position) = (row / length, row % length);
            *value = f([head / heads, head % heads, position, d]);
        }
        Ok(tensor)
    }
}

impl<T> Tensor<T> {
    /// Takes values in row-major order.
    ///
    /// # Errors
    /// Where their number is not that of the shape.
    pub fn from_vec(data: Vec<T>, shape: [usize; 4]) -> Result<Self, TensorError> {
        let geometry = Geometry::contiguous(shape)?;
        if data.len() != shape.iter().product::<usize>() {
            return Err(TensorError::OutOfBounds {
                shape,
                strides: geometry.all_strides(),
                offset: 0,
                buffer: data.len(),
            });
        }
        Ok(Self { data, shape })
    }

    /// Sizes: (batch, heads, length, dim).
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The values, row-major.
    #[must_use]
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The values, row-major.
    #[must_use]
    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// The values, row-major, taken out.
    #[must_use]
    pub fn into_vec(self) -> Vec<T> {
        self.data
    }

    /// A view of all of it.
    #[must_use]
    pub fn view(&self) -> TensorRef<'_, T> {
        TensorRef { ptr: self.data.as_ptr(), geometry: self.geometry(), life: PhantomData }
    }

    /// A view of all of it, to be written.
    #[must_use]
    pub fn view_mut(&mut self) -> TensorMut<'_, T> {
        let geometry = self.geometry();
        TensorMut { ptr: self.data.as_mut_ptr(), geometry, life: PhantomData }
    }

    fn geometry(&self) -> Geometry {
        let [_, h, s, d] = self.shape;
        // No overflow: the constructors have computed these products.
        Geometry { shape: self.shape, strides: [(h * s * d) as isize, (s * d) as isize, d as isize] }
    }
}

/// How 16-bit values are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HalfKind {
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
}

/// A borrowed (batch, heads, query length, key length) array for masks and biases: each size may be 1, which stands for
/// all, and every stride is free, the last too.
#[derive(Clone, Copy, Debug)]
pub struct Broadcast<'a, T> {
    ptr: *const T,
    shape: [usize; 4],
    strides: [isize; 4],
    life: PhantomData<&'a [T]>,
}

// SAFETY: a Broadcast is a shared borrow of values, like &[T].
unsafe impl<T: Sync> Send for Broadcast<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Broadcast<'_, T> {}

impl<'a, T> Broadcast<'a, T> {
    /// A contiguous array.
    ///
    /// # Errors
    /// Where `data` is shorter than the shape needs.
    pub fn from_slice(data: &'a [T], shape: [usize; 4]) -> Result<Self, TensorError> {
        let geometry = Geometry::contiguous(shape)?;
        geometry.check_bounds(0, data.len())?;
        Ok(Self { ptr: data.as_ptr(), shape, strides: geometry.all_strides(), life: PhantomData })
    }

    /// An array with element (0, 0, 0, 0) at `offset` in `data` and any strides, in values.
    ///
    /// # Errors
    /// Where an element lies outside `data` or the numbers overflow.
    pub fn from_slice_strided(
        data: &'a [T],
        offset: usize,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self, TensorError> {
        Geometry::check_any(shape, strides, Some((offset, data.len())))?;
        Ok(Self { ptr: data.as_ptr().wrapping_add(offset), shape, strides, life: PhantomData })
    }

    /// An array at a pointer.
    ///
    /// # Errors
    /// Where the numbers overflow.
    ///
    /// # Safety
    /// Every element must be valid for reads during `'a`, and not be written in that time. The booleans of a mask may be any bytes
    /// for a computation, to which all but 0 are true; for [`Self::get`] they must be 0 or 1.
    pub unsafe fn from_raw_parts(
        ptr: *const T,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self, TensorError> {
        Geometry::check_any(shape, strides, None)?;
        Ok(Self { ptr, shape, strides, life: PhantomData })
    }

    /// Sizes.
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Whether each size is 1 or that of `full`.
    pub(crate) fn fits(&self, full: [usize; 4]) -> bool {
        self.shape.into_iter().zip(full).all(|(size, full)| size == full || size == 1)
    }

    /// Strides with 0 for the sizes that stand for all; `fits` must hold.
    pub(crate) fn expanded(&self) -> [isize; 4] {
        core::array::from_fn(|axis| if self.shape[axis] == 1 { 0 } else { self.strides[axis] })
    }

    /// The address of an element of the expanded array.
    pub(crate) fn at(&self, index: [usize; 4]) -> *const T {
        let strides = self.expanded();
        let offset = index.into_iter().zip(strides).map(|(i, stride)| i as isize * stride).sum();
        self.ptr.wrapping_offset(offset)
    }

    /// An element of the expanded array, for references and tests.
    ///
    /// # Panics
    /// If an index is not below its size, sizes of 1 excepted.
    #[must_use]
    pub fn get(&self, index: [usize; 4]) -> T
    where
        T: Copy,
    {
        for (i, size) in index.into_iter().zip(self.shape) {
            assert!(size == 1 || i < size, "index {index:?} outside {:?}", self.shape);
        }
        // SAFETY: the element exists.
        unsafe { *self.at(index) }
    }
}

impl<'a, T> From<TensorRef<'a, T>> for Broadcast<'a, T> {
    fn from(tensor: TensorRef<'a, T>) -> Self {
        Self { ptr: tensor.ptr, shape: tensor.shape(), strides: tensor.strides(), life: PhantomData }
    }
}
