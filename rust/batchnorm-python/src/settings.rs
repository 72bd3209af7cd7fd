//! Settings that change how long a call takes, but not a bit of its result.

use crate::memory;
use crate::value_error;
use batchnorm::{Error, ThreadSource};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use std::path::PathBuf;

/// Set the number of threads that work on one call, including the caller's. Results do not depend on it.
///
/// Raises:
///     ValueError: n is not from 1 to 1024.
#[pyfunction]
pub(crate) fn set_num_threads(n: &Bound<'_, PyAny>) -> PyResult<()> {
    let threads = match n.extract::<usize>() {
        // Numbers outside the range of usize get the same error as 0.
        Err(error) if error.is_instance_of::<PyOverflowError>(n.py()) => Err(Error::Threads { got: n.to_string() }),
        other => Ok(other?),
    };
    threads.and_then(batchnorm::set_num_threads).map_err(value_error)
}

/// Return the number of threads that work on one call, including the caller's.
///
/// It is the number that was set, else `BATCHNORM_NUM_THREADS`, else the number of CPUs that the affinity mask and the
/// cgroup quota leave to this process.
///
/// Raises:
///     ValueError: `BATCHNORM_NUM_THREADS` is not a number from 1 to 1024.
#[pyfunction]
pub(crate) fn get_num_threads() -> PyResult<usize> {
    batchnorm::get_num_threads().map_err(value_error)
}

/// Set whose threads work on calls: "own", or "openmp" for those of an OpenMP runtime. Results do not depend on it.
///
/// The threads of an OpenMP runtime go on spinning after each of its parallel regions. In a program that uses one all the
/// time, working on its threads is faster than beside them. Each calling thread then works with a team of
/// `get_num_threads()` threads.
///
/// There are OpenMP runtimes on Linux only, and none in a child that was forked after this call: elsewhere the source is
/// "own", which `get_thread_source` tells.
///
/// Args:
///     source: "own" or "openmp".
///     library: Path of the OpenMP runtime: GNU's, LLVM's or Intel's. It stays loaded. None is the runtime that the process
///         shows to all of its libraries (after `import torch`, that of PyTorch), else `libgomp.so.1` of the system; if
///         there is neither, the source is "own".
///
/// Raises:
///     ValueError: source is another name, or is "own" although library is given; library cannot be loaded, or has no
///         `GOMP_parallel`.
#[pyfunction]
#[pyo3(signature = (source, library=None))]
pub(crate) fn set_thread_source(py: Python<'_>, source: &str, library: Option<PathBuf>) -> PyResult<()> {
    py.detach(|| ThreadSource::find(source, library.as_deref())).map(batchnorm::set_thread_source).map_err(value_error)
}

/// Return whose threads work on calls: "own" or "openmp".
///
/// It is the source that was set, else `BATCHNORM_THREAD_SOURCE`, else "own"; and "own" where there is no OpenMP runtime.
///
/// Raises:
///     ValueError: `BATCHNORM_THREAD_SOURCE` is neither "own" nor "openmp".
#[pyfunction]
pub(crate) fn get_thread_source() -> PyResult<&'static str> {
    batchnorm::get_thread_source().map(ThreadSource::name).map_err(value_error)
}

/// Return the name of the instruction-set level in use.
///
/// It is the level that was set, else that of `BATCHNORM_SIMD`, else the highest that this machine can run.
///
/// Raises:
///     ValueError: `BATCHNORM_SIMD` names a level that this machine cannot run.
#[pyfunction]
pub(crate) fn simd_level() -> PyResult<&'static str> {
    batchnorm::simd_level().map(batchnorm::Level::name).map_err(value_error)
}

/// Force an instruction-set level by name; None makes the default choice again.
///
/// Results do not depend on it.
///
/// Raises:
///     ValueError: name is not in `simd_levels()`.
#[pyfunction]
pub(crate) fn set_simd_level(name: Option<&str>) -> PyResult<()> {
    batchnorm::set_simd_level(name).map(drop).map_err(value_error)
}

/// Return the names of the instruction-set levels that this machine can run, lowest first.
#[pyfunction]
pub(crate) fn simd_levels() -> Vec<&'static str> {
    batchnorm::simd_levels().into_iter().map(batchnorm::Level::name).collect()
}

/// Free the memory that is kept for reuse by later outputs.
///
/// Fresh memory takes longer to get than the arithmetic takes that fills it. So the memory of large outputs that no array
/// uses any more is kept: 256 MiB in all or one output, whichever is larger. None is kept if the environment variable
/// `BATCHNORM_KEEP_MEMORY` is 0. Arrays that are still alive are not affected.
///
/// Returns:
///     Number of bytes freed.
#[pyfunction]
pub(crate) fn release_memory(py: Python<'_>) -> usize {
    py.detach(memory::release)
}
