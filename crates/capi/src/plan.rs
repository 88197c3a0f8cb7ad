//! Plans: the sizes, types and options of a call, looked at once and kept.

use core::ffi::c_char;
use std::ffi::CString;
use std::sync::OnceLock;

use qkv::simd::Isa;
use qkv::{Data, Int8Ref, TensorError, TensorRef, bf16, explain, f16};

use crate::attention::{check_only, compute, inputs, rows};
use crate::handles::Handles;
use crate::options::{Options, Results, Sizes, qkv_attention_options, qkv_attention_outputs};
use crate::region::{Region, dtype_name};
use crate::status::{Failure, guard, guard_value, qkv_status, qkv_status::*};
use crate::types::*;
use crate::views::copy;

/// Attention of certain sizes, types and options, which have been looked at.
#[derive(Debug)]
pub struct qkv_attention_plan {
    // Handles are numbers; nothing is ever behind one.
    _opaque: [u8; 0],
}

#[derive(Debug)]
struct Plan {
    /// Of query, key and value.
    tensors: [Kind; 3],
    options: Options,
    explanation: OnceLock<CString>,
}

/// Size and type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    shape: [usize; 4],
    dtype: qkv_dtype,
}

static PLANS: Handles<Plan> = Handles::new("plan");

/// More pairs of 16 rows and 128 keys than this take seconds to count.
const MOST_PAIRS: f64 = (1u32 << 28) as f64;

const NAMES: [&str; 3] = ["query", "key", "value"];

impl Kind {
    /// Of a descriptor; strides and address are not looked at.
    ///
    /// # Safety
    /// `from` must be NULL, misaligned or valid for a read.
    unsafe fn read(argument: &'static str, from: *const qkv_tensor) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let tensor = unsafe { copy(argument, from) }?;
        let any = core::ptr::without_provenance(64);
        let tensor = qkv_tensor { data: any, strides: [0; 4], buffer: core::ptr::null(), ..tensor };
        let Region { shape, dtype, .. } = Region::of(argument, &tensor)?;
        let takes = dtype <= QKV_DTYPE_BF16 || dtype == QKV_DTYPE_I8 && argument != "query";
        if !takes {
            let expected = if argument == "query" { "f32, f16 or bf16" } else { "f32, f16, bf16 or int8" };
            return Err(crate::region::wrong_dtype(argument, dtype, expected));
        }
        Ok(Self { shape, dtype })
    }
}

/// A row of each type, which stands for all rows of a tensor.
struct Row {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
    int8: Vec<i8>,
}

fn filled<T: Clone>(dim: usize, value: T) -> Result<Vec<T>, Failure> {
    let mut row = Vec::new();
    row.try_reserve_exact(dim).map_err(|_| {
        Failure::new(QKV_ERROR_MEMORY, format!("query: a row of {dim} values does not fit in memory"))
    })?;
    row.resize(dim, value);
    Ok(row)
}

impl Row {
    fn view(&self, Kind { shape, dtype }: Kind) -> Result<Data<'_>, TensorError> {
        let strides = [0, 0, 0, 1];
        Ok(match dtype {
            QKV_DTYPE_F16 => Data::F16(TensorRef::from_slice_strided(&self.f16, 0, shape, strides)?),
            QKV_DTYPE_BF16 => Data::Bf16(TensorRef::from_slice_strided(&self.bf16, 0, shape, strides)?),
            QKV_DTYPE_I8 => {
                let scales = [shape[0], shape[1], shape[2], 1];
                let scales = TensorRef::from_slice_strided(&self.f32, 0, scales, strides)?;
                let values = TensorRef::from_slice_strided(&self.int8, 0, shape, strides)?;
                Data::Int8(Int8Ref::new(values, scales, None)?)
            }
            _ => Data::F32(TensorRef::from_slice_strided(&self.f32, 0, shape, strides)?),
        })
    }
}

impl Plan {
    /// Asks something that does not depend on values, with tensors of which all rows are one.
    fn ask<R>(&self, ask: impl FnOnce([Data<'_>; 3]) -> Result<R, Failure>) -> Result<R, Failure> {
        let dim = self.tensors.iter().map(|kind| kind.shape[3]).fold(1, usize::max);
        let row = Row {
            f32: filled(dim, 0.0)?,
            f16: filled(dim, f16::ZERO)?,
            bf16: filled(dim, bf16::ZERO)?,
            int8: filled(dim, 0)?,
        };
        let view = |which: usize| {
            row.view(self.tensors[which]).map_err(|error| Failure::tensor(NAMES[which], &error))
        };
        ask([view(0)?, view(1)?, view(2)?])
    }

    fn check(&self) -> Result<(), Failure> {
        Isa::active()?;
        self.ask(|tensors| {
            // SAFETY: the checks look at shapes alone, at no value of mask or bias.
            let spec = unsafe { self.options.spec(&[]) }?;
            Ok(check_only(tensors, &spec)?)
        })
    }

    /// What `explain` says.
    fn explain(&self) -> Result<CString, Failure> {
        let [query, key, _] = self.tensors;
        let pairs = (rows(query.shape) as f64 / 16.0) * (key.shape[2] as f64 / 128.0);
        if pairs > MOST_PAIRS {
            let what =
                format!("plan: {pairs:.0} blocks of scores to count, not supported beyond {MOST_PAIRS}");
            return Err(Failure::new(QKV_ERROR_NOT_SUPPORTED, what));
        }
        self.ask(|[q, k, v]| {
            // SAFETY: counting looks at intervals and tables, at no value of mask or bias.
            let spec = unsafe { self.options.spec(&[]) }?;
            let text = explain(q, k, v, &spec)?.to_string();
            Ok(CString::new(text).unwrap_or_default())
        })
    }
}

/// Makes a plan for attention of these sizes and types, and looks at all that can be wrong with them and the options.
///
/// Of query, key and value sizes and types count, and may come with data NULL. Lists of the options are copied; the data of
/// mask and bias is not, and must stay where it is until the plan is destroyed, but may change between calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_attention_plan_create(
    query: *const qkv_tensor,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    options: *const qkv_attention_options,
    plan: *mut *mut qkv_attention_plan,
) -> qkv_status {
    guard(|| {
        let make = || {
            // SAFETY: the caller's promise, see the header's text.
            unsafe {
                let tensors =
                    [Kind::read("query", query)?, Kind::read("key", key)?, Kind::read("value", value)?];
                let query = tensors[0].shape;
                let options = Options::read(options, Sizes { query, sequences: query[0] })?;
                let plan = Plan { tensors, options, explanation: OnceLock::new() };
                plan.check()?;
                Ok(plan)
            }
        };
        // SAFETY: as above.
        unsafe { PLANS.give(plan, make) }
    })
}

/// Ends a plan; NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_attention_plan_destroy(plan: *mut qkv_attention_plan) -> qkv_status {
    guard(|| PLANS.end(plan))
}

/// Attention as planned, of tensors with the plan's sizes and types and any strides. Threads may share a plan.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_attention_plan_run(
    plan: *const qkv_attention_plan,
    query: *const qkv_tensor,
    key: *const qkv_tensor,
    value: *const qkv_tensor,
    outputs: *const qkv_attention_outputs,
) -> qkv_status {
    guard(|| {
        let plan = PLANS.get(plan)?;
        // SAFETY: the caller's promise, see the header's text.
        unsafe {
            let inputs = inputs(query, key, value)?;
            for (input, planned) in inputs.iter().zip(&plan.tensors) {
                let Region { argument, shape, dtype, .. } = input.region;
                if dtype != planned.dtype {
                    return Err(crate::region::wrong_dtype(argument, dtype, dtype_name(planned.dtype)));
                }
                if shape != planned.shape {
                    let what =
                        format!("{argument}: shape {shape:?}, expected the plan's {:?}", planned.shape);
                    return Err(Failure::new(QKV_ERROR_SHAPE, what));
                }
            }
            let results = Results::read(outputs, rows(inputs[0].shape()))?;
            compute(&inputs, &plan.options, &results)
        }
    })
}

/// How the plan is carried out, in words: the kernel, block sizes, tasks, scratch, and how much of the score matrix is
/// computed. NULL where the plan is not live or too large to count. The text lives as long as the plan.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_attention_plan_explain(plan: *const qkv_attention_plan) -> *const c_char {
    guard_value(core::ptr::null(), || {
        let plan = PLANS.get(plan)?;
        if let Some(text) = plan.explanation.get() {
            return Ok(text.as_ptr());
        }
        let text = plan.explain()?;
        Ok(plan.explanation.get_or_init(|| text).as_ptr())
    })
}
