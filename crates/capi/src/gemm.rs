//! Matrix products: C = activation(alpha A B + beta C + bias).

use qkv::gemm::{Activation, GemmSpec, PackedRhs, gemm, gemm_batched, gemm_packed};

use crate::handles::Handles;
use crate::lists::{flag, qkv_floats};
use crate::region::{Region, check_apart, wrong_dtype};
use crate::status::{Failure, guard, qkv_status, qkv_status::*};
use crate::threads;
use crate::types::*;
use crate::versioned::{Versioned, versioned};
use crate::views::{copy, matrices, matrices_mut, matrix_mut};

/// What is computed beside A B. All zeros with struct_size set, which qkv_gemm_options_init() makes, is C = A B.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_gemm_options {
    /// sizeof(qkv_gemm_options).
    pub struct_size: usize,
    /// If given: one value per column, added before the activation.
    pub bias: qkv_floats,
    /// Factor of the product, where has_alpha is 1; else it is 1.
    pub alpha: f32,
    /// Factor of what is in C; with 0 it is not read.
    pub beta: f32,
    /// 0 or 1: whether alpha is given.
    pub has_alpha: u32,
    /// A function of every result.
    pub activation: qkv_activation,
}

// SAFETY: repr(C), its size first, all numbers and raw addresses.
unsafe impl Versioned for qkv_gemm_options {
    const NAME: &'static str = "options";
}

/// A right-hand side packed ahead: weights that are multiplied many times.
#[derive(Debug)]
pub struct qkv_packed_matrix {
    // Handles are numbers; nothing is ever behind one.
    _opaque: [u8; 0],
}

static PACKED: Handles<PackedRhs> = Handles::new("packed");

/// Options, looked at.
struct Asked {
    bias: Option<Vec<f32>>,
    alpha: f32,
    beta: f32,
    activation: Option<Activation>,
}

impl Asked {
    /// # Safety
    /// `from` must be NULL, or options whose bias is NULL or readable.
    unsafe fn read(from: *const qkv_gemm_options, columns: usize) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let given = unsafe { versioned(from, true) }?;
        let activation = match given.activation {
            QKV_ACTIVATION_NONE => None,
            QKV_ACTIVATION_GELU => Some(Activation::Gelu),
            QKV_ACTIVATION_GELU_TANH => Some(Activation::GeluTanh),
            QKV_ACTIVATION_RELU => Some(Activation::Relu),
            QKV_ACTIVATION_SILU => Some(Activation::Silu),
            other => {
                let what = format!("activation: {other}, expected a QKV_ACTIVATION_ number");
                return Err(Failure::new(QKV_ERROR_VALUE, what));
            }
        };
        let has_alpha = flag("has_alpha", given.has_alpha)?;
        if !has_alpha && given.alpha != 0.0 {
            return Err(Failure::new(QKV_ERROR_VALUE, "alpha: given, expected 0 without has_alpha"));
        }
        // SAFETY: the caller's promise.
        let bias = unsafe { given.bias.copied("bias", &[columns]) }?;
        Ok(Self { bias, alpha: if has_alpha { given.alpha } else { 1.0 }, beta: given.beta, activation })
    }

    fn spec(&self) -> GemmSpec<'_> {
        let Self { alpha, beta, activation, .. } = *self;
        GemmSpec { alpha, beta, bias: self.bias.as_deref(), activation, ..GemmSpec::default() }
    }
}

/// A matrix or a batch of them, of f32.
///
/// # Safety
/// `from` must be NULL, misaligned or valid for a read.
unsafe fn read(argument: &'static str, from: *const qkv_tensor) -> Result<Region, Failure> {
    // SAFETY: the caller's promise.
    let tensor = unsafe { copy(argument, from) }?;
    if tensor.dtype != QKV_DTYPE_F32 {
        return Err(wrong_dtype(argument, tensor.dtype, "f32"));
    }
    Region::of(argument, &tensor)
}

/// # Safety
/// As [`read`].
unsafe fn read_mut(from: *const qkv_tensor_mut) -> Result<Region, Failure> {
    // SAFETY: the caller's promise.
    let region = Region::of_mut("c", &unsafe { copy("c", from) }?)?;
    if region.dtype != QKV_DTYPE_F32 {
        return Err(wrong_dtype("c", region.dtype, "f32"));
    }
    region.check_disjoint()?;
    Ok(region)
}

/// Whether it is one matrix.
fn is_single(region: &Region) -> bool {
    region.shape[..2] == [1, 1]
}

/// C = activation(alpha A B + beta C + bias), for every matrix of a batch; all of f32, any strides on all axes.
///
/// Axes 2 and 3 are rows and columns: a is (.., m, k), b (.., k, n), c (.., m, n). Axes 0 and 1 count the batch: those of a
/// and b are those of c, or 1, which repeats. options may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_gemm(
    a: *const qkv_tensor,
    b: *const qkv_tensor,
    c: *const qkv_tensor_mut,
    options: *const qkv_gemm_options,
) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise, see the header's text. Sizes, strides and overlaps have been looked at when the
        // views are made.
        unsafe {
            let (a, b, c) = (read("a", a)?, read("b", b)?, read_mut(c)?);
            let asked = Asked::read(options, c.shape[3])?;
            check_apart(&[c], &[a, b])?;
            let (first_a, batch_a) = matrices(&a)?;
            let (first_b, batch_b) = matrices(&b)?;
            let spec = asked.spec();
            if [&a, &b, &c].into_iter().all(is_single) {
                let mut c = matrix_mut(&c);
                return Ok(threads::run(|| gemm(first_a, first_b, &mut c, &spec))?);
            }
            let mut c = matrices_mut(&c)?;
            Ok(threads::run(|| gemm_batched(batch_a, batch_b, &mut c, &spec))?)
        }
    })
}

/// Packs b, one matrix (1, 1, k, n) of f32, for many products with it. Its values are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_packed_matrix_create(
    b: *const qkv_tensor,
    packed: *mut *mut qkv_packed_matrix,
) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            PACKED.give(packed, || {
                let b = read("b", b)?;
                check_single(&b)?;
                let (b, _) = matrices(&b)?;
                Ok(threads::run(|| PackedRhs::new(b))?)
            })
        }
    })
}

fn check_single(region: &Region) -> Result<(), Failure> {
    if is_single(region) {
        return Ok(());
    }
    let Region { argument, shape, .. } = region;
    let what = format!("{argument}: shape {shape:?}, expected one matrix, (1, 1, rows, columns)");
    Err(Failure::new(QKV_ERROR_SHAPE, what))
}

/// Ends a packed matrix; NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_packed_matrix_destroy(packed: *mut qkv_packed_matrix) -> qkv_status {
    guard(|| PACKED.end(packed))
}

/// As qkv_gemm for one matrix a (1, 1, m, k) and c (1, 1, m, n), with B packed ahead.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_gemm_packed(
    a: *const qkv_tensor,
    packed: *const qkv_packed_matrix,
    c: *const qkv_tensor_mut,
    options: *const qkv_gemm_options,
) -> qkv_status {
    guard(|| {
        let packed = PACKED.get(packed)?;
        // SAFETY: as in qkv_gemm.
        unsafe {
            let (a, c) = (read("a", a)?, read_mut(c)?);
            check_single(&a)?;
            check_single(&c)?;
            let asked = Asked::read(options, c.shape[3])?;
            check_apart(&[c], &[a])?;
            let (a, _) = matrices(&a)?;
            let (mut c, spec) = (matrix_mut(&c), asked.spec());
            Ok(threads::run(|| gemm_packed(a, &packed, &mut c, &spec))?)
        }
    })
}
