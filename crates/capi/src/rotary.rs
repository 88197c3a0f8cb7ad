//! Rotary position embeddings: tables of cosines and sines, for queries as they are read, keys as they are cached, or rows
//! in place.

use std::sync::Arc;

use qkv::DataMut;
use qkv::rotary::{Pairing, Rotary, RotaryConfig, RotaryError, Scaling};

use crate::handles::Handles;
use crate::lists::{flag, qkv_floats, qkv_integers, size};
use crate::region::{Region, wrong_dtype};
use crate::status::{Failure, guard, qkv_status, qkv_status::*};
use crate::types::{QKV_DTYPE_F32, qkv_tensor_mut};
use crate::versioned::{Versioned, versioned};
use crate::views::{copy, data_mut};

/// How inverse frequencies are changed for long sequences: one of the QKV_ROTARY_ numbers. Names and arithmetic are those
/// of rope_parameters in a model's config.json.
pub type qkv_rotary_scaling = u32;
/// As in the paper.
pub const QKV_ROTARY_DEFAULT: qkv_rotary_scaling = 0;
/// Positions divided by factor.
pub const QKV_ROTARY_LINEAR: qkv_rotary_scaling = 1;
/// A base that grows with sequence_length.
pub const QKV_ROTARY_DYNAMIC: qkv_rotary_scaling = 2;
/// YaRN: low frequencies divided by factor, high ones kept, a ramp between.
pub const QKV_ROTARY_YARN: qkv_rotary_scaling = 3;
/// Llama 3.1: long wavelengths stretched by factor, short ones kept, the middle blended.
pub const QKV_ROTARY_LLAMA3: qkv_rotary_scaling = 4;

/// Tables of cosines and sines, and which dims they turn.
#[derive(Debug)]
pub struct qkv_rotary {
    // Handles are numbers; nothing is ever behind one.
    _opaque: [u8; 0],
}

pub(crate) static ROTARIES: Handles<Rotary> = Handles::new("rotary");

/// What a rotary embedding is made from. 0 is the usual value of every field but head_dim.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_rotary_config {
    /// sizeof(qkv_rotary_config).
    pub struct_size: usize,
    /// Values of a row.
    pub head_dim: i64,
    /// How many of them are rotated, the first ones: even; 0 is all.
    pub rotary_dim: i64,
    /// Positions in the table; 0 is 2048.
    pub max_length: i64,
    /// For all scalings but linear: the model's original_max_position_embeddings.
    pub original_length: i64,
    /// For QKV_ROTARY_DYNAMIC: the length that the base is computed for; 0 is original_length.
    pub sequence_length: i64,
    /// theta; 0 is 10000.
    pub base: f64,
    /// For all scalings.
    pub factor: f64,
    /// For QKV_ROTARY_YARN; 0 is 32.
    pub beta_fast: f64,
    /// For QKV_ROTARY_YARN; 0 is 1.
    pub beta_slow: f64,
    /// For QKV_ROTARY_YARN: what cosines and sines are multiplied by; 0 is computed from factor and the two below.
    pub attention_factor: f64,
    /// For QKV_ROTARY_YARN: DeepSeek's; 0 is none.
    pub mscale: f64,
    /// For QKV_ROTARY_YARN: DeepSeek's; 0 is none.
    pub mscale_all_dim: f64,
    /// For QKV_ROTARY_LLAMA3.
    pub low_freq_factor: f64,
    /// For QKV_ROTARY_LLAMA3.
    pub high_freq_factor: f64,
    /// 0: pairs are (i, i + rotary_dim / 2), as in Llama; 1: (0, 1), (2, 3), ..., as in GPT-J.
    pub interleaved: u32,
    /// One of the QKV_ROTARY_ numbers.
    pub scaling: qkv_rotary_scaling,
    /// For QKV_ROTARY_YARN: 1 leaves the ramp's ends unrounded ("truncate": false).
    pub no_truncate: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), its size first, all numbers.
unsafe impl Versioned for qkv_rotary_config {
    const NAME: &'static str = "config";
}

fn pairing(interleaved: u32) -> Result<Pairing, Failure> {
    Ok(if flag("interleaved", interleaved)? { Pairing::Interleaved } else { Pairing::Halves })
}

/// A number, or None where it is 0.
fn unless_zero(x: f64) -> Option<f64> {
    (x != 0.0).then_some(x)
}

/// Refuses numbers that belong to another scaling, which would be ignored.
fn check_unused(given: &qkv_rotary_config) -> Result<(), Failure> {
    let scaling = given.scaling;
    let yarn = scaling == QKV_ROTARY_YARN;
    let llama3 = scaling == QKV_ROTARY_LLAMA3;
    let dynamic = scaling == QKV_ROTARY_DYNAMIC;
    for (field, is_zero, used) in [
        ("factor", given.factor == 0.0, scaling != QKV_ROTARY_DEFAULT),
        ("original_length", given.original_length == 0, yarn || llama3 || dynamic),
        ("sequence_length", given.sequence_length == 0, dynamic),
        ("beta_fast", given.beta_fast == 0.0, yarn),
        ("beta_slow", given.beta_slow == 0.0, yarn),
        ("attention_factor", given.attention_factor == 0.0, yarn),
        ("mscale", given.mscale == 0.0, yarn),
        ("mscale_all_dim", given.mscale_all_dim == 0.0, yarn),
        ("no_truncate", given.no_truncate == 0, yarn),
        ("low_freq_factor", given.low_freq_factor == 0.0, llama3),
        ("high_freq_factor", given.high_freq_factor == 0.0, llama3),
        ("reserved", given.reserved == 0, false),
    ] {
        if !is_zero && !used {
            let what = format!("{field}: given, expected 0 with this scaling");
            return Err(Failure::new(QKV_ERROR_VALUE, what));
        }
    }
    Ok(())
}

fn make(given: &qkv_rotary_config) -> Result<Rotary, Failure> {
    check_unused(given)?;
    let factor = given.factor;
    let original_length = size("original_length", given.original_length)?;
    let scaling = match given.scaling {
        QKV_ROTARY_DEFAULT => Scaling::None,
        QKV_ROTARY_LINEAR => Scaling::Linear { factor },
        QKV_ROTARY_DYNAMIC => Scaling::DynamicNtk { factor, original_length },
        QKV_ROTARY_YARN => Scaling::Yarn {
            factor,
            original_length,
            beta_fast: unless_zero(given.beta_fast).unwrap_or(32.0),
            beta_slow: unless_zero(given.beta_slow).unwrap_or(1.0),
            attention_factor: unless_zero(given.attention_factor).map(|x| x as f32),
            truncate: !flag("no_truncate", given.no_truncate)?,
            mscale: unless_zero(given.mscale),
            mscale_all_dim: unless_zero(given.mscale_all_dim),
        },
        QKV_ROTARY_LLAMA3 => Scaling::Llama3 {
            factor,
            low_freq_factor: given.low_freq_factor,
            high_freq_factor: given.high_freq_factor,
            original_length,
        },
        other => {
            let what = format!("scaling: {other}, expected a QKV_ROTARY_ number");
            return Err(Failure::new(QKV_ERROR_VALUE, what));
        }
    };
    let mut config = RotaryConfig::new(size("head_dim", given.head_dim)?).with_scaling(scaling);
    config = config.with_pairing(pairing(given.interleaved)?);
    if given.rotary_dim != 0 {
        config = config.with_rotary_dim(size("rotary_dim", given.rotary_dim)?);
    }
    if given.max_length != 0 {
        config = config.with_max_length(size("max_length", given.max_length)?);
    }
    if given.sequence_length != 0 {
        config = config.with_sequence_length(size("sequence_length", given.sequence_length)?);
    }
    if given.base != 0.0 {
        config = config.with_base(given.base);
    }
    // The frequencies are collected before anything asks whether the tables fit the memory.
    const MOST_DIMS: usize = 1 << 24;
    if config.rotary_dim > MOST_DIMS {
        let (max_length, rotary_dim) = (config.max_length, config.rotary_dim);
        return Err(RotaryError::TooLarge { max_length, rotary_dim }.into());
    }
    Ok(Rotary::new(&config)?)
}

/// Makes a rotary embedding.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_rotary_create(
    config: *const qkv_rotary_config,
    rotary: *mut *mut qkv_rotary,
) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise, see the header's text.
        unsafe { ROTARIES.give(rotary, || make(&versioned(config, false)?)) }
    })
}

/// Makes a rotary embedding of tables (positions, rotary_dim / 2), row-major, which are copied; interleaved as in
/// qkv_rotary_config.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_rotary_from_tables(
    cosines: qkv_floats,
    sines: qkv_floats,
    rotary_dim: i64,
    head_dim: i64,
    interleaved: u32,
    rotary: *mut *mut qkv_rotary,
) -> qkv_status {
    guard(|| {
        let make = || {
            // SAFETY: the caller's promise, see the header's text.
            let (cos, sin) =
                unsafe { (cosines.copied("cosines", &[])?, sines.copied("sines", &[cosines.count])?) };
            let (cos, sin) =
                (cos.ok_or_else(|| Failure::null("cosines"))?, sin.ok_or_else(|| Failure::null("sines"))?);
            let (rotary_dim, head_dim) = (size("rotary_dim", rotary_dim)?, size("head_dim", head_dim)?);
            Ok(Rotary::from_tables(cos, sin, rotary_dim, head_dim, pairing(interleaved)?)?)
        };
        // SAFETY: as above.
        unsafe { ROTARIES.give(rotary, make) }
    })
}

/// Ends a rotary embedding; NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_rotary_destroy(rotary: *mut qkv_rotary) -> qkv_status {
    guard(|| ROTARIES.end(rotary))
}

/// Rotates rows (batch, heads, length, head dim) of f32 in place: a token's, in every head, to the token's position.
/// positions are one per token for the whole batch, or batch x length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_rotary_apply(
    rotary: *const qkv_rotary,
    rows: *const qkv_tensor_mut,
    positions: qkv_integers,
) -> qkv_status {
    guard(|| {
        let rotary = ROTARIES.get(rotary)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let region = Region::of_mut("rows", &copy("rows", rows)?)?;
            if region.dtype != QKV_DTYPE_F32 {
                return Err(wrong_dtype("rows", region.dtype, "f32"));
            }
            let [batch, _, length, _] = region.shape;
            let positions = positions.copied("positions", &[length, batch * length])?.unwrap_or_default();
            let DataMut::F32(mut rows) = data_mut(&region)? else {
                return Err(wrong_dtype("rows", region.dtype, "f32"));
            };
            Ok(rotary.rotate_rows(&mut rows, &positions)?)
        }
    })
}

/// The embedding of a handle; None where it is NULL. Refused where keys of `key_dim` values up to position `end` could not
/// all be rotated.
pub(crate) fn for_keys(
    rotary: *const qkv_rotary,
    key_dim: usize,
    end: usize,
) -> Result<Option<Arc<Rotary>>, Failure> {
    if rotary.is_null() {
        return Ok(None);
    }
    let rotary = ROTARIES.get(rotary)?;
    check_keys(&rotary, key_dim, end)?;
    Ok(Some(rotary))
}

/// Refuses an embedding with which keys up to position `end` could not all be rotated.
pub(crate) fn check_keys(rotary: &Rotary, key_dim: usize, end: usize) -> Result<(), Failure> {
    if rotary.head_dim() != key_dim {
        let (given, expected) = (key_dim, rotary.head_dim());
        return Err(RotaryError::Length { argument: "row", given, expected }.into());
    }
    let max_length = rotary.max_length();
    if end > max_length {
        return Err(RotaryError::Position { index: None, given: end - 1, max_length }.into());
    }
    Ok(())
}
