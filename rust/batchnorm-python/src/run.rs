//! Calls of the core without the interpreter lock.

use crate::value_error;
use batchnorm::Error;
use pyo3::prelude::*;

/// Bytes of tensor memory from which the interpreter lock is released: smaller work is done before another thread could
/// use the interpreter.
const WORTH_DETACHING: usize = 32 * 1024;

/// Runs work on `bytes` of tensor memory, without the interpreter lock if there is much of it.
pub(crate) fn run<R: Send>(
    py: Python<'_>,
    bytes: usize,
    work: impl FnOnce() -> Result<R, Error> + Send,
) -> PyResult<R> {
    if bytes < WORTH_DETACHING { work() } else { py.detach(work) }.map_err(value_error)
}
