//! What changes the cost of a call, and not a bit of its result.

use crate::memory;
use crate::value_error;
use batchnorm::Error;
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

/// Sets the number of threads that work on one call, the caller's own included. Results do not depend on it.
///
/// Raises:
///     ValueError: n is not from 1 to 1024.
#[pyfunction]
pub(crate) fn set_num_threads(n: &Bound<'_, PyAny>) -> PyResult<()> {
    let threads = match n.extract::<usize>() {
        // Numbers that no usize holds are refused by the same words as 0.
        Err(error) if error.is_instance_of::<PyOverflowError>(n.py()) => Err(Error::Threads { got: n.to_string() }),
        other => Ok(other?),
    };
    threads.and_then(batchnorm::set_num_threads).map_err(value_error)
}

/// The number of threads that work on one call.
///
/// It is what was set, else ``BATCHNORM_NUM_THREADS``, else the CPUs that the affinity mask and the cgroup quota leave
/// to this process.
///
/// Raises:
///     ValueError: ``BATCHNORM_NUM_THREADS`` is not a number from 1 to 1024.
#[pyfunction]
pub(crate) fn get_num_threads() -> PyResult<usize> {
    batchnorm::get_num_threads().map_err(value_error)
}

/// The instruction-set level in use.
///
/// It is what was set, else ``BATCHNORM_SIMD``, else the highest that this machine can run.
///
/// Raises:
///     ValueError: ``BATCHNORM_SIMD`` names a level that this machine cannot run.
#[pyfunction]
pub(crate) fn simd_level() -> PyResult<&'static str> {
    batchnorm::simd_level().map(batchnorm::Level::name).map_err(value_error)
}

/// Forces an instruction-set level by name; ``None`` goes back to the choice made at first use.
///
/// Results do not depend on it.
///
/// Raises:
///     ValueError: name is none of ``simd_levels()``.
#[pyfunction]
pub(crate) fn set_simd_level(name: Option<&str>) -> PyResult<()> {
    batchnorm::set_simd_level(name).map(drop).map_err(value_error)
}

/// Names of the instruction-set levels that this machine can run, lowest first.
#[pyfunction]
pub(crate) fn simd_levels() -> Vec<&'static str> {
    batchnorm::simd_levels().into_iter().map(batchnorm::Level::name).collect()
}

/// Frees the memory that is kept for outputs to come.
///
/// Fresh memory costs more than the arithmetic that fills it. So the memory of large outputs that no array uses any more
/// is kept: 256 MiB in all or one output, whichever is larger; none where the environment variable
/// ``BATCHNORM_KEEP_MEMORY`` is 0. Arrays that are alive are not touched.
///
/// Returns:
///     Bytes freed.
#[pyfunction]
pub(crate) fn release_memory(py: Python<'_>) -> usize {
    py.detach(memory::release)
}
