//! The functions of training: forward and backward passes, whole and in halves.

use crate::backward::Back;
use crate::buffer::{Tensor, with_element};
use crate::epilogue::{Epilogue, input};
use crate::parameters::Parameters;
use crate::run::run;
use crate::values::{Cache, GradientSums, Moments};
use batchnorm::Input;
use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Arc;

/// Compute the moments of x: count, mean and M2 of each channel over all other axes.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     channel_axis: The axis of the channels; negative counts from the end.
///
/// Returns:
///     Moments in float64. If x has zero rows, they are the neutral element, with count 0. They are not finite if values
///     of x are not finite, or differ by more than about 1e154, so that their squares overflow.
///
/// Raises:
///     ValueError: Rank, channel_axis or size are not as described.
///     TypeError: x is not a tensor of one of these dtypes.
#[pyfunction]
#[pyo3(signature = (x, *, channel_axis=1))]
pub(crate) fn moments(py: Python<'_>, x: &Bound<'_, PyAny>, channel_axis: isize) -> PyResult<Moments> {
    let x = Tensor::read("x", x, channel_axis)?;
    with_element!(x.dtype, T => {
        let view = x.view::<T>();
        run(py, x.bytes(), || batchnorm::moments(view))
    })
    .map(Moments::from)
}

/// Normalize x by given moments: y = γ·(x − mean)/√(var + ε) + β, with the biased variance (Algorithm 1).
///
/// With `residual` and `activation`, y = activation(γ·(x − mean)/√(var + ε) + β + residual), rounded once.
///
/// The moments may cover more values than x: they may be merged over micro-batches or processes.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     moments: Moments with 2 or more values in each channel.
///     gamma: γ, shape (channels,) or a number; 1 if None.
///     beta: β, shape (channels,) or a number; 0 if None.
///     eps: ε, finite and more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write y to; it must not share memory with x or residual.
///     activation: None, "relu" or "relu6", applied last: max(·, 0), or min(max(·, 0), 6); NaN stays NaN.
///     residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.
///
/// Returns:
///     y, of x's shape, dtype and memory order, and the cache for the backward pass.
///
/// Raises:
///     ValueError: A shape or value is not as described.
///     TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.
#[pyfunction]
#[pyo3(signature = (
    x, moments, gamma=None, beta=None, *, eps=1e-5, channel_axis=1, out=None, activation=None, residual=None
))]
#[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
pub(crate) fn normalize<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    moments: &Moments,
    gamma: Option<&Bound<'py, PyAny>>,
    beta: Option<&Bound<'py, PyAny>>,
    eps: f64,
    channel_axis: isize,
    out: Option<&Bound<'py, PyAny>>,
    activation: Option<&Bound<'py, PyAny>>,
    residual: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyUntypedArray>, Cache)> {
    let x = Tensor::read("x", x, channel_axis)?;
    let parameters = Parameters::read(gamma, beta, eps, x.layout.channels())?;
    let epilogue = Epilogue::read(&x, activation, residual)?;
    let mut y = x.output("out", out, &epilogue.inputs(&[("x", &x)]))?;
    let moments = Arc::clone(&moments.0);
    let coefficients = with_element!(x.dtype, T => {
        let (view, follows, mut y) = (x.view::<T>(), epilogue.of::<T>(), y.view_mut::<T>());
        run(py, x.bytes(), || batchnorm::normalize(Input::View(view), &moments, parameters.of(), follows, &mut y))
    })?;
    Ok((y.array, Cache::new(Some(x), moments, coefficients, channel_axis, epilogue)))
}

/// Normalize x by its own batch statistics, as training does (Algorithm 1): y = γ·x̂ + β.
///
/// With `residual` and `activation`, y = activation(γ·x̂ + β + residual), rounded once.
///
/// The result has exactly the bits of `normalize(x, moments(x), ...)`.
///
/// Args:
///     x: Tensor of rank 2 or more, with 2 or more values in each channel; float32, float64, float16 or bfloat16.
///     gamma: γ, shape (channels,) or a number; 1 if None.
///     beta: β, shape (channels,) or a number; 0 if None.
///     eps: ε, finite and more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write y to; x itself, or memory that no input shares.
///     activation: None, "relu" or "relu6", applied last: max(·, 0), or min(max(·, 0), 6); NaN stays NaN.
///     residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.
///
/// Returns:
///     y, of x's shape, dtype and memory order, and the cache for `backward`, which holds x and residual by reference.
///     If y was written over x, the cache does not hold x, and `backward` needs a copy of it.
///
/// Raises:
///     ValueError: A shape or value is not as described.
///     TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.
#[pyfunction]
#[pyo3(signature = (
    x, gamma=None, beta=None, *, eps=1e-5, channel_axis=1, out=None, activation=None, residual=None
))]
#[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
pub(crate) fn train_forward<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    gamma: Option<&Bound<'py, PyAny>>,
    beta: Option<&Bound<'py, PyAny>>,
    eps: f64,
    channel_axis: isize,
    out: Option<&Bound<'py, PyAny>>,
    activation: Option<&Bound<'py, PyAny>>,
    residual: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyUntypedArray>, Cache)> {
    let x = Tensor::read("x", x, channel_axis)?;
    x.check_batch()?;
    let parameters = Parameters::read(gamma, beta, eps, x.layout.channels())?;
    let epilogue = Epilogue::read(&x, activation, residual)?;
    let (mut y, in_place) = x.output_over("out", out, ("x", &x), &epilogue.inputs(&[]))?;
    let (moments, coefficients) = with_element!(x.dtype, T => {
        let (input, follows, mut y) = (input::<T>(&x, in_place), epilogue.of::<T>(), y.view_mut::<T>());
        run(py, x.bytes(), || batchnorm::train_forward(input, parameters.of(), follows, &mut y))
    })?;
    Ok((y.array, Cache::new((!in_place).then_some(x), moments.into(), coefficients, channel_axis, epilogue)))
}

/// Compute the sums of a backward pass, dγ = Σdy·x̂ and dβ = Σdy of each channel (section 3).
///
/// If the forward pass ended in an activation, dy in these formulas is the gradient that passes it: dy where y > 0
/// (and y < 6 for relu6), else 0.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     cache: The cache that the forward pass returned.
///     x: A copy of x, needed only if the forward pass wrote y over x.
///
/// Returns:
///     GradientSums in float64, which can be merged over micro-batches and processes.
///
/// Raises:
///     ValueError: dy has another shape than x.
///     TypeError: dy has another dtype than x.
#[pyfunction]
#[pyo3(signature = (dy, cache, *, x=None))]
pub(crate) fn gradient_sums(
    py: Python<'_>,
    dy: &Bound<'_, PyAny>,
    cache: &Cache,
    x: Option<&Bound<'_, PyAny>>,
) -> PyResult<GradientSums> {
    let (x, epilogue) = cached(py, cache, x)?;
    let dy = x.read_like("dy", dy)?;
    with_element!(x.dtype, T => {
        let (dy, pass) = (dy.view::<T>(), epilogue.pass::<T>(&x, &cache.coefficients));
        run(py, x.bytes(), || batchnorm::gradient_sums(dy, pass))
    })
    .map(GradientSums)
}

/// Compute the input gradient from the sums: dx = γ/√(σ²+ε)·(dy − dβ/m − x̂·dγ/m) (section 3, in closed form).
///
/// If the forward pass ended in an activation, dy in these formulas is the gradient that passes it: dy where y > 0
/// (and y < 6 for relu6), else 0.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     cache: The cache that the forward pass returned.
///     sums: Gradient sums over all values that the moments of the forward pass cover; m is their count.
///     x: A copy of x, needed only if the forward pass wrote y over x.
///     out: Array of x's shape, dtype and memory order to write dx to; dy itself, or memory that no input shares.
///     dresidual: Array of x's shape, dtype and memory order to write ∂ℓ/∂residual to, which is the gradient that passes
///         the activation; dy itself, or memory that no input shares. Only if the forward pass had a residual.
///
/// Returns:
///     dx, of x's shape, dtype and memory order.
///
/// Raises:
///     ValueError: A shape is not as described, or the sums are over another number of values than the moments by which
///         x was normalized.
///     TypeError: dy or out has another dtype than x.
#[pyfunction]
#[pyo3(signature = (dy, cache, sums, *, x=None, out=None, dresidual=None))]
#[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
pub(crate) fn gradient_apply<'py>(
    py: Python<'py>,
    dy: &Bound<'py, PyAny>,
    cache: &Cache,
    sums: &GradientSums,
    x: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
    dresidual: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let (x, epilogue) = cached(py, cache, x)?;
    let mut back = Back::read(dy, &x, &epilogue, out, dresidual)?;
    with_element!(x.dtype, T => {
        let ((dy, mut dresidual, mut dx), pass) = (back.views::<T>(), epilogue.pass::<T>(&x, &cache.coefficients));
        run(py, x.bytes(), || batchnorm::gradient_apply(dy, pass, &sums.0, dresidual.as_mut(), &mut dx))
    })?;
    Ok(back.dx.array)
}

/// Compute the gradients of a training pass, through the batch statistics (section 3): dx, dγ and dβ.
///
/// The result has exactly the bits of `gradient_sums` followed by `gradient_apply`.
///
/// If the forward pass ended in an activation, dy passes where the rounded y > 0 (and y < 6 for relu6). That is computed
/// again from x and residual, which must not have changed since; y is not needed.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     cache: The cache that the forward pass returned.
///     x: A copy of x, needed only if the forward pass wrote y over x.
///     out: Array of x's shape, dtype and memory order to write dx to; dy itself, or memory that no input shares.
///     dresidual: Array of x's shape, dtype and memory order to write ∂ℓ/∂residual to, which is the gradient that passes
///         the activation; dy itself, or memory that no input shares. Only if the forward pass had a residual.
///
/// Returns:
///     Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64, even if γ and β were None.
///     The attribute dresidual is the array that was given. If none was, it is dy itself where the forward pass had a
///     residual and no activation (and dx was not written over dy), else None.
///
/// Raises:
///     ValueError: A shape is not as described; or the moments of the forward pass cover more values than x, so that
///         gradient sums must be merged instead.
///     TypeError: dy or out has another dtype than x.
#[pyfunction]
#[pyo3(signature = (dy, cache, *, x=None, out=None, dresidual=None))]
pub(crate) fn backward<'py>(
    py: Python<'py>,
    dy: &Bound<'py, PyAny>,
    cache: &Cache,
    x: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
    dresidual: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (x, epilogue) = cached(py, cache, x)?;
    let mut back = Back::read(dy, &x, &epilogue, out, dresidual)?;
    let vectors = back.vectors()?;
    let sums = with_element!(x.dtype, T => {
        let ((dy, mut dresidual, mut dx), pass) = (back.views::<T>(), epilogue.pass::<T>(&x, &cache.coefficients));
        run(py, x.bytes(), || batchnorm::backward(dy, pass, dresidual.as_mut(), &mut dx))
    })?;
    back.gradients(&epilogue, &sums, vectors)
}

/// The x of a forward pass (held by the cache, or a copy that the caller kept), and its epilogue.
fn cached<'py>(
    py: Python<'py>,
    cache: &Cache,
    copy: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Tensor<'py>, Epilogue<'py>)> {
    let x = match (copy, &cache.x) {
        (Some(copy), _) => Tensor::read("x", copy, cache.channel_axis),
        (None, Some(x)) => Tensor::read("x", x.bind(py).as_any(), cache.channel_axis),
        (None, None) => Err(PyValueError::new_err(
            "x is needed: the forward pass wrote y over x (out=x); wanted x=, a copy of the original x",
        )),
    }?;
    let residual = cache.residual.as_ref().map(|residual| x.read_like("residual", residual.bind(py))).transpose()?;
    Ok((x, Epilogue { activation: cache.activation, residual }))
}
