//! The Python binding `batchnorm._core`.
//!
//! A function parses its arguments, releases the interpreter lock, calls the core and wraps the result; it does no
//! arithmetic itself.

mod backward;
mod buffer;
mod copy;
mod epilogue;
mod frozen;
mod host;
mod json;
mod memory;
mod parameters;
mod run;
mod settings;
mod training;
mod values;
mod whitening;
mod whitening_map;

use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;

/// The compiled core; import `batchnorm` to use it.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::buffer::{HostTypes, real_array, tensor};
    #[pymodule_export]
    use crate::copy::copy;
    #[pymodule_export]
    use crate::frozen::{Coefficients, infer, infer_backward};
    #[pymodule_export]
    use crate::host::Host;
    #[pymodule_export]
    use crate::json::{json_cut_data, json_parse, json_put_data};
    #[pymodule_export]
    use crate::settings::{
        get_num_threads, get_thread_source, release_memory, set_num_threads, set_simd_level, set_thread_source,
        simd_level, simd_levels,
    };
    #[pymodule_export]
    use crate::training::{backward, gradient_apply, gradient_sums, moments, normalize, train_forward};
    #[pymodule_export]
    use crate::values::{Cache, GradientSums, Moments};
    #[pymodule_export]
    use crate::whitening::{CoMoments, WhiteningCache, comoments, whiten_backward, whiten_forward, whitening_matrix};
    #[pymodule_export]
    use crate::whitening_map::WhiteningMap;

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "the name that Python gives it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// The kinds of errors of the core; an exception made from one names its kind in the attribute `kind`.
    #[pymodule_export]
    const ERROR_KINDS: &[&str] = batchnorm::Error::KINDS;
}

/// Turns an error of the core into a Python exception: a `MemoryError` or a `ValueError`, whose attribute `kind` names the
/// variant.
fn value_error(error: batchnorm::Error) -> PyErr {
    let exception = match error {
        batchnorm::Error::NoMemory { .. } => PyMemoryError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    };
    match Python::attach(|py| exception.value(py).setattr("kind", error.kind())) {
        Ok(()) => exception,
        Err(failed) => failed,
    }
}
