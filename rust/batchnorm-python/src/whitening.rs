//! Whitening: comoments, the matrix, and the passes of training.

use crate::backward::gradients_type;
use crate::buffer::{Tensor, collected, new_vector, real_array, with_element};
use crate::parameters::{Parameters, vector};
use crate::run::run;
use crate::value_error;
use crate::values::{Moments, new_bytes};
use batchnorm::Method;
use numpy::{PyArray1, PyArray3, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyUserWarning, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::ffi::CString;
use std::sync::Arc;

/// What matrix products count as, in bytes of tensor memory: enough for the interpreter lock to be released.
const LONG: usize = usize::MAX;

/// The argument as float64 in row-major order, with its shape; it must have `N` axes.
pub(crate) fn array<const N: usize>(
    argument: &str,
    value: &Bound<'_, PyAny>,
    wanted: &str,
) -> PyResult<(Vec<f64>, [usize; N])> {
    let py = value.py();
    let array = real_array(argument, value)?;
    let dtype = array.dtype();
    let shape = <[usize; N]>::try_from(array.shape())
        .map_err(|_| PyValueError::new_err(format!("{argument} has shape {:?}; wanted {wanted}", array.shape())))?;
    let array = array
        .call_method1(intern!(py, "astype"), (numpy::dtype::<f64>(py),))
        .map_err(|_| PyTypeError::new_err(format!("{argument} has dtype {dtype}; wanted real numbers")))?;
    let flat = array.call_method0(intern!(py, "ravel"))?.cast_into::<PyArray1<f64>>()?;
    Ok((collected(flat.readonly().as_slice()?.iter().copied())?, shape))
}

/// Matrices of shape (groups, D, D): their elements and the number of groups.
fn matrices(argument: &str, value: &Bound<'_, PyAny>) -> PyResult<(Vec<f64>, usize, usize)> {
    let wanted = "(groups, D, D), a square matrix for each group of D channels";
    let (values, [groups, rows, cols]) = array(argument, value, wanted)?;
    if rows != cols || values.is_empty() {
        let shape = [groups, rows, cols];
        return Err(PyValueError::new_err(format!("{argument} has shape {shape:?}; wanted {wanted}")));
    }
    Ok((values, groups, rows))
}

fn cube<'py>(py: Python<'py>, values: &[f64], groups: usize) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let d = (values.len() / groups).isqrt();
    new_vector(py, values)?.reshape([groups, d, d])
}

/// The argument as a number of things; the core refuses 0.
fn number(argument: &str, value: isize) -> PyResult<usize> {
    value.try_into().map_err(|_| PyValueError::new_err(format!("{argument} is {value}; wanted 1 or more")))
}

fn method_of(method: &str, steps: Option<isize>) -> PyResult<Method> {
    let steps = steps.map(|steps| number("steps", steps)).transpose()?;
    // More steps than a u32 holds are too many anyway.
    let steps = steps.map(|steps| u32::try_from(steps).unwrap_or(u32::MAX));
    Method::find(method, steps).map_err(value_error)
}

/// Count, mean and scatter matrix of channels, in float64: immutable, and mergeable over parts of the data.
///
/// `scatter` is Σ(x − mean)(x − mean)ᵀ over all positions, of each group of D adjacent channels. The comoments of parts merge into
/// those of the whole by the update of Chan, Golub and LeVeque (1979), as `Moments` do. The comoments of no values (count
/// 0) are the neutral element.
///
/// Args:
///     count: Number of positions: values per channel; finite, 0 or more.
///     mean: Mean per channel, shape (channels,).
///     scatter: Shape (groups, D, D), D = channels / groups; of each matrix the lower triangle counts.
///
/// Raises:
///     ValueError: A shape is not as described, or the count or a diagonal element of scatter is negative.
///     TypeError: An argument is not an array of real numbers.
#[pyclass(frozen, eq, module = "batchnorm", name = "CoMoments")]
#[derive(PartialEq)]
pub(crate) struct CoMoments(Arc<batchnorm::CoMoments>);

impl From<batchnorm::CoMoments> for CoMoments {
    fn from(comoments: batchnorm::CoMoments) -> Self {
        Self(comoments.into())
    }
}

#[pymethods]
impl CoMoments {
    #[new]
    fn new(count: f64, mean: &Bound<'_, PyAny>, scatter: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (scatter, groups, _) = matrices("scatter", scatter)?;
        batchnorm::CoMoments::new(count, vector("mean", mean)?, scatter, groups).map(Self::from).map_err(value_error)
    }

    /// Number of channels.
    #[getter]
    fn channels(&self) -> usize {
        self.0.channels()
    }

    /// Number of groups of adjacent channels.
    #[getter]
    fn groups(&self) -> usize {
        self.0.groups()
    }

    /// Number of positions: values per channel, the paper's m.
    #[getter]
    fn count(&self) -> f64 {
        self.0.count()
    }

    /// Mean per channel, shape (channels,), float64.
    #[getter]
    fn mean<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        new_vector(py, self.0.mean())
    }

    /// Σ(x − mean)(x − mean)ᵀ of each group, shape (groups, D, D), float64.
    #[getter]
    fn scatter<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray3<f64>>> {
        cube(py, self.0.scatter(), self.0.groups())
    }

    /// Biased covariance scatter/count, shape (groups, D, D), float64: Λ, by which a batch is whitened.
    ///
    /// Raises:
    ///     ValueError: There is no value.
    #[getter]
    fn cov<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray3<f64>>> {
        cube(py, &self.0.cov(0).map_err(value_error)?, self.0.groups())
    }

    /// Unbiased covariance scatter/(count − 1), shape (groups, D, D), float64: an estimate of the population's.
    ///
    /// Raises:
    ///     ValueError: There are fewer than 2 positions.
    #[getter]
    fn cov_unbiased<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray3<f64>>> {
        cube(py, &self.0.cov(1).map_err(value_error)?, self.0.groups())
    }

    /// Count, mean and M2 of each channel: the diagonal of scatter.
    #[getter]
    fn moments(&self) -> PyResult<Moments> {
        self.0.moments().map(Moments::from).map_err(value_error)
    }

    /// Return the comoments over the values of both, as a new object.
    ///
    /// Raises:
    ///     ValueError: The numbers of channels or of groups differ.
    fn merge(&self, other: &Self) -> PyResult<Self> {
        self.0.merge(&other.0).map(Self::from).map_err(value_error)
    }

    /// Encode as bytes: a header with version and sizes, then count, mean and scatter, little-endian.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        new_bytes(py, &self.0.to_bytes().map_err(value_error)?)
    }

    /// Decode the bytes that `to_bytes` returned.
    ///
    /// Raises:
    ///     ValueError: The bytes are not those of CoMoments.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        batchnorm::CoMoments::from_bytes(data).map(Self::from).map_err(value_error)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((slf.get_type().getattr("from_bytes")?, (slf.get().to_bytes(slf.py())?,)))
    }

    fn __repr__(&self) -> String {
        let (channels, groups, count) = (self.0.channels(), self.0.groups(), self.0.count());
        format!("CoMoments(channels={channels}, groups={groups}, count={count})")
    }
}

/// Compute the comoments of x: count, mean and scatter matrix of the channels over all other axes.
///
/// The bits are the same for any number of threads, on processors of one type.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     groups: Number of groups of adjacent channels; each has a scatter matrix of its own.
///     channel_axis: The axis of the channels; negative counts from the end.
///
/// Returns:
///     CoMoments in float64. If x has zero rows, they are the neutral element, with count 0.
///
/// Raises:
///     ValueError: Rank, channel_axis, groups or size are not as described.
///     TypeError: x is not a tensor of one of these dtypes.
#[pyfunction]
#[pyo3(signature = (x, *, groups=1, channel_axis=1))]
pub(crate) fn comoments(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    groups: isize,
    channel_axis: isize,
) -> PyResult<CoMoments> {
    let groups = number("groups", groups)?;
    let x = Tensor::read("x", x, channel_axis)?;
    with_element!(x.dtype, T => {
        let view = x.view::<T>();
        run(py, LONG, || batchnorm::comoments(view, groups))
    })
    .map(CoMoments::from)
}

/// Warns if the iteration stopped before it whitened.
fn warn_of(py: Python<'_>, residual: Option<f64>) -> PyResult<()> {
    let Some(residual) = residual.filter(|&residual| residual.is_nan() || residual > batchnorm::WHITE) else {
        return Ok(());
    };
    let text = format!(
        "steps: too few to whiten, the covariance of the output differs from the identity by {residual:.1e}; \
         wanted more, or None for as many as it takes"
    );
    PyErr::warn(py, &py.get_type::<PyUserWarning>(), &CString::new(text)?, 1)
}

/// Compute the whitening matrix W of each covariance Λ, so that W(Λ + εI)Wᵀ = I.
///
/// The methods: "zca" is (Λ+εI)^(−1/2), the symmetric solution; "pca" is D^(−1/2)Uᵀ, eigenvalues in descending order and the
/// entry of largest magnitude of each eigenvector positive; "cholesky" is L⁻¹ with Λ+εI = LLᵀ; "iterative" approximates "zca" by
/// Newton–Schulz steps, from the matrix divided by its trace.
///
/// Args:
///     cov: Λ, shape (groups, D, D); of each matrix the lower triangle counts.
///     method: "zca", "pca", "cholesky" or "iterative".
///     eps: ε, finite, 0 or more.
///     steps: Number of steps of "iterative", 1 to 100; None for as many as it takes.
///
/// Returns:
///     W, shape (groups, D, D), float64.
///
/// Raises:
///     ValueError: A shape or value is not as described; or Λ + εI has no inverse, as far as float64 can tell.
///     TypeError: cov is not an array of real numbers.
///
/// Warns:
///     UserWarning: After so many steps, an element of W(Λ + εI)Wᵀ − I is above 1e-3.
#[pyfunction]
#[pyo3(signature = (cov, *, method="zca", eps=0.0, steps=None))]
pub(crate) fn whitening_matrix<'py>(
    py: Python<'py>,
    cov: &Bound<'py, PyAny>,
    method: &str,
    eps: f64,
    steps: Option<isize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let method = method_of(method, steps)?;
    let (cov, groups, d) = matrices("cov", cov)?;
    let (matrix, residual) = run(py, LONG, || batchnorm::whitening_matrix(&cov, groups * d, groups, eps, method))?;
    warn_of(py, residual)?;
    cube(py, &matrix, groups)
}

/// Everything that a backward pass needs of a whitening pass.
///
/// It holds x by reference: it must not be changed between the two passes.
#[pyclass(frozen, module = "batchnorm", name = "WhiteningCache")]
pub(crate) struct WhiteningCache {
    x: Py<PyUntypedArray>,
    pass: batchnorm::WhiteningPass,
    /// The channel axis of the forward pass, as it was passed in.
    #[pyo3(get)]
    channel_axis: isize,
}

#[pymethods]
impl WhiteningCache {
    /// The input of the forward pass.
    #[getter]
    fn x<'py>(&self, py: Python<'py>) -> Bound<'py, PyUntypedArray> {
        self.x.bind(py).clone()
    }

    /// The comoments of x.
    #[getter]
    fn comoments(&self) -> CoMoments {
        CoMoments(Arc::new(self.pass.comoments().clone()))
    }

    /// W of each group, shape (groups, D, D), float64.
    #[getter]
    fn matrix<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray3<f64>>> {
        cube(py, &self.pass.matrix().map_err(value_error)?, self.pass.comoments().groups())
    }

    /// The most steps that a group took; None if the method is not iterative.
    #[getter]
    fn steps(&self) -> Option<u32> {
        self.pass.steps()
    }

    /// The largest magnitude in W(Λ + εI)Wᵀ − I; None if the method is not iterative.
    #[getter]
    fn residual(&self) -> Option<f64> {
        self.pass.residual()
    }

    /// The weight δ of shrinkage of each group, shape (groups,), float64; None without shrinkage.
    #[getter]
    fn shrinkage<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyArray1<f64>>>> {
        self.pass.shrinkage().map(|weights| new_vector(py, &weights.collect::<Vec<_>>())).transpose()
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("WhiteningCache(x of shape {:?}, channel_axis={})", self.x.bind(py).shape(), self.channel_axis)
    }
}

/// Whiten x by its own batch statistics: y = γ·W(x − mean) + β with W(Λ + εI)Wᵀ = I.
///
/// Λ is the biased covariance of the channels of a group over all positions. The bits are the same for any number of threads, on
/// processors of one type; between types they differ within the accuracy of the linear algebra.
///
/// Args:
///     x: Tensor of rank 2 or more, with 2 or more positions; float32, float64, float16 or bfloat16.
///     gamma: γ, shape (channels,) or a number; 1 if None.
///     beta: β, shape (channels,) or a number; 0 if None.
///     method: "zca", "pca", "cholesky" or "iterative"; `whitening_matrix` documents them.
///     groups: Number of groups of adjacent channels, each whitened by itself. With one channel a group it is batch
///         normalization.
///     eps: ε, finite, 0 or more.
///     steps: Number of steps of "iterative", 1 to 100; None for as many as it takes.
///     shrinkage: None, or "ledoit-wolf" to shrink Λ towards a multiple of the identity, with the weight of Ledoit and Wolf
///         (2004).
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write y to; it must not share memory with x.
///
/// Returns:
///     y, of x's shape, dtype and memory order, and the cache for `whiten_backward`, which holds x by reference.
///
/// Raises:
///     ValueError: A shape or value is not as described; the mean or covariance of x is not finite; or Λ + εI has no inverse,
///         as far as float64 can tell.
///     TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.
///
/// Warns:
///     UserWarning: After so many steps, an element of W(Λ + εI)Wᵀ − I is above 1e-3.
#[pyfunction]
#[pyo3(signature = (
    x, gamma=None, beta=None, *, method="zca", groups=1, eps=1e-5, steps=None, shrinkage=None, channel_axis=1, out=None
))]
#[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
pub(crate) fn whiten_forward<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    gamma: Option<&Bound<'py, PyAny>>,
    beta: Option<&Bound<'py, PyAny>>,
    method: &str,
    groups: isize,
    eps: f64,
    steps: Option<isize>,
    shrinkage: Option<&str>,
    channel_axis: isize,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyUntypedArray>, WhiteningCache)> {
    let (method, groups) = (method_of(method, steps)?, number("groups", groups)?);
    let shrinkage = match shrinkage {
        None => false,
        Some("ledoit-wolf") => true,
        Some(got) => {
            return Err(PyValueError::new_err(format!("shrinkage is {got:?}; wanted None or \"ledoit-wolf\"")));
        }
    };
    let x = Tensor::read("x", x, channel_axis)?;
    x.check_batch()?;
    let parameters = Parameters::read(gamma, beta, eps, x.layout.channels())?;
    let mut y = x.output("out", out, &[("x", &x.array)])?;
    let whitening = batchnorm::Whitening { method, groups, shrinkage };
    let pass = with_element!(x.dtype, T => {
        let (view, mut y) = (x.view::<T>(), y.view_mut::<T>());
        run(py, LONG, || batchnorm::whiten_forward(view, whitening, parameters.of(), &mut y))
    })?;
    warn_of(py, pass.residual())?;
    Ok((y.array, WhiteningCache { x: x.array.unbind(), pass, channel_axis }))
}

/// Compute the gradients of a whitening pass, through mean and covariance of the batch: dx, dγ and dβ.
///
/// With x̂ = W(x − mean): dβ = Σdy, dγ = Σdy·x̂, and dx has the derivatives of W by Λ and of Λ and mean by x.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     cache: The cache that the forward pass returned.
///     out: Array of x's shape, dtype and memory order to write dx to; it must not share memory with x or dy.
///
/// Returns:
///     Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64, even if γ and β were None.
///
/// Raises:
///     ValueError: A shape is not as described; or the method is "pca" and two components, which are named, have nearly the same
///         variance (a relative gap below 1e-8), so that there is no derivative.
///     TypeError: dy or out has another dtype than x.
#[pyfunction]
#[pyo3(signature = (dy, cache, *, out=None))]
pub(crate) fn whiten_backward<'py>(
    py: Python<'py>,
    dy: &Bound<'py, PyAny>,
    cache: &WhiteningCache,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let x = Tensor::read("x", cache.x.bind(py).as_any(), cache.channel_axis)?;
    let dy = x.read_like("dy", dy)?;
    let mut dx = x.output("out", out, &[("x", &x.array), ("dy", &dy.array)])?;
    let sums = with_element!(x.dtype, T => {
        let (dy, x, mut dx) = (dy.view::<T>(), x.view::<T>(), dx.view_mut::<T>());
        run(py, LONG, || batchnorm::whiten_backward(dy, x, &cache.pass, &mut dx))
    })?;
    let (dgamma, dbeta) = (new_vector(py, sums.dgamma())?, new_vector(py, sums.dbeta())?);
    gradients_type(py)?.call1((dx.array, dgamma, dbeta))
}
