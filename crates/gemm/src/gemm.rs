//! The doors: what a product is asked for, the checks, and the choice of the way.
//!
//! All of them compute
//!
//! ```text
//! C = activation(alpha * A B + beta * C + bias)        A: m x k, B: k x n, C: m x n, bias: n
//! ```
//!
//! in f32, each sum over k in one fixed order: the same bits come out from run to run and for any number of threads.
//! Arithmetic is IEEE's throughout: zeros are multiplied like any other number, so a NaN or an infinity in A or B shows
//! wherever it takes part, also where alpha is 0. Only beta = 0 means "do not read C". With k = 0 the product is 0 and C
//! is still scaled, biased and activated; m = 0 or n = 0 does nothing.

use qkv_simd::Isa;

use crate::driver::{Batch, Operand, Product, Weights};
use crate::epilogue::{Activation, BiasActivation, Epilogue};
use crate::matrix::{MatMut, MatRef};
use crate::packed::PackedRhs;
use crate::params::Blocking;
use crate::writeback::{Finish, Scale, Target};
use crate::{GemmError, driver, gemv};

/// What is computed beside A B, and how. `GemmSpec::default()` is C = A B.
#[derive(Clone, Copy, Debug)]
pub struct GemmSpec<'a> {
    /// Factor of the product; 1.
    pub alpha: f32,
    /// Factor of what is in C; 0, with which C is not read.
    pub beta: f32,
    /// One value per column, added before the activation.
    pub bias: Option<&'a [f32]>,
    /// A function of every result.
    pub activation: Option<Activation>,
    /// The instruction set; None takes the one that this process uses ([`Isa::active`]).
    pub isa: Option<Isa>,
    /// Block sizes instead of the planned ones, for experiments; the vector and few-row paths, which have no blocks, are
    /// then not taken. `kc` is not used with a [`PackedRhs`], which has its own.
    pub blocking: Option<Blocking>,
}

impl Default for GemmSpec<'_> {
    fn default() -> Self {
        Self { alpha: 1.0, beta: 0.0, bias: None, activation: None, isa: None, blocking: None }
    }
}

impl GemmSpec<'_> {
    /// The instruction set to use.
    pub(crate) fn isa(&self) -> Result<Isa, GemmError> {
        match self.isa {
            Some(isa) => Ok(isa),
            None => Ok(Isa::active()?),
        }
    }

    /// Checks what does not depend on the operands beyond the `n` columns of C.
    pub(crate) fn check(&self, n: usize) -> Result<(), GemmError> {
        if let Some(blocking) = &self.blocking {
            blocking.check()?;
        }
        match self.bias {
            Some(bias) if bias.len() != n => Err(GemmError::BiasLength { given: bias.len(), expected: n }),
            _ => Ok(()),
        }
    }

    pub(crate) fn epilogue(&self) -> BiasActivation<'_> {
        BiasActivation { bias: self.bias, per_row: false, activation: self.activation }
    }
}

/// C = activation(alpha A B + beta C + bias).
///
/// ```
/// use qkv_gemm::{Activation, GemmSpec, MatMut, MatRef, gemm};
/// let a = [1.0, 2.0, 3.0, 4.0];
/// let b = [1.0, 0.0, 0.0, -1.0];
/// let mut c = [f32::NAN; 4];
/// gemm(
///     MatRef::from_slice(&a, 2, 2)?,
///     MatRef::from_slice(&b, 2, 2)?,
///     &mut MatMut::from_slice(&mut c, 2, 2)?,
///     &GemmSpec { bias: Some(&[0.5, 3.0]), activation: Some(Activation::Relu), ..Default::default() },
/// )?;
/// assert_eq!(c, [1.5, 1.0, 3.5, 0.0]);
/// # Ok::<(), qkv_gemm::GemmError>(())
/// ```
///
/// # Errors
/// [`GemmError::Shape`] where `b` has not as many rows as `a` has columns or `c` is not rows of `a` x columns of `b`,
/// [`GemmError::BiasLength`], [`GemmError::Blocking`], [`GemmError::Isa`]. C is then untouched.
pub fn gemm(a: MatRef<'_>, b: MatRef<'_>, c: &mut MatMut<'_>, spec: &GemmSpec<'_>) -> Result<(), GemmError> {
    let isa = spec.isa()?;
    check_shapes(&a, (b.rows(), b.cols()), c)?;
    spec.check(c.cols())?;
    let mut epilogue = spec.epilogue();
    // A C whose columns are contiguous is computed as its transpose, C^T = B^T A^T, so that results leave in vectors.
    let flip = c.col_stride() != 1 && c.row_stride() == 1 && c.cols() > 1;
    if flip {
        epilogue.per_row = true;
        let mut c = c.reborrow().t();
        single(isa, b.t(), Weights::View(Operand::new(&a.t())), a.rows(), &mut c, spec, &epilogue);
    } else {
        single(isa, a, Weights::View(Operand::new(&b)), b.cols(), c, spec, &epilogue);
    }
    Ok(())
}

/// As [`gemm`], with an epilogue of the caller's own at the end.
///
/// It sees `alpha A B + beta C` (plus the bias and through the activation of `spec`, where it has them).
///
/// # Errors
/// As [`gemm`].
pub fn gemm_with_epilogue<E: Epilogue>(
    a: MatRef<'_>,
    b: MatRef<'_>,
    c: &mut MatMut<'_>,
    spec: &GemmSpec<'_>,
    epilogue: &E,
) -> Result<(), GemmError> {
    let isa = spec.isa()?;
    check_shapes(&a, (b.rows(), b.cols()), c)?;
    spec.check(c.cols())?;
    let both = Then { first: spec.epilogue(), second: epilogue };
    single(isa, a, Weights::View(Operand::new(&b)), b.cols(), c, spec, &both);
    Ok(())
}

/// As [`gemm`], with B packed ahead.
///
/// ```
/// use qkv_gemm::{GemmSpec, MatMut, MatRef, PackedRhs, gemm_packed};
/// let weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
/// // Rows of the weights are output features: x W^T.
/// let packed = PackedRhs::new(MatRef::from_slice(&weights, 2, 3)?.t())?;
/// let (x, mut y) = ([1.0, 1.0, 1.0], [0.0; 2]);
/// gemm_packed(
///     MatRef::from_slice(&x, 1, 3)?,
///     &packed,
///     &mut MatMut::from_slice(&mut y, 1, 2)?,
///     &GemmSpec::default(),
/// )?;
/// assert_eq!(y, [6.0, 15.0]);
/// # Ok::<(), qkv_gemm::GemmError>(())
/// ```
///
/// # Errors
/// As [`gemm`], and [`GemmError::PackedFor`] where `spec.isa` is not what `b` was packed for (None takes that).
pub fn gemm_packed(
    a: MatRef<'_>,
    b: &PackedRhs,
    c: &mut MatMut<'_>,
    spec: &GemmSpec<'_>,
) -> Result<(), GemmError> {
    let isa = match spec.isa {
        Some(isa) if isa.kind() != b.isa().kind() => {
            return Err(GemmError::PackedFor { given: b.isa().kind(), expected: isa.kind() });
        }
        _ => b.isa(),
    };
    check_shapes(&a, (b.rows(), b.cols()), c)?;
    spec.check(c.cols())?;
    single(isa, a, Weights::Packed(b), b.cols(), c, spec, &spec.epilogue());
    Ok(())
}

/// Checks that `c` is `a` times a matrix of shape `b`.
fn check_shapes(a: &MatRef<'_>, b: (usize, usize), c: &MatMut<'_>) -> Result<(), GemmError> {
    if b.0 != a.cols() {
        return Err(GemmError::Shape { argument: "b", given: b, expected: (a.cols(), b.1) });
    }
    let (given, expected) = ((c.rows(), c.cols()), (a.rows(), b.1));
    if given != expected {
        return Err(GemmError::Shape { argument: "c", given, expected });
    }
    Ok(())
}

/// Computes a checked product of single matrices.
fn single(
    isa: Isa,
    a: MatRef<'_>,
    b: Weights<'_>,
    n: usize,
    c: &mut MatMut<'_>,
    spec: &GemmSpec<'_>,
    finish: &dyn Finish,
) {
    let (m, k) = (a.rows(), a.cols());
    let c = Target { row_stride: c.row_stride(), col_stride: c.col_stride(), ptr: c.as_mut_ptr() };
    let product = Product {
        isa,
        m,
        k,
        n,
        batch: &Batch::ONE,
        a: Operand::new(&a),
        b,
        c,
        scale: scale(spec, k),
        finish,
    };
    compute(&product, spec.blocking);
}

/// The factors of a product over `k` steps: without any, alpha has nothing to multiply (and its sign none to give).
pub(crate) fn scale(spec: &GemmSpec<'_>, k: usize) -> Scale {
    Scale { alpha: if k == 0 { 1.0 } else { spec.alpha }, beta: spec.beta }
}

/// Computes a checked product by the way that suits its shape.
pub(crate) fn compute(product: &Product<'_>, blocking: Option<Blocking>) {
    if product.m == 0 || product.n == 0 || product.batch.count == 0 {
        return;
    }
    if blocking.is_some() || !gemv::run(product) {
        driver::run(product, blocking);
    }
}

/// One epilogue after another.
struct Then<'a, E> {
    first: BiasActivation<'a>,
    second: &'a E,
}

impl<E: Epilogue> Epilogue for Then<'_, E> {
    #[inline(always)]
    fn apply<S: qkv_simd::Simd>(&self, s: S, x: S::F32, place: crate::Place) -> S::F32 {
        self.second.apply(s, self.first.apply(s, x, place), place)
    }
    fn is_identity(&self) -> bool {
        self.first.is_identity() && self.second.is_identity()
    }
}
