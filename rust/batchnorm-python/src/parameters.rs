//! Per-channel parameters: real arrays that broadcast to (channels,), held in float64.

use crate::buffer::{collected, floats, real_array};
use numpy::{PyArray1, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

/// The arguments gamma, beta and eps; absent ones stay absent.
pub(crate) struct Parameters {
    gamma: Option<Vec<f64>>,
    beta: Option<Vec<f64>>,
    eps: f64,
}

impl Parameters {
    /// Parameters in float64, with a value for each channel.
    pub(crate) fn new(gamma: Option<Vec<f64>>, beta: Option<Vec<f64>>, eps: f64) -> Self {
        Self { gamma, beta, eps }
    }

    pub(crate) fn read(
        gamma: Option<&Bound<'_, PyAny>>,
        beta: Option<&Bound<'_, PyAny>>,
        eps: f64,
        channels: usize,
    ) -> PyResult<Self> {
        let read = |name, value: Option<&Bound<'_, PyAny>>| value.map(|v| per_channel(name, v, channels)).transpose();
        Ok(Self::new(read("gamma", gamma)?, read("beta", beta)?, eps))
    }

    /// The parameters as the core takes them.
    pub(crate) fn of(&self) -> batchnorm::Parameters<'_> {
        batchnorm::Parameters { gamma: self.gamma.as_deref(), beta: self.beta.as_deref(), eps: self.eps }
    }
}

/// The argument as float64, one value for each channel; a single value is repeated.
pub(crate) fn per_channel(argument: &str, value: &Bound<'_, PyAny>, channels: usize) -> PyResult<Vec<f64>> {
    let values = vector(argument, value)?;
    match values.len() {
        n if n == channels => Ok(values),
        1 => collected(std::iter::repeat_n(values[0], channels)),
        n => {
            Err(PyValueError::new_err(format!("{argument} has shape ({n},); wanted ({channels},) or a single number")))
        }
    }
}

/// The argument as a vector of float64: a number, or a real array of one axis.
pub(crate) fn vector(argument: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<f64>> {
    if let Some(values) = floats(value)? {
        return Ok(values);
    }
    let py = value.py();
    let array = real_array(argument, value)?;
    let dtype = array.dtype();
    let wanted = "wanted real numbers, an array of shape (channels,)";
    let array = array
        .call_method1(intern!(py, "astype"), (numpy::dtype::<f64>(py),))
        .map_err(|_| PyTypeError::new_err(format!("{argument} has dtype {dtype}; {wanted}")))?;
    match array.cast::<PyUntypedArray>()?.shape() {
        [] | [_] => {}
        shape => {
            return Err(PyValueError::new_err(format!("{argument} has shape {shape:?}; {wanted}, or a single number")));
        }
    }
    let flat = array.call_method0(intern!(py, "ravel"))?.cast_into::<PyArray1<f64>>()?;
    collected(flat.readonly().as_slice()?.iter().copied())
}
