//! The native half of the Python module `qkv`: attention and matrix products on numpy arrays, torch tensors and whatever
//! else has `__dlpack__`.
//!
//! A thin face: it turns Python objects into checked views (`array.rs`), options into a spec (`options.rs`), calls the
//! Rust API without the GIL, and turns errors into exceptions that name the argument (`error.rs`). What stands behind the
//! names is documented at the functions (`help`); their types are in `python/qkv/_qkv.pyi`.

mod array;
mod attention;
mod copy;
mod dlpack;
mod error;
mod flash;
mod kvcache;
mod matmul;
mod numpy_array;
mod options;
mod pool;
mod rotary;
mod sdpa;
mod torch_tensor;
mod varlen;
mod views;

use pyo3::prelude::*;

/// The native half of `qkv`; import `qkv` instead.
#[pymodule]
fn _qkv(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // The C interface of numpy panics where there is none: say so here, in an ordinary way.
    module.py().import("numpy")?;
    pool::start();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(sdpa::scaled_dot_product_attention, module)?)?;
    module.add_function(wrap_pyfunction!(attention::attention, module)?)?;
    module.add_function(wrap_pyfunction!(attention::merge_states, module)?)?;
    module.add_function(wrap_pyfunction!(matmul::matmul, module)?)?;
    module.add_function(wrap_pyfunction!(pool::num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(pool::set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(pool::cpu_info, module)?)?;
    module.add_function(wrap_pyfunction!(flash::flash_attn_func, module)?)?;
    module.add_function(wrap_pyfunction!(varlen::flash_attn_varlen_func, module)?)?;
    module.add_function(wrap_pyfunction!(kvcache::flash_attn_with_kvcache, module)?)?;
    module.add_function(wrap_pyfunction!(rotary::rotate, module)?)?;
    Ok(())
}
