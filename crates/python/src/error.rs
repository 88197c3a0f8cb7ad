//! Exceptions: each names the argument, what was given and what was expected.

use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use qkv::gemm::GemmError;
use qkv::{Argument, AttentionError, TensorError};

/// `ValueError`: "name: given, expected ...".
pub(crate) fn bad_value(name: &str, given: impl AsRef<str>, expected: impl AsRef<str>) -> PyErr {
    PyValueError::new_err(format!("{name}: {}, expected {}", given.as_ref(), expected.as_ref()))
}

/// `TypeError`: likewise.
pub(crate) fn bad_type(name: &str, given: impl AsRef<str>, expected: impl AsRef<str>) -> PyErr {
    PyTypeError::new_err(format!("{name}: {}, expected {}", given.as_ref(), expected.as_ref()))
}

/// `NotImplementedError`: "name: ... not supported".
pub(crate) fn not_supported(name: &str, what: impl AsRef<str>) -> PyErr {
    PyNotImplementedError::new_err(format!("{name}: {} is not supported", what.as_ref()))
}

/// A view that the Rust API refuses.
pub(crate) fn tensor_error(name: &str, error: &TensorError) -> PyErr {
    PyValueError::new_err(format!("{name}: {error}"))
}

/// What a function calls the tensors of the Rust API.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    pub(crate) query: &'static str,
    pub(crate) key: &'static str,
    pub(crate) value: &'static str,
    pub(crate) output: &'static str,
    /// What `spec.mask` and `spec.bias` are called.
    pub(crate) mask: &'static str,
    pub(crate) bias: &'static str,
    /// What `spec.key_lengths` is called.
    pub(crate) key_lengths: &'static str,
}

impl Names {
    /// Those of `qkv.attention`.
    pub(crate) const ATTENTION: Self = Self {
        query: "q",
        key: "k",
        value: "v",
        output: "out",
        mask: "mask",
        bias: "bias",
        key_lengths: "kv_lengths",
    };

    fn of(&self, argument: Argument) -> String {
        match argument {
            Argument::Query => self.query.to_owned(),
            Argument::Key => self.key.to_owned(),
            Argument::Value => self.value.to_owned(),
            Argument::Output => self.output.to_owned(),
            other => other.to_string(),
        }
    }

    fn of_list(&self, argument: &'static str) -> &'static str {
        match argument {
            "mask" => self.mask,
            "bias" => self.bias,
            "key_lengths" | "lengths" => self.key_lengths,
            other => other,
        }
    }

    /// The exception for an error of the Rust API, in the caller's names.
    pub(crate) fn exception(&self, error: &AttentionError) -> PyErr {
        let text = match error {
            &AttentionError::ShapeMismatch { argument, axis, given, expected, because_of } => format!(
                "{}: {axis} is {given}, expected {expected} to match {}",
                self.of(argument),
                self.of(because_of)
            ),
            &AttentionError::ZeroSize { argument, axis } => {
                format!("{}: {axis} is 0, expected at least 1", self.of(argument))
            }
            &AttentionError::HeadsNotDivisible { query_heads, kv_heads } => format!(
                "{}: {query_heads} heads, expected a multiple of the {kv_heads} heads of {}",
                self.query, self.key
            ),
            &AttentionError::TooLong { argument, given, limit } => {
                format!("{}: length {given}, expected at most {limit}", self.of(argument))
            }
            &AttentionError::DoesNotBroadcast { argument, given, expected } => format!(
                "{}: shape {given:?} does not broadcast to (batch, heads, query length, key length), expected {expected:?} \
                 or 1 in place of each",
                self.of_list(argument)
            ),
            &AttentionError::Count { argument, given, expected } => {
                format!("{}: {given} entries, expected {expected}", self.of_list(argument))
            }
            &AttentionError::Beyond { argument, index, given, limit } => {
                format!("{}[{index}]: {given}, expected at most {limit}", self.of_list(argument))
            }
            AttentionError::NotTogether { .. } => return PyNotImplementedError::new_err(error.to_string()),
            AttentionError::Isa(error) => return PyRuntimeError::new_err(format!("QKV_ISA: {error}")),
            other => other.to_string(),
        };
        PyValueError::new_err(text)
    }
}

/// The exception for an error of a matrix product.
pub(crate) fn gemm_error(error: &GemmError) -> PyErr {
    match error {
        GemmError::Isa(error) => PyRuntimeError::new_err(format!("QKV_ISA: {error}")),
        other => PyValueError::new_err(other.to_string()),
    }
}
