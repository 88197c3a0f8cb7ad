//! Something to be timed: random inputs, an output, and the call of qkv that leads from one to the other.
//!
//! Inputs are uniform in [-1, 1), the same in every run; memory is allocated and written before the clock starts.
//! Attention and products write into the same output again and again, as a program that runs a model does.

use std::error::Error;
use std::fmt;

use qkv::gemm::{Blocking, GemmError, GemmSpec, MatMut, MatRef, gemm};
use qkv::{AttentionSpec, Causal, Outputs, Tensor, attention_into};
use serde::Serialize;

use crate::{AttentionShape, GemmShape};

/// Uniform random numbers, the same ones for the same seed: Marsaglia's xorshift64* (2003; Vigna 2016).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator of its own for every seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // An odd multiple of an odd number is never the one forbidden state, 0.
        Self((2 * seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// The next one, in [-1, 1), a multiple of 2^-23.
    pub fn next_f32(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let top = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40;
        top as f32 / (1 << 23) as f32 - 1.0
    }

    /// The next `count`.
    pub fn vector(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next_f32()).collect()
    }
}

/// Queries, keys and values of a call.
#[derive(Clone, Debug)]
pub struct AttentionInput {
    /// (batch, heads, length, dim).
    pub q: Tensor,
    /// (batch, key/value heads, length, dim).
    pub k: Tensor,
    /// As `k`.
    pub v: Tensor,
}

impl AttentionInput {
    /// Random ones.
    ///
    /// # Errors
    /// Where the shape does not fit the address space.
    pub fn random(shape: &AttentionShape) -> Result<Self, Box<dyn Error>> {
        let mut random = Random::new(1);
        let mut tensor = |shape| Tensor::from_fn(shape, |_| random.next_f32());
        Ok(Self {
            q: tensor(shape.query_shape())?,
            k: tensor(shape.key_shape())?,
            v: tensor(shape.key_shape())?,
        })
    }
}

/// The operands of a product, row-major.
#[derive(Clone, Debug)]
pub struct GemmInput {
    /// (m, k).
    pub a: Vec<f32>,
    /// (k, n).
    pub b: Vec<f32>,
}

impl GemmInput {
    /// Random ones.
    #[must_use]
    pub fn random(shape: GemmShape) -> Self {
        let mut random = Random::new(2);
        Self { a: random.vector(shape.m * shape.k), b: random.vector(shape.k * shape.n) }
    }
}

/// What a call of attention is asked, for these sizes.
#[must_use]
pub fn spec_of(shape: &AttentionShape) -> AttentionSpec<'static> {
    let spec = AttentionSpec::new();
    if shape.causal { spec.with_causal(Causal::TopLeft) } else { spec }
}

/// A call with its inputs and its output, ready to be made again and again.
pub type Call = Box<dyn FnMut()>;

/// One thing that qkv computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// A call of attention.
    Attention(AttentionShape),
    /// A matrix product.
    Gemm(GemmShape),
}

impl Workload {
    /// Useful operations of one call.
    #[must_use]
    pub fn flops(&self) -> f64 {
        match self {
            Self::Attention(shape) => shape.flops(),
            Self::Gemm(shape) => shape.flops(),
        }
    }

    /// Makes inputs and output, and makes the call once.
    ///
    /// # Errors
    /// Where the sizes do not fit the address space, or qkv refuses them.
    pub fn prepare(&self) -> Result<Call, Box<dyn Error>> {
        match *self {
            Self::Attention(shape) => {
                let mut call = prepare_attention(shape)?;
                Ok(Box::new(move || call(shape.causal)))
            }
            Self::Gemm(shape) => prepare_product(shape, None),
        }
    }
}

/// Makes inputs and output of attention and makes the call once. What it gives makes it with a causal mask or without, on the
/// same inputs, as it is told.
///
/// # Errors
/// As [`Workload::prepare`].
pub fn prepare_attention(shape: AttentionShape) -> Result<impl FnMut(bool), Box<dyn Error>> {
    let AttentionInput { q, k, v } = AttentionInput::random(&shape)?;
    let mut out = Tensor::zeros(shape.query_shape())?;
    let mut call = move |causal| {
        let spec = spec_of(&AttentionShape { causal, ..shape });
        attention_into(q.view(), k.view(), v.view(), &spec, Outputs::new(out.view_mut()))
    };
    call(shape.causal)?;
    Ok(move |causal| call(causal).expect("accepted before"))
}

/// Makes inputs and output of a product, and computes it once.
///
/// # Errors
/// Where the sizes do not fit the address space, or qkv refuses them or the blocking.
pub fn prepare_product(shape: GemmShape, blocking: Option<Blocking>) -> Result<Call, Box<dyn Error>> {
    let GemmInput { a, b } = GemmInput::random(shape);
    let mut c = vec![0.0; shape.m * shape.n];
    let spec = GemmSpec { blocking, ..GemmSpec::default() };
    let mut call = move || product(shape, &a, &b, &mut c, &spec);
    call()?;
    Ok(Box::new(move || call().expect("accepted before")))
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attention(shape) => write!(f, "attention {shape}"),
            Self::Gemm(shape) => write!(f, "gemm {shape}"),
        }
    }
}

/// C = A B, all row-major and dense.
///
/// # Errors
/// Where a slice does not have the length that the shape asks for.
pub fn product(
    shape: GemmShape,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    spec: &GemmSpec<'_>,
) -> Result<(), GemmError> {
    let GemmShape { m, k, n } = shape;
    let (a, b) = (MatRef::from_slice(a, m, k)?, MatRef::from_slice(b, k, n)?);
    gemm(a, b, &mut MatMut::from_slice(c, m, n)?, spec)
}

/// Refuses results that are not within 10^-4 of what they should be: a library that computes something else would be
/// timed in vain. For inputs in [-1, 1) and small problems, where that is far above rounding and far below a mistake.
///
/// # Errors
/// Where one is off, or their number is wrong.
pub fn check_close(library: &str, given: &[f32], expected: &[f64]) -> Result<(), Box<dyn Error>> {
    if given.len() != expected.len() {
        return Err(format!("{library}: {} values, expected {}", given.len(), expected.len()).into());
    }
    for (i, (&given, &expected)) in given.iter().zip(expected).enumerate() {
        // False for NaN.
        let close = (f64::from(given) - expected).abs() < 1e-4;
        if !close {
            return Err(format!("{library}: value {i} is {given}, expected {expected}").into());
        }
    }
    Ok(())
}
