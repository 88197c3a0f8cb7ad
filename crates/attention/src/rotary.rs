//! Rotary position embedding (RoPE): queries and keys turned by an angle that grows with their position.
//!
//! Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864. The first
//! `rotary_dim` dims of a head form r = rotary_dim / 2 pairs; pair i of a row at position p becomes
//!
//! ```text
//! x' = a (x cos(p f_i) - y sin(p f_i))      f_i = base^(-i / r)
//! y' = a (x sin(p f_i) + y cos(p f_i))      a   = attention factor, 1 but for YaRN
//! ```
//!
//! so that q . k depends on the distance of their positions alone. [`Scaling`] changes the f_i, and a, for
//! sequences longer than those of the training, as transformers' `modeling_rope_utils` does.
//!
//! Precision: the f_i are computed in f64 and rounded to f32, the type in which models are trained with them;
//! p f_i, cosine, sine and a are then f64, and the tables are rounded once. transformers rounds p f_i to f32
//! first, which is where its tables differ: by up to 2^-24 p f_i and the last bits of its f_i, 1e-4 at
//! position 4095.

use core::{f64::consts::PI, fmt};

use crate::TensorMut;
use crate::tensor::has_room;

/// Which dims form a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pairing {
    /// (0, 1), (2, 3), ...: GPT-J, GLM, the paper; flash-attention's and ONNX's `interleaved`.
    Interleaved,
    /// (i, i + rotary_dim / 2): GPT-NeoX, Llama and most models of transformers.
    #[default]
    Halves,
}

/// How inverse frequencies are changed for sequences longer than those of the training.
///
/// Names and arithmetic are those of `rope_parameters` (formerly `rope_scaling`) in a model's config.json.
/// Where `factor` is missing there, it is `max_position_embeddings` / `original_max_position_embeddings`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// As in the paper ("default").
    #[default]
    None,
    /// Positions divided by `factor` ("linear").
    Linear {
        /// Positive.
        factor: f64,
    },
    /// A base that grows with the sequence ("dynamic"), for which [`RotaryConfig::sequence_length`] is
    /// needed.
    ///
    /// base' = base (factor n / original_length - (factor - 1))^(d / (d - 2)), where d is `rotary_dim`, at
    /// least 4, and n the sequence length, no less than `original_length`.
    DynamicNtk {
        /// Positive.
        factor: f64,
        /// The model's `max_position_embeddings`.
        original_length: usize,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between (Peng et al., arXiv:2309.00071;
    /// "yarn"). [`Scaling::yarn`] fills in the usual numbers.
    Yarn {
        /// Positive.
        factor: f64,
        /// `original_max_position_embeddings`.
        original_length: usize,
        /// Pairs that turn more often than this within `original_length` keep their frequency. Usually 32.
        beta_fast: f64,
        /// Pairs that turn less often than this have it divided by `factor`. Usually 1.
        beta_slow: f64,
        /// What cosine and sine are multiplied by. `None`: m(mscale) / m(mscale_all_dim) where both are given
        /// and not 0, else m(1); m(s) is 0.1 s ln(factor) + 1, or 1 where `factor` is at most 1.
        attention_factor: Option<f32>,
        /// Whether the ramp's ends are rounded to whole dims, outwards. Usually true.
        truncate: bool,
        /// DeepSeek's, see `attention_factor`.
        mscale: Option<f64>,
        /// DeepSeek's, see `attention_factor`.
        mscale_all_dim: Option<f64>,
    },
    /// Long wavelengths stretched by `factor`, short ones kept, the middle blended (Llama 3.1; "llama3").
    Llama3 {
        /// Positive.
        factor: f64,
        /// Wavelengths above `original_length` / this are stretched. Positive.
        low_freq_factor: f64,
        /// Wavelengths below `original_length` / this are kept. Above `low_freq_factor`.
        high_freq_factor: f64,
        /// `original_max_position_embeddings`.
        original_length: usize,
    },
}

impl Scaling {
    /// YaRN with the paper's numbers: betas 32 and 1, ends of the ramp truncated, attention factor from
    /// `factor`.
    #[must_use]
    pub fn yarn(factor: f64, original_length: usize) -> Self {
        Scaling::Yarn {
            factor,
            original_length,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate: true,
            mscale: None,
            mscale_all_dim: None,
        }
    }
}

/// What a [`Rotary`] is made from. `RotaryConfig::new(head_dim)` is Llama 2's; the methods change it:
///
/// ```
/// use qkv_attention::rotary::{Rotary, RotaryConfig, Scaling};
/// let config = RotaryConfig::new(128).with_base(1e6).with_scaling(Scaling::yarn(4.0, 32768));
/// let mut row = [1.0; 128];
/// Rotary::new(&config)?.rotate(&mut row, 2047)?;
/// # Ok::<(), qkv_attention::rotary::RotaryError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RotaryConfig {
    /// Values of a row.
    pub head_dim: usize,
    /// How many dims of a row are rotated, the first ones: even, 2 to `head_dim`. The others stay. All unless
    /// set.
    pub rotary_dim: usize,
    /// theta, above 1: 10000 unless set.
    pub base: f64,
    /// Which dims form a pair: the halves unless set.
    pub pairing: Pairing,
    /// How inverse frequencies are changed.
    pub scaling: Scaling,
    /// For [`Scaling::DynamicNtk`] alone: the length that the base is computed for, at least
    /// `original_length`, which it is unless set. transformers uses the largest position of a call + 1, and
    /// computes anew as a sequence grows; a key in a cache keeps the frequencies that it came with.
    pub sequence_length: Option<usize>,
    /// Positions in the table, of 4 `rotary_dim` bytes each: 2048 unless set.
    pub max_length: usize,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $field:ident: $t:ty = $value:expr;)*) => {
        $($(#[$doc])* #[must_use] pub fn $name(self, $field: $t) -> Self { Self { $field: $value, ..self } })*
    };
}

impl RotaryConfig {
    /// All dims, base 10000, halves, no scaling, 2048 positions.
    #[must_use]
    pub fn new(head_dim: usize) -> Self {
        Self {
            head_dim,
            rotary_dim: head_dim,
            base: 10_000.0,
            pairing: Pairing::default(),
            scaling: Scaling::None,
            sequence_length: None,
            max_length: 2048,
        }
    }

    setters! {
        /// With this many dims rotated, the first ones.
        with_rotary_dim: rotary_dim: usize = rotary_dim;
        /// With this base (theta).
        with_base: base: f64 = base;
        /// With dims paired like this.
        with_pairing: pairing: Pairing = pairing;
        /// With this scaling.
        with_scaling: scaling: Scaling = scaling;
        /// With the sequence length that [`Scaling::DynamicNtk`] computes its base for.
        with_sequence_length: sequence_length: usize = Some(sequence_length);
        /// With a table for positions below this.
        with_max_length: max_length: usize = max_length;
    }

    /// The inverse frequencies f_i, and the attention factor.
    fn frequencies(&self) -> Result<(Vec<f32>, f32), RotaryError> {
        above("base", self.base, 1.0, "a finite number above 1")?;
        let half = self.rotary_dim / 2;
        let plain = |base: f64| (0..half).map(move |i| base.powf(-(i as f64) / half as f64));
        let rounded = |f: f64| f as f32;
        let (frequencies, attention_factor) = match self.scaling {
            Scaling::None => (plain(self.base).map(rounded).collect(), 1.0),
            Scaling::Linear { factor } => {
                positive("factor", factor)?;
                (plain(self.base).map(|f| rounded(f / factor)).collect(), 1.0)
            }
            Scaling::DynamicNtk { factor, original_length } => {
                positive("factor", factor)?;
                let original = length(original_length)?;
                // The exponent divides by rotary_dim - 2.
                if self.rotary_dim < 4 {
                    let (given, head_dim) = (self.rotary_dim, self.head_dim);
                    return Err(RotaryError::RotaryDim { given, least: 4, head_dim });
                }
                let n = self.sequence_length.map_or(original, |n| original.max(n as f64));
                let dim = self.rotary_dim as f64;
                let growth = (factor * n / original - (factor - 1.0)).powf(dim / (dim - 2.0));
                (plain(self.base * growth).map(rounded).collect(), 1.0)
            }
            Scaling::Yarn {
                factor,
                original_length,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
                mscale,
                mscale_all_dim,
            } => {
                positive("factor", factor)?;
                let original = length(original_length)?;
                // The dim whose pair turns `beta` times within the original length.
                let dim_of = |argument, beta| {
                    positive(argument, beta)?;
                    Ok(self.rotary_dim as f64 * (original / (beta * 2.0 * PI)).ln() / (2.0 * self.base.ln()))
                };
                let (mut low, mut high) = (dim_of("beta_fast", beta_fast)?, dim_of("beta_slow", beta_slow)?);
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                // rotary_dim and not rotary_dim / 2, although they bound a pair's number: so it is in the
                // original.
                (low, high) = (low.max(0.0), high.min(self.rotary_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let blend = |(i, f): (usize, f64)| rounded(f / factor * ramp(i) + f * (1.0 - ramp(i)));
                let attention_factor = match attention_factor {
                    Some(given) => given,
                    None => yarn_attention_factor(factor, mscale, mscale_all_dim)? as f32,
                };
                positive("attention_factor", f64::from(attention_factor))?;
                (plain(self.base).enumerate().map(blend).collect(), attention_factor)
            }
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_length } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                above(
                    "high_freq_factor",
                    high_freq_factor,
                    low_freq_factor,
                    "a finite number above low_freq_factor",
                )?;
                let original = length(original_length)?;
                let scaled = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    let smooth =
                        (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    // Beyond the two wavelengths this is f / factor, and f.
                    let smooth = smooth.clamp(0.0, 1.0);
                    rounded((1.0 - smooth) * f / factor + smooth * f)
                };
                (plain(self.base).map(scaled).collect(), 1.0)
            }
        };
        Ok((frequencies, attention_factor))
    }
}

/// YaRN's attention factor where none is given.
fn yarn_attention_factor(
    factor: f64,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
) -> Result<f64, RotaryError> {
    for (argument, given) in [("mscale", mscale), ("mscale_all_dim", mscale_all_dim)] {
        if let Some(given) = given.filter(|&given| given != 0.0) {
            above(argument, given, 0.0, "0 or a positive finite number")?;
        }
    }
    let m = |s: f64| if factor <= 1.0 { 1.0 } else { 0.1 * s * factor.ln() + 1.0 };
    Ok(match (mscale, mscale_all_dim) {
        (Some(above), Some(below)) if above != 0.0 && below != 0.0 => m(above) / m(below),
        _ => m(1.0),
    })
}

fn above(argument: &'static str, given: f64, bound: f64, expected: &'static str) -> Result<(), RotaryError> {
    let fits = given.is_finite() && given > bound;
    if fits { Ok(()) } else { Err(RotaryError::Number { argument, given, expected }) }
}

fn positive(argument: &'static str, given: f64) -> Result<(), RotaryError> {
    above(argument, given, 0.0, "a positive finite number")
}

fn length(original_length: usize) -> Result<f64, RotaryError> {
    let given = original_length as f64;
    above("original_length", given, 0.0, "at least 1")?;
    Ok(given)
}

/// Tables of cosines and sines, and which dims they turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    head_dim: usize,
    rotary_dim: usize,
    pairing: Pairing,
    max_length: usize,
    frequencies: Vec<f32>,
    attention_factor: f32,
    /// (max_length, rotary_dim / 2), attention factor included; so the sines.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotary {
    /// Computes the tables.
    ///
    /// # Errors
    /// Where a number of the configuration is not what it may be, or the tables do not fit the memory.
    pub fn new(config: &RotaryConfig) -> Result<Self, RotaryError> {
        let &RotaryConfig { head_dim, rotary_dim, pairing, max_length, .. } = config;
        check_rotary_dim(rotary_dim, head_dim)?;
        let too_large = RotaryError::TooLarge { max_length, rotary_dim };
        // A row at least: the frequencies take as much.
        let values = max_length.max(1).checked_mul(rotary_dim / 2).filter(|&values| has_room::<f32>(values));
        let values = values.ok_or(too_large.clone())?;
        let (frequencies, attention_factor) = config.frequencies()?;
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        cos.try_reserve_exact(values).and(sin.try_reserve_exact(values)).map_err(|_| too_large)?;
        let a = f64::from(attention_factor);
        for position in 0..max_length {
            for &f in &frequencies {
                let (s, c) = (position as f64 * f64::from(f)).sin_cos();
                cos.push((a * c) as f32);
                sin.push((a * s) as f32);
            }
        }
        Ok(Self { head_dim, rotary_dim, pairing, max_length, frequencies, attention_factor, cos, sin })
    }

    /// Takes tables (max length, `rotary_dim` / 2), row-major, as ONNX's `RotaryEmbedding` and
    /// flash-attention have them. An attention factor is in them if there is one.
    ///
    /// # Errors
    /// Where `rotary_dim` is not even, 2 to `head_dim`, or the tables are not of one size, whole rows.
    pub fn from_tables(
        cos: Vec<f32>,
        sin: Vec<f32>,
        rotary_dim: usize,
        head_dim: usize,
        pairing: Pairing,
    ) -> Result<Self, RotaryError> {
        check_rotary_dim(rotary_dim, head_dim)?;
        let pairs = rotary_dim / 2;
        if !cos.len().is_multiple_of(pairs) {
            return Err(RotaryError::TableRows { given: cos.len(), pairs });
        }
        check_length("sin", sin.len(), cos.len())?;
        let max_length = cos.len() / pairs;
        let (frequencies, attention_factor) = (Vec::new(), 1.0);
        Ok(Self { head_dim, rotary_dim, pairing, max_length, frequencies, attention_factor, cos, sin })
    }

    /// Values of a row.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// How many of them are rotated, the first ones.
    #[must_use]
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Which dims form a pair.
    #[must_use]
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// Positions in the tables: those below this can be rotated to.
    #[must_use]
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The angle per position of each pair, scaling included; empty where the tables were given.
    #[must_use]
    pub fn inverse_frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// What cosines and sines have been multiplied by; 1 where the tables were given.
    #[must_use]
    pub fn attention_factor(&self) -> f32 {
        self.attention_factor
    }

    /// The cosines, (max length, `rotary_dim` / 2), attention factor included.
    #[must_use]
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// The sines, (max length, `rotary_dim` / 2), attention factor included.
    #[must_use]
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// Rotates one row of `head_dim` values to a position, in place.
    ///
    /// # Errors
    /// Where the row has another length or the position is not in the tables. Nothing is written then.
    pub fn rotate(&self, row: &mut [f32], position: usize) -> Result<(), RotaryError> {
        check_length("row", row.len(), self.head_dim)?;
        if position >= self.max_length {
            return Err(RotaryError::Position { index: None, given: position, max_length: self.max_length });
        }
        self.rotate_checked(row, position);
        Ok(())
    }

    /// Rotates all rows of (batch, heads, length, dim) in place: a token's, in every head, to the token's
    /// position. `positions` are `length` ones that the whole batch shares, or batch x length, row-major.
    ///
    /// # Errors
    /// Where the dim is not `head_dim`, the positions are of another number or one is not in the tables.
    /// Nothing is written then.
    pub fn rotate_rows(&self, rows: &mut TensorMut<'_, f32>, positions: &[usize]) -> Result<(), RotaryError> {
        let [batch, heads, length, dim] = rows.shape();
        check_length("rows", dim, self.head_dim)?;
        let per_batch = batch.checked_mul(length) == Some(positions.len());
        if !per_batch && positions.len() != length {
            return Err(RotaryError::PositionCount { given: positions.len(), batch, length });
        }
        if let Some(index) = positions.iter().position(|&position| position >= self.max_length) {
            let (index, given) = (Some(index), positions[index]);
            return Err(RotaryError::Position { index, given, max_length: self.max_length });
        }
        // Else a huge batch of no heads would be counted through.
        if heads == 0 || positions.is_empty() {
            return Ok(());
        }
        for b in 0..batch {
            let positions = if per_batch { &positions[b * length..][..length] } else { positions };
            for head in 0..heads {
                for (i, &position) in positions.iter().enumerate() {
                    // SAFETY: the three indices are below their sizes, so `dim` values lie there, borrowed
                    // exclusively.
                    let row = unsafe { core::slice::from_raw_parts_mut(rows.row_ptr(b, head, i), dim) };
                    self.rotate_checked(row, position);
                }
            }
        }
        Ok(())
    }

    /// [`Rotary::rotate`] for callers that have checked the row's length and the position.
    // Inlined so that within a kernel it is compiled for the kernel's instruction set.
    #[inline(always)]
    pub(crate) fn rotate_checked(&self, row: &mut [f32], position: usize) {
        debug_assert!(row.len() == self.head_dim && position < self.max_length);
        let half = self.rotary_dim / 2;
        let cos = &self.cos[position * half..][..half];
        let sin = &self.sin[position * half..][..half];
        let turn = |x: &mut f32, y: &mut f32, c: f32, s: f32| (*x, *y) = (*x * c - *y * s, *x * s + *y * c);
        let rotated = &mut row[..self.rotary_dim];
        match self.pairing {
            Pairing::Halves => {
                let (first, second) = rotated.split_at_mut(half);
                for ((x, y), (&c, &s)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                    turn(x, y, c, s);
                }
            }
            Pairing::Interleaved => {
                for ([x, y], (&c, &s)) in rotated.as_chunks_mut::<2>().0.iter_mut().zip(cos.iter().zip(sin)) {
                    turn(x, y, c, s);
                }
            }
        }
    }
}

fn check_length(argument: &'static str, given: usize, expected: usize) -> Result<(), RotaryError> {
    if given == expected { Ok(()) } else { Err(RotaryError::Length { argument, given, expected }) }
}

fn check_rotary_dim(given: usize, head_dim: usize) -> Result<(), RotaryError> {
    let fits = given.is_multiple_of(2) && (2..=head_dim).contains(&given);
    if fits { Ok(()) } else { Err(RotaryError::RotaryDim { given, least: 2, head_dim }) }
}

/// Why a rotary embedding, or a rotation, was refused. Nothing has been written then.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RotaryError {
    /// The number of rotated dims is odd, too small, or more than a row has.
    RotaryDim {
        /// The number that came.
        given: usize,
        /// The smallest allowed: 2, or 4 with [`Scaling::DynamicNtk`].
        least: usize,
        /// Values of a row.
        head_dim: usize,
    },
    /// A number of the configuration is not what it may be.
    Number {
        /// Which: "base", "factor", "beta_fast", ...
        argument: &'static str,
        /// Its value.
        given: f64,
        /// What was expected.
        expected: &'static str,
    },
    /// The tables do not fit the memory.
    TooLarge {
        /// Positions asked for.
        max_length: usize,
        /// Rotated dims.
        rotary_dim: usize,
    },
    /// A table of cosines that is not whole rows.
    TableRows {
        /// Its values.
        given: usize,
        /// Values of a row: rotary_dim / 2.
        pairs: usize,
    },
    /// Rows of another length than the embedding is for, or a table of sines of another than that of cosines.
    Length {
        /// "row", "rows" or "sin".
        argument: &'static str,
        /// Values that came.
        given: usize,
        /// What was expected.
        expected: usize,
    },
    /// Positions that are neither one per token nor one per token and batch.
    PositionCount {
        /// Positions that came.
        given: usize,
        /// The tensor's batch.
        batch: usize,
        /// The tensor's length.
        length: usize,
    },
    /// A position beyond the tables.
    Position {
        /// Which, where there is a list of them.
        index: Option<usize>,
        /// Its value.
        given: usize,
        /// Positions in the tables.
        max_length: usize,
    },
}

impl fmt::Display for RotaryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RotaryError::RotaryDim { given, least, head_dim } => {
                write!(
                    f,
                    "rotary_dim: {given}, expected an even number from {least} to the head dim, {head_dim}"
                )
            }
            RotaryError::Number { argument, given, expected } => {
                write!(f, "{argument}: {given}, expected {expected}")
            }
            RotaryError::TooLarge { max_length, rotary_dim } => {
                write!(
                    f,
                    "max_length: {max_length}, expected tables of rotary_dim {rotary_dim} that fit the memory"
                )
            }
            RotaryError::TableRows { given, pairs } => {
                write!(f, "cos: {given} values, expected a multiple of rotary_dim / 2 = {pairs}")
            }
            RotaryError::Length { argument, given, expected } => {
                write!(f, "{argument}: {given} values, expected {expected}")
            }
            RotaryError::PositionCount { given, batch, length } => {
                write!(
                    f,
                    "positions: {given} entries, expected the length, {length}, or batch x length, \
                     {batch} x {length}"
                )
            }
            RotaryError::Position { index: Some(index), given, max_length } => {
                write!(f, "positions[{index}]: {given}, expected below max_length, {max_length}")
            }
            RotaryError::Position { index: None, given, max_length } => {
                write!(f, "position: {given}, expected below max_length, {max_length}")
            }
        }
    }
}

impl core::error::Error for RotaryError {}
