//! The classes that training returns to Python: moments, gradient sums, the cache of a forward pass.

use crate::buffer::{Tensor, new_vector};
use crate::epilogue::Epilogue;
use crate::parameters::vector;
use crate::value_error;
use batchnorm::Activation;
use numpy::{PyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::Arc;

/// Count, mean and M2 of each channel, in float64: immutable, and mergeable over parts of the data.
///
/// `m2` is Σ(x − mean)². The moments of parts merge into those of the whole by the update of Chan, Golub and LeVeque
/// (1979). The moments of no values (count 0) are the neutral element.
///
/// Args:
///     count: Values per channel, shape (channels,); finite, 0 or more.
///     mean: Mean per channel, shape (channels,).
///     m2: Sum of squared deviations per channel, shape (channels,); 0 or more.
///
/// Raises:
///     ValueError: Shapes differ, or a count or m2 is negative.
///     TypeError: An argument is not an array of real numbers.
#[pyclass(frozen, eq, module = "batchnorm", name = "Moments")]
#[derive(PartialEq)]
pub(crate) struct Moments(pub(crate) Arc<batchnorm::Moments>);

impl From<batchnorm::Moments> for Moments {
    fn from(moments: batchnorm::Moments) -> Self {
        Self(moments.into())
    }
}

#[pymethods]
impl Moments {
    #[new]
    fn new(count: &Bound<'_, PyAny>, mean: &Bound<'_, PyAny>, m2: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (count, mean, m2) = (vector("count", count)?, vector("mean", mean)?, vector("m2", m2)?);
        batchnorm::Moments::new(count, mean, m2).map(Self::from).map_err(value_error)
    }

    /// Number of channels.
    #[getter]
    fn channels(&self) -> usize {
        self.0.channels()
    }

    /// Values per channel, shape (channels,), float64: the paper's m.
    #[getter]
    fn count<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.0.count())
    }

    /// Mean per channel, shape (channels,), float64: the paper's μ_B.
    #[getter]
    fn mean<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.0.mean())
    }

    /// Σ(x − mean)² per channel, shape (channels,), float64.
    #[getter]
    fn m2<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.0.m2())
    }

    /// Biased variance m2/count, shape (channels,), float64: the paper's σ²_B (Algorithm 1).
    ///
    /// Raises:
    ///     ValueError: A channel has no value.
    #[getter]
    fn var<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, &self.0.var().map_err(value_error)?)
    }

    /// Unbiased variance m2/(count − 1), shape (channels,), float64 (section 3.1).
    ///
    /// Raises:
    ///     ValueError: A channel has fewer than 2 values.
    #[getter]
    fn var_unbiased<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, &self.0.var_unbiased().map_err(value_error)?)
    }

    /// Return the moments over the values of both, as a new object.
    ///
    /// Raises:
    ///     ValueError: The numbers of channels differ.
    fn merge(&self, other: &Self) -> PyResult<Self> {
        self.0.merge(&other.0).map(Self::from).map_err(value_error)
    }

    /// Encode as bytes: a header with the version, the number of channels, then count, mean and m2, little-endian.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        new_bytes(py, &self.0.to_bytes().map_err(value_error)?)
    }

    /// Decode the bytes that `to_bytes` returned.
    ///
    /// Raises:
    ///     ValueError: The bytes are not those of Moments.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        batchnorm::Moments::from_bytes(data).map(Self::from).map_err(value_error)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((slf.get_type().getattr("from_bytes")?, (slf.get().to_bytes(slf.py())?,)))
    }

    fn __repr__(&self) -> String {
        format!("Moments(channels={}, count={})", self.0.channels(), range(self.0.count()))
    }
}

/// Σdy·x̂ and Σdy of each channel, and the number of values summed, in float64: immutable, and mergeable over parts.
///
/// Args:
///     count: Values per channel, shape (channels,); finite, 0 or more.
///     dgamma: Σdy·x̂ per channel, shape (channels,).
///     dbeta: Σdy per channel, shape (channels,).
///
/// Raises:
///     ValueError: Shapes differ, or a count is negative.
///     TypeError: An argument is not an array of real numbers.
#[pyclass(frozen, eq, module = "batchnorm", name = "GradientSums")]
#[derive(PartialEq)]
pub(crate) struct GradientSums(pub(crate) batchnorm::GradientSums);

#[pymethods]
impl GradientSums {
    #[new]
    fn new(count: &Bound<'_, PyAny>, dgamma: &Bound<'_, PyAny>, dbeta: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (count, dgamma, dbeta) = (vector("count", count)?, vector("dgamma", dgamma)?, vector("dbeta", dbeta)?);
        batchnorm::GradientSums::new(count, dgamma, dbeta).map(Self).map_err(value_error)
    }

    /// Number of channels.
    #[getter]
    fn channels(&self) -> usize {
        self.0.channels()
    }

    /// Values per channel, shape (channels,), float64.
    #[getter]
    fn count<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.0.count())
    }

    /// ∂ℓ/∂γ = Σdy·x̂, shape (channels,), float64 (section 3).
    #[getter]
    fn dgamma<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.0.dgamma())
    }

    /// ∂ℓ/∂β = Σdy, shape (channels,), float64 (section 3).
    #[getter]
    fn dbeta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.0.dbeta())
    }

    /// Return the sums over the values of both, as a new object.
    ///
    /// Raises:
    ///     ValueError: The numbers of channels differ.
    fn merge(&self, other: &Self) -> PyResult<Self> {
        self.0.merge(&other.0).map(Self).map_err(value_error)
    }

    /// Encode as bytes: a header with the version, the number of channels, then count, dγ and dβ, little-endian.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        new_bytes(py, &self.0.to_bytes().map_err(value_error)?)
    }

    /// Decode the bytes that `to_bytes` returned.
    ///
    /// Raises:
    ///     ValueError: The bytes are not those of GradientSums.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        batchnorm::GradientSums::from_bytes(data).map(Self).map_err(value_error)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((slf.get_type().getattr("from_bytes")?, (slf.get().to_bytes(slf.py())?,)))
    }

    fn __repr__(&self) -> String {
        format!("GradientSums(channels={}, count={})", self.0.channels(), range(self.0.count()))
    }
}

/// A new `bytes` object, or MemoryError.
pub(crate) fn new_bytes<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, data.len(), |bytes| {
        bytes.copy_from_slice(data);
        Ok(())
    })
}

/// Counts as a short text: one number if all are equal, else "least..most".
fn range(count: &[f64]) -> String {
    let (least, most) = count.iter().fold((f64::INFINITY, 0.0), |(a, b), &n| (n.min(a), n.max(b)));
    if least == most { least.to_string() } else { format!("{least}..{most}") }
}

/// Everything that a backward pass needs of its forward pass.
///
/// It holds x and residual by reference: they must not be changed between the two passes.
#[pyclass(frozen, module = "batchnorm", name = "Cache")]
pub(crate) struct Cache {
    pub(crate) x: Option<Py<PyUntypedArray>>,
    pub(crate) moments: Arc<batchnorm::Moments>,
    pub(crate) coefficients: batchnorm::Coefficients,
    /// The channel axis of the forward pass, as it was passed in.
    #[pyo3(get)]
    pub(crate) channel_axis: isize,
    pub(crate) activation: Option<Activation>,
    pub(crate) residual: Option<Py<PyUntypedArray>>,
}

impl Cache {
    pub(crate) fn new(
        x: Option<Tensor<'_>>,
        moments: Arc<batchnorm::Moments>,
        coefficients: batchnorm::Coefficients,
        channel_axis: isize,
        Epilogue { activation, residual }: Epilogue<'_>,
    ) -> Self {
        let unbound = |tensor: Option<Tensor<'_>>| tensor.map(|tensor| tensor.array.unbind());
        Self { x: unbound(x), moments, coefficients, channel_axis, activation, residual: unbound(residual) }
    }
}

#[pymethods]
impl Cache {
    /// The input of the forward pass; None if y was written over it.
    #[getter]
    fn x<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyUntypedArray>> {
        self.x.as_ref().map(|x| x.bind(py).clone())
    }

    /// The residual of the forward pass; None if it had none.
    #[getter]
    fn residual<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyUntypedArray>> {
        self.residual.as_ref().map(|residual| residual.bind(py).clone())
    }

    /// The name of the forward pass's activation, "relu" or "relu6"; None if it had none.
    #[getter]
    fn activation(&self) -> Option<&'static str> {
        self.activation.map(Activation::name)
    }

    /// The moments by which x was normalized.
    #[getter]
    fn moments(&self) -> Moments {
        Moments(Arc::clone(&self.moments))
    }

    /// Mean by which x was normalized, shape (channels,), float64.
    #[getter]
    fn mean<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.coefficients.mean())
    }

    /// 1/√(σ² + ε) of each channel, shape (channels,), float64.
    #[getter]
    fn invstd<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.coefficients.invstd())
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let x = self.x.as_ref().map_or("no x".to_owned(), |x| format!("x of shape {:?}", x.bind(py).shape()));
        format!("Cache({x}, channel_axis={})", self.channel_axis)
    }
}
