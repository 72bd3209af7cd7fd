//! Python binding.
use pyo3::prelude::*;
/// Compiled core.
#[pymodule]
mod _core {}
