//! torch tensors: reading what one is, and making new ones. torch is looked for among the loaded modules, never imported: who
//! has a tensor has torch.
//!
//! A tensor leaves through `torch.utils.dlpack.to_dlpack`, which is native; `Tensor.__dlpack__` does the same behind checks
//! in Python that take ten times as long, and those that matter are made here. Subclasses go through `__dlpack__`, which they
//! may have their own opinion on.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyFloat, PyInt, PyTuple, PyType};
use pyo3::{ffi, intern};

use crate::array::{DType, Raw};
use crate::dlpack::Managed;
use crate::error::{bad_type, bad_value};

/// What is needed of torch.
#[derive(Debug)]
pub(crate) struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    to_dlpack: Py<PyAny>,
    empty: Py<PyAny>,
    increment_version: Option<Py<PyAny>>,
    /// The module `torch.autograd.forward_ad`.
    forward_ad: Option<Py<PyAny>>,
    /// `{"dtype": .., "device": "cpu"}` for f32, f16 and bf16: the default device and type may be others.
    options: [Py<PyDict>; 3],
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// torch, where it is loaded.
pub(crate) fn loaded(py: Python<'_>) -> PyResult<Option<&'static Torch>> {
    if let Some(torch) = TORCH.get(py) {
        return Ok(Some(torch));
    }
    let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?;
    let Ok(torch) = modules.get_item(intern!(py, "torch")) else { return Ok(None) };
    // A module that is just being imported, or is not torch, does not have all of it.
    let Ok(found) = Torch::find(&torch) else { return Ok(None) };
    Ok(Some(TORCH.get_or_init(py, || found)))
}

impl Torch {
    fn find(torch: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = torch.py();
        let device = torch.getattr("device")?.call1(("cpu",))?;
        let options = |name| -> PyResult<Py<PyDict>> {
            let options = PyDict::new(py);
            options.set_item("dtype", torch.getattr(name)?)?;
            options.set_item("device", &device)?;
            Ok(options.unbind())
        };
        let autograd = torch.getattr("autograd")?;
        let graph = autograd.getattr("graph");
        let increment_version = graph.and_then(|graph| graph.getattr("increment_version")).ok();
        let forward_ad = autograd.getattr("forward_ad").ok();
        Ok(Self {
            tensor: torch.getattr("Tensor")?.cast_into::<PyType>()?.unbind(),
            parameter: torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
            to_dlpack: torch.getattr("utils")?.getattr("dlpack")?.getattr("to_dlpack")?.unbind(),
            empty: torch.getattr("empty")?.unbind(),
            increment_version: increment_version.map(Bound::unbind),
            forward_ad: forward_ad.map(Bound::unbind),
            options: [options("float32")?, options("float16")?, options("bfloat16")?],
        })
    }

    /// Whether an object is a tensor.
    pub(crate) fn is_tensor(&self, object: &Bound<'_, PyAny>) -> bool {
        // SAFETY: both are type objects. (Not `isinstance`, which torch answers in its own way.)
        unsafe { ffi::PyType_IsSubtype(object.get_type_ptr(), self.tensor.as_ptr().cast()) != 0 }
    }

    /// What a tensor is. One with the negative bit set is resolved, which copies it: `written` ones are refused then.
    pub(crate) fn read(&self, name: &str, tensor: &Bound<'_, PyAny>, written: bool) -> PyResult<Raw> {
        let py = tensor.py();
        if tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
            return Err(bad_value(
                name,
                "a tensor that requires a gradient",
                "one that does not (qkv.torch.scaled_dot_product_attention takes it, without a backward pass yet; tensor.detach() leaves the gradient out)",
            ));
        }
        if self.is_dual(tensor)? {
            return Err(bad_value(
                name,
                "a tensor with a tangent (a dual of torch.autograd.forward_ad)",
                "one without (qkv.torch has no forward-mode derivative yet either; tensor.detach() leaves the tangent out)",
            ));
        }
        if !tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            let given = format!("a tensor on device {}", tensor.getattr(intern!(py, "device"))?.str()?);
            return Err(bad_value(name, given, "one on the CPU"));
        }
        if tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            if written {
                return Err(bad_value(name, "a tensor with its negative bit set", "one that can be written"));
            }
            let resolved = tensor.call_method0(intern!(py, "resolve_neg"))?;
            return self.read(name, &resolved, written);
        }
        let class = tensor.get_type_ptr().cast();
        let plain = class == self.tensor.as_ptr() || class == self.parameter.as_ptr();
        // The capsule keeps the tensor, and the tensor its memory until it is given another (`tensor.data = ..`, `set_`).
        // Subclasses without memory of their own may have none to show.
        let storage = tensor.call_method0(intern!(py, "untyped_storage")).ok();
        let capsule = if plain {
            self.to_dlpack.bind(py).call1((tensor,))
        } else {
            tensor.call_method0(intern!(py, "__dlpack__"))
        };
        let capsule = capsule.map_err(|error| not_exported(py, name, error))?;
        let managed = Managed::take(name, &capsule)?;
        let mut raw = Raw::from_managed(name, managed)?;
        raw.writable = true;
        raw.storage = storage.map(Bound::unbind);
        Ok(raw)
    }

    /// Whether a tensor carries a tangent of forward-mode differentiation, which results would silently lack.
    fn is_dual(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = tensor.py();
        let Some(forward_ad) = &self.forward_ad else { return Ok(false) };
        let forward_ad = forward_ad.bind(py);
        if forward_ad.getattr(intern!(py, "_current_level"))?.extract::<i64>()? < 0 {
            return Ok(false);
        }
        let dual = forward_ad.call_method1(intern!(py, "unpack_dual"), (tensor,))?;
        Ok(!dual.getattr(intern!(py, "tangent"))?.is_none())
    }

    /// A new row-major tensor on the CPU, its values not set. Of f32, f16 or bf16.
    pub(crate) fn new_tensor<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        dtype: DType,
        shape: &[usize],
    ) -> PyResult<Bound<'py, PyAny>> {
        let options = match dtype {
            DType::F32 => &self.options[0],
            DType::F16 => &self.options[1],
            DType::Bf16 => &self.options[2],
            other => return Err(bad_type(name, other.name(), "float32, bfloat16 or float16")),
        };
        self.empty.bind(py).call(PyTuple::new(py, shape)?, Some(options.bind(py)))
    }

    /// The address of a new tensor; None where torch was told to make something else of `torch.empty` (a mode is active).
    pub(crate) fn address(&self, tensor: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        if tensor.get_type_ptr().cast() != self.tensor.as_ptr() {
            return Ok(None);
        }
        let address: usize = tensor.call_method0(intern!(tensor.py(), "data_ptr"))?.extract()?;
        Ok((address != 0).then_some(address))
    }

    /// Tells autograd that a tensor was written.
    pub(crate) fn was_written(&self, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Some(increment_version) = &self.increment_version {
            increment_version.bind(tensor.py()).call1((tensor,))?;
        }
        Ok(())
    }
}

/// Refuses a tensor in the place of a number if it has a derivative: that would be dropped.
pub(crate) fn expect_no_derivative(name: &str, object: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = object.py();
    if object.is_exact_instance_of::<PyFloat>() || object.is_exact_instance_of::<PyInt>() {
        return Ok(());
    }
    let Some(torch) = loaded(py)?.filter(|torch| torch.is_tensor(object)) else { return Ok(()) };
    let given = if object.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
        "a tensor that requires a gradient"
    } else if torch.is_dual(object)? {
        "a tensor with a tangent (a dual of torch.autograd.forward_ad)"
    } else {
        return Ok(());
    };
    Err(bad_type(name, given, "a number (tensor.item() is one, without the derivative)"))
}

/// The exception for an object that did not let its memory be read; what the object raised is its cause.
pub(crate) fn not_exported(py: Python<'_>, name: &str, cause: PyErr) -> PyErr {
    if !cause.is_instance_of::<pyo3::exceptions::PyException>(py) {
        // An interrupt, not a refusal.
        return cause;
    }
    let error = bad_value(name, format!("its memory cannot be read ({cause})"), "an array on the CPU");
    error.set_cause(py, Some(cause));
    error
}
