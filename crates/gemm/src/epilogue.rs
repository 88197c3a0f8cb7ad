//! What happens to a result before it is written: bias and activation, or a caller's own rule.
//!
//! An [`Epilogue`] sees each finished value of `alpha * A B + beta * C` exactly once, a vector at a time, in the last
//! block of k, right after the tile that computed it and before it leaves L1. It is written once for all instruction
//! sets, like the kernels. The driver itself is compiled once per instruction set and not once per epilogue: it reaches
//! the epilogue through one indirect call per tile (`writeback.rs`).
//!
//! The activations, with their sources:
//!
//! ```text
//! gelu(x)      = x/2 (1 + erf(x / sqrt 2))                                  Hendrycks & Gimpel, arXiv 1606.08415
//! gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))              the same, its approximation
//! silu(x)      = x / (1 + exp(-x))                                          Elfwing et al., arXiv 1702.03118
//! relu(x)      = max(x, 0), NaN for NaN
//! ```

use core::fmt;
use core::str::FromStr;

use qkv_simd::{Simd, math};

use crate::GemmError;

/// Where a vector of results lies in the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The matrix of the batch; 0 outside of batches.
    pub batch: usize,
    /// The row.
    pub row: usize,
    /// The column of lane 0; the other lanes are the columns after it.
    pub col: usize,
    /// Lanes that are results, at least 1; those from here on are dropped after the epilogue and may hold anything.
    pub lanes: usize,
}

/// A rule that is applied to results before they are written.
///
/// ```
/// use qkv_gemm::{Epilogue, GemmSpec, MatMut, MatRef, Place, gemm_with_epilogue};
/// use qkv_simd::{Simd, math};
///
/// /// Divides row i by `sums[i]`.
/// struct DivideRows<'a>(&'a [f32]);
///
/// impl Epilogue for DivideRows<'_> {
///     #[inline(always)]
///     fn apply<S: Simd>(&self, s: S, x: S::F32, place: Place) -> S::F32 {
///         s.div(x, s.splat(self.0[place.row]))
///     }
/// }
///
/// let (a, b, mut c) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 1.0], [0.0; 4]);
/// gemm_with_epilogue(
///     MatRef::from_slice(&a, 2, 2)?,
///     MatRef::from_slice(&b, 2, 2)?,
///     &mut MatMut::from_slice(&mut c, 2, 2)?,
///     &GemmSpec::default(),
///     &DivideRows(&[1.0, 2.0]),
/// )?;
/// assert_eq!(c, [1.0, 2.0, 1.5, 2.0]);
/// # Ok::<(), qkv_gemm::GemmError>(())
/// ```
pub trait Epilogue: Sync {
    /// The new value of `x`, which lies at `place`. Must be `#[inline(always)]` (see `qkv_simd`'s rule of inlining).
    fn apply<S: Simd>(&self, s: S, x: S::F32, place: Place) -> S::F32;

    /// Whether [`Self::apply`] returns `x` for every `x`: results then go from the registers to C.
    fn is_identity(&self) -> bool {
        false
    }

    /// Where [`Self::apply`] is `max(floor, x + bias[column])` (without a bias `max(floor, x)`): the bias and the floor,
    /// which sums then meet in registers. The bias must have a value for every column.
    fn bias_and_floor(&self) -> Option<(Option<&[f32]>, f32)> {
        None
    }
}

/// No epilogue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity;

impl Epilogue for Identity {
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, x: S::F32, _: Place) -> S::F32 {
        x
    }
    fn is_identity(&self) -> bool {
        true
    }
}

/// A function that is applied to every result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// GELU with the error function.
    Gelu,
    /// GELU's approximation with tanh.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x / (1 + exp(-x)), also called swish.
    Silu,
}

impl Activation {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Gelu, Self::GeluTanh, Self::Relu, Self::Silu];

    /// The name that the faces use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Relu => "relu",
            Self::Silu => "silu",
        }
    }

    /// The activation of that name.
    ///
    /// # Errors
    /// [`GemmError::UnknownActivation`] where there is none.
    pub fn parse(name: &str) -> Result<Self, GemmError> {
        Self::ALL
            .into_iter()
            .find(|activation| activation.name() == name)
            .ok_or_else(|| GemmError::UnknownActivation { given: name.to_owned() })
    }

    /// The function on a vector.
    #[inline(always)]
    pub fn apply<S: Simd>(self, s: S, x: S::F32) -> S::F32 {
        match self {
            Self::Gelu => gelu(s, x),
            Self::GeluTanh => gelu_tanh(s, x),
            // The order of `max` matters: it keeps a NaN in its second operand.
            Self::Relu => s.max(s.zero(), x),
            Self::Silu => s.mul(x, sigmoid(s, x)),
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Activation {
    type Err = GemmError;
    fn from_str(name: &str) -> Result<Self, GemmError> {
        Self::parse(name)
    }
}

/// 1 / (1 + exp(-x)): 0 at -infinity, 1 at +infinity, NaN for NaN.
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let one = s.splat(1.0);
    s.div(one, s.add(one, math::exp(s, s.sub(s.zero(), x))))
}

/// GELU with the error function.
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let half = s.mul(x, s.splat(0.5));
    s.mul_add(half, math::erf(s, s.mul(x, s.splat(core::f32::consts::FRAC_1_SQRT_2))), half)
}

/// GELU with tanh, as x * sigmoid(2 u): 1/2 (1 + tanh u) is the sigmoid of 2 u, without the cancellation near -1.
#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    /// 2 sqrt(2 / pi).
    const SCALE: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    let square = s.mul(x, x);
    let u2 = s.mul(s.mul(x, s.splat(SCALE)), s.mul_add(square, s.splat(CUBIC), s.splat(1.0)));
    s.mul(x, sigmoid(s, u2))
}

/// The epilogue of [`crate::GemmSpec`]: a bias per column, or per row where the product is computed transposed, then
/// an activation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BiasActivation<'a> {
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) per_row: bool,
    pub(crate) activation: Option<Activation>,
}

impl Epilogue for BiasActivation<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F32, place: Place) -> S::F32 {
        let x = match self.bias {
            None => x,
            Some(bias) if self.per_row => s.add(x, s.splat(bias[place.row])),
            Some(bias) => {
                let bias = &bias[place.col..][..place.lanes];
                let bias = if place.lanes == S::LANES {
                    s.load(bias)
                } else {
                    // SAFETY: the slice has `lanes` values, fewer than a vector.
                    unsafe { s.load_partial(bias.as_ptr(), place.lanes) }
                };
                s.add(x, bias)
            }
        };
        match self.activation {
            None => x,
            Some(activation) => activation.apply(s, x),
        }
    }
    fn is_identity(&self) -> bool {
        self.bias.is_none() && self.activation.is_none()
    }
    fn bias_and_floor(&self) -> Option<(Option<&[f32]>, f32)> {
        let floor = match self.activation {
            None => f32::NEG_INFINITY,
            Some(Activation::Relu) => 0.0,
            Some(_) => return None,
        };
        (!self.per_row || self.bias.is_none()).then_some((self.bias, floor))
    }
}
