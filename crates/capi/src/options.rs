//! What is asked of attention beyond its tensors, and where results go.

use std::sync::Arc;

use qkv::rotary::Rotary;
use qkv::{AttentionSpec, BlockMask, Broadcast, Causal, DataMut, Outputs, QueryRotary, T5Bias, Window};

use crate::lists::{flag, qkv_floats, qkv_floats_mut, qkv_integers, size};
use crate::region::{Region, wrong_dtype};
use crate::rotary::{ROTARIES, qkv_rotary};
use crate::status::{Failure, qkv_status::*};
use crate::types::*;
use crate::versioned::{Versioned, versioned};
use crate::views::{bias, check_bools, copy, data_mut, mask};

/// What is asked of attention beyond its tensors. In every field 0 means "not asked for", so all zeros with struct_size
/// set, which qkv_attention_options_init() makes, is plain attention. Options combine freely.
///
/// The score of query i and key j is s = softcap(scale q_i . k_j) + bias + ALiBi + T5, then the masks. A query's position p
/// among the keys is i for QKV_CAUSAL_TOP_LEFT, i + causal_offset for QKV_CAUSAL_OFFSET, and else i + key length - query
/// length. "Per sequence" means per batch, or per sequence of a packed or paged call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_attention_options {
    /// sizeof(qkv_attention_options).
    pub struct_size: usize,
    /// QKV_DTYPE_BOOL, 1 = takes part. Each size is that of (batch, query heads, query length, key length), or 1.
    pub mask: *const qkv_tensor,
    /// f32, f16 or bf16, added to the scores; sizes as of mask; -infinity masks.
    pub bias: *const qkv_tensor,
    /// -slope |p - j| is added: (query heads), or (sequences, query heads).
    pub alibi_slopes: qkv_floats,
    /// One logit per query head: joins the maximum and the sum, has no value.
    pub sinks: qkv_floats,
    /// Per sequence: keys from here on are not there.
    pub key_lengths: qkv_integers,
    /// Per sequence: keys below are not there (left padding). Positions are not shifted.
    pub key_starts: qkv_integers,
    /// Per sequence: keys below are seen by every query, whatever causal says (prefix-LM).
    pub prefix: qkv_integers,
    /// Packed documents by their ends, in key positions, ascending, the last the key length: a query sees the keys of the
    /// document that its position is in.
    pub documents: qkv_integers,
    /// For QKV_CAUSAL_OFFSET.
    pub causal_offset: i64,
    /// Where has_window is 1, the query sees keys p - window_left to p + window_right; -1 is unbounded.
    pub window_left: i64,
    /// See window_left.
    pub window_right: i64,
    /// Of the window, every n-th key counted from p; 0 is 1.
    pub window_dilation: i64,
    /// T5's bucketed bias: (buckets, query heads), row-major.
    pub t5_table: qkv_floats,
    /// Even, at least 2 (bidirectional: 4).
    pub t5_buckets: i64,
    /// Distances from here on share the last bucket.
    pub t5_max_distance: i64,
    /// QKV_DTYPE_BOOL (batch or 1, heads or 1, query blocks, key blocks): blocks of block_mask_queries x block_mask_keys
    /// that are seen.
    pub block_mask: *const qkv_tensor,
    /// Queries of a block.
    pub block_mask_queries: i64,
    /// Keys of a block.
    pub block_mask_keys: i64,
    /// Queries are rotated when they are loaded.
    pub rotary: *const qkv_rotary,
    /// To these positions: one per query of a sequence, the same for all batches, or (batch, query length).
    pub rotary_positions: qkv_integers,
    /// The factor of q . k, where has_scale is 1; else it is 1 / sqrt(key dim).
    pub scale: f32,
    /// Scores become softcap tanh(score / softcap); 0 does not.
    pub softcap: f32,
    /// 0 or 1: whether scale is given.
    pub has_scale: u32,
    /// 0 or 1: whether window_left and window_right are given.
    pub has_window: u32,
    /// The causal mask.
    pub causal: qkv_causal,
    /// 0 or 1: whether keys after the query have buckets of their own in t5_table.
    pub t5_bidirectional: u32,
}

// SAFETY: repr(C), its size first, all numbers and raw addresses.
unsafe impl Versioned for qkv_attention_options {
    const NAME: &'static str = "options";
}

/// Where results go.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_attention_outputs {
    /// sizeof(qkv_attention_outputs).
    pub struct_size: usize,
    /// (batch, query heads, query length, value dim), any strides, f32, f16 or bf16.
    pub output: qkv_tensor_mut,
    /// If given: the natural log of the sum of exponentials of each query's visible scores and its sink, contiguous (batch,
    /// query heads, query length); -infinity for a query that sees no key and has no sink.
    pub lse: qkv_floats_mut,
    /// If given: the largest of them, in the same shape; any number for a query that has a score of NaN.
    pub maxima: qkv_floats_mut,
}

// SAFETY: repr(C), its size first, all numbers and raw addresses.
unsafe impl Versioned for qkv_attention_outputs {
    const NAME: &'static str = "outputs";
}

/// How long the lists of the options must be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Of the queries: (batch, heads, length, dim).
    pub(crate) query: [usize; 4],
    /// Sequences: the batch, or those of a packed call.
    pub(crate) sequences: usize,
}

/// Options, looked at; lists are copies, masks and biases stay where they are.
#[derive(Debug)]
pub(crate) struct Options {
    scale: Option<f32>,
    softcap: Option<f32>,
    causal: Option<Causal>,
    window: Option<Window>,
    mask: Option<Region>,
    bias: Option<Region>,
    alibi_slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    pub(crate) key_lengths: Option<Vec<usize>>,
    key_starts: Option<Vec<usize>>,
    prefix: Option<Vec<usize>>,
    documents: Option<Vec<usize>>,
    t5: Option<T5>,
    block_mask: Option<BlockMask>,
    pub(crate) rotary: Option<Arc<Rotary>>,
    pub(crate) positions: Option<Vec<usize>>,
}

/// T5's bias, with its table.
#[derive(Debug)]
struct T5 {
    table: Vec<f32>,
    buckets: usize,
    max_distance: usize,
    bidirectional: bool,
}

/// Refuses a field that means nothing without another.
fn alone(field: &str, is_zero: bool, without: &str) -> Result<(), Failure> {
    if is_zero {
        return Ok(());
    }
    Err(Failure::new(QKV_ERROR_VALUE, format!("{field}: given, expected 0 without {without}")))
}

impl Options {
    /// Looks at options; NULL is plain attention.
    ///
    /// # Safety
    /// `from` must be NULL, or options whose pointers are NULL or lead to what they say.
    pub(crate) unsafe fn read(from: *const qkv_attention_options, sizes: Sizes) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let given = unsafe { versioned(from, true) }?;
        let Sizes { query: [batch, heads, length, _], sequences } = sizes;
        let causal = match given.causal {
            QKV_CAUSAL_NONE => None,
            QKV_CAUSAL_TOP_LEFT => Some(Causal::TopLeft),
            QKV_CAUSAL_BOTTOM_RIGHT => Some(Causal::BottomRight),
            QKV_CAUSAL_OFFSET => Some(Causal::Offset(given.causal_offset)),
            other => {
                let what = format!("causal: {other}, expected a QKV_CAUSAL_ number");
                return Err(Failure::new(QKV_ERROR_VALUE, what));
            }
        };
        let has_offset = given.causal == QKV_CAUSAL_OFFSET;
        alone("causal_offset", has_offset || given.causal_offset == 0, "QKV_CAUSAL_OFFSET")?;
        let has_scale = flag("has_scale", given.has_scale)?;
        alone("scale", has_scale || given.scale == 0.0, "has_scale")?;
        // SAFETY: the caller's promise, in both.
        let (t5, block_mask) = unsafe { (t5(&given, heads)?, block_mask(&given)?) };
        // SAFETY: the caller's promise, for all that follow.
        unsafe {
            let rotary = if given.rotary.is_null() { None } else { Some(ROTARIES.get(given.rotary)?) };
            let per_batch = batch.saturating_mul(length);
            let positions = given.rotary_positions.copied("rotary_positions", &[length, per_batch])?;
            alone("rotary_positions", rotary.is_some() || positions.is_none(), "rotary")?;
            let per_sequence = heads.saturating_mul(sequences);
            Ok(Self {
                scale: has_scale.then_some(given.scale),
                softcap: (given.softcap != 0.0).then_some(given.softcap),
                causal,
                window: window(&given)?,
                mask: region("mask", given.mask, |dtype| dtype == QKV_DTYPE_BOOL, "bool")?,
                bias: region("bias", given.bias, |dtype| dtype <= QKV_DTYPE_BF16, "f32, f16 or bf16")?,
                alibi_slopes: given.alibi_slopes.copied("alibi_slopes", &[heads, per_sequence])?,
                sinks: given.sinks.copied("sinks", &[heads])?,
                key_lengths: given.key_lengths.copied("key_lengths", &[sequences])?,
                key_starts: given.key_starts.copied("key_starts", &[sequences])?,
                prefix: given.prefix.copied("prefix", &[sequences])?,
                documents: given.documents.copied("documents", &[])?,
                t5,
                block_mask,
                rotary,
                positions,
            })
        }
    }

    /// Memory that is read where it lies.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region> {
        [self.mask, self.bias].into_iter().flatten()
    }

    /// Looks at the values of the mask, whose shape must have been found to fit.
    ///
    /// # Safety
    /// Its elements must be readable.
    pub(crate) unsafe fn check_mask(&self) -> Result<(), Failure> {
        // SAFETY: the caller's promise.
        self.mask.as_ref().map_or(Ok(()), |region| unsafe { check_bools(region) })
    }

    /// Whether there is a mask in memory.
    pub(crate) fn has_mask(&self) -> bool {
        self.mask.is_some()
    }

    /// The spec. Where it has a rotary embedding without positions, those of `positions` are taken.
    ///
    /// # Safety
    /// Mask and bias must be readable while the spec is used, and not be written; a mask's values must have been checked
    /// before any is read.
    pub(crate) unsafe fn spec<'a>(&'a self, positions: &'a [usize]) -> Result<AttentionSpec<'a>, Failure> {
        let mut spec = AttentionSpec::new();
        spec.scale = self.scale;
        spec.softcap = self.softcap;
        spec.causal = self.causal;
        spec.window = self.window;
        // SAFETY: the caller's promise, in both.
        spec.mask = self.mask.as_ref().map(|region| unsafe { mask(region) }).transpose()?;
        // SAFETY: as above.
        spec.bias = self.bias.as_ref().map(|region| unsafe { bias(region) }).transpose()?;
        spec.alibi_slopes = self.alibi_slopes.as_deref();
        spec.sinks = self.sinks.as_deref();
        spec.key_lengths = self.key_lengths.as_deref();
        spec.key_starts = self.key_starts.as_deref();
        spec.prefix = self.prefix.as_deref();
        spec.documents = self.documents.as_deref();
        spec.block_mask = self.block_mask.as_ref();
        spec.t5_bias = self.t5.as_ref().map(|t5| {
            let &T5 { ref table, buckets, max_distance, bidirectional } = t5;
            T5Bias { table, buckets, max_distance, bidirectional }
        });
        spec.rotary = self
            .rotary
            .as_deref()
            .map(|table| QueryRotary { table, positions: self.positions.as_deref().unwrap_or(positions) });
        Ok(spec)
    }
}

fn window(given: &qkv_attention_options) -> Result<Option<Window>, Failure> {
    let &qkv_attention_options { window_left, window_right, window_dilation, .. } = given;
    if !flag("has_window", given.has_window)? {
        let zero = window_left == 0 && window_right == 0 && window_dilation == 0;
        alone("window", zero, "has_window")?;
        return Ok(None);
    }
    let side = |argument: &'static str, given: i64| match usize::try_from(given) {
        Ok(keys) => Ok(Some(keys)),
        Err(_) if given == -1 => Ok(None),
        Err(_) => Err(Failure::new(QKV_ERROR_VALUE, format!("{argument}: {given}, expected -1 or more"))),
    };
    let window = Window::new(side("window_left", window_left)?, side("window_right", window_right)?);
    let dilation = size("window_dilation", window_dilation)?.max(1);
    Ok(Some(window.with_dilation(dilation)))
}

/// # Safety
/// `from` must be NULL, misaligned or valid for a read.
unsafe fn region(
    argument: &'static str,
    from: *const qkv_tensor,
    takes: impl Fn(qkv_dtype) -> bool,
    expected: &str,
) -> Result<Option<Region>, Failure> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    let region = Region::of(argument, &unsafe { copy(argument, from) }?)?;
    if takes(region.dtype) { Ok(Some(region)) } else { Err(wrong_dtype(argument, region.dtype, expected)) }
}

/// T5's bias, where it is given.
///
/// # Safety
/// The table must be readable.
unsafe fn t5(given: &qkv_attention_options, heads: usize) -> Result<Option<T5>, Failure> {
    let buckets = size("t5_buckets", given.t5_buckets)?;
    let max_distance = size("t5_max_distance", given.t5_max_distance)?;
    let bidirectional = flag("t5_bidirectional", given.t5_bidirectional)?;
    // SAFETY: the caller's promise.
    let table = unsafe { given.t5_table.copied("t5_table", &[buckets.saturating_mul(heads)]) }?;
    let zero = buckets == 0 && max_distance == 0 && !bidirectional;
    alone("t5_buckets, t5_max_distance, t5_bidirectional", table.is_some() || zero, "t5_table")?;
    Ok(table.map(|table| T5 { table, buckets, max_distance, bidirectional }))
}

/// The block mask, built from its table.
///
/// # Safety
/// The table must be readable.
unsafe fn block_mask(given: &qkv_attention_options) -> Result<Option<BlockMask>, Failure> {
    let block = [
        size("block_mask_queries", given.block_mask_queries)?,
        size("block_mask_keys", given.block_mask_keys)?,
    ];
    let is_bool = |dtype| dtype == QKV_DTYPE_BOOL;
    // SAFETY: the caller's promise.
    let Some(table) = unsafe { region("block_mask", given.block_mask, is_bool, "bool") }? else {
        alone("block_mask_queries, block_mask_keys", block == [0, 0], "block_mask")?;
        return Ok(None);
    };
    // The table is copied, as bits, before its sizes can be compared with the keys'.
    const MOST_BLOCKS: usize = 1 << 32;
    let count = table.shape.iter().product::<usize>();
    if count > MOST_BLOCKS {
        let what = format!("block_mask: shape {:?}, expected at most 2^32 blocks", table.shape);
        return Err(Failure::new(QKV_ERROR_MEMORY, what));
    }
    // SAFETY: the caller's promise; all its values are looked at here, before one is read as a truth value.
    let values: Broadcast<'_, bool> = unsafe {
        check_bools(&table)?;
        mask(&table)?
    };
    Ok(Some(BlockMask::from_fn(table.shape, block, |index| values.get(index))?))
}

/// Outputs, looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Results {
    pub(crate) output: Region,
    lse: Option<Region>,
    maxima: Option<Region>,
}

impl Results {
    /// Looks at outputs; `rows` is the length that lse and maxima must have.
    ///
    /// # Safety
    /// `from` must be NULL, misaligned, or valid for reads of the struct.
    pub(crate) unsafe fn read(from: *const qkv_attention_outputs, rows: usize) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let given = unsafe { versioned(from, false) }?;
        let output = Region::of_mut("output", &given.output)?;
        let list = |argument: &'static str, which, list: qkv_floats_mut| {
            let region = list.region(argument)?;
            match region {
                Some(_) if list.count != rows => {
                    let (given, argument) = (list.count, which);
                    Err(qkv::AttentionError::LseLength { argument, given, expected: rows }.into())
                }
                region => Ok::<_, Failure>(region),
            }
        };
        let lse = list("lse", qkv::Argument::Lse, given.lse)?;
        let maxima = list("maxima", qkv::Argument::Maxima, given.maxima)?;
        Ok(Self { output, lse, maxima })
    }

    /// All memory that is written.
    pub(crate) fn regions(&self) -> Vec<Region> {
        [Some(self.output), self.lse, self.maxima].into_iter().flatten().collect()
    }

    /// The LSE's memory.
    ///
    /// # Safety
    /// It must be writable for `'a`, and nothing else access it in that time.
    pub(crate) unsafe fn lse<'a>(&self) -> Option<&'a mut [f32]> {
        // SAFETY: the caller's promise.
        self.lse.as_ref().map(|region| unsafe { slice(region) })
    }

    /// The row maxima's memory.
    ///
    /// # Safety
    /// As [`Self::lse`].
    pub(crate) unsafe fn maxima<'a>(&self) -> Option<&'a mut [f32]> {
        // SAFETY: the caller's promise.
        self.maxima.as_ref().map(|region| unsafe { slice(region) })
    }

    /// Whether the LSE is asked for.
    pub(crate) fn has_lse(&self) -> bool {
        self.lse.is_some()
    }

    /// Whether row maxima are asked for.
    pub(crate) fn has_maxima(&self) -> bool {
        self.maxima.is_some()
    }

    /// What the Rust crates write to.
    ///
    /// # Safety
    /// All of it must be writable for `'a`, apart from each other, and nothing else access it in that time.
    pub(crate) unsafe fn outputs<'a>(&self) -> Result<Outputs<'a>, Failure> {
        // SAFETY: the caller's promise.
        let out: DataMut<'a> = unsafe { data_mut(&self.output) }?;
        let mut outputs = Outputs::new(out);
        // SAFETY: as above.
        outputs.lse = unsafe { self.lse() };
        // SAFETY: as above.
        outputs.maxima = unsafe { self.maxima() };
        Ok(outputs)
    }
}

/// A list as a slice.
///
/// # Safety
/// It must be writable for `'a`, and nothing else access it in that time.
unsafe fn slice<'a>(list: &Region) -> &'a mut [f32] {
    // SAFETY: aligned and not NULL, as a region is, and the caller's promise.
    unsafe { core::slice::from_raw_parts_mut(list.data.cast(), list.shape[3]) }
}
