//! The functions of the module.

use crate::buffer::{Tensor, with_element};
use crate::epilogue::{Back, Epilogue};
use crate::parameters::{Parameters, affine};
use crate::value_error;
use crate::values::{Cache, GradientSums, Moments};
use batchnorm::Error;
use numpy::{PyArray1, PyUntypedArray};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use std::iter::repeat_n;

/// Tensors smaller than this are done before another thread could use the interpreter.
const WORTH_DETACHING: usize = 32 * 1024;

/// Runs work on `bytes` of tensor memory, without the interpreter lock where there is much of it.
fn run<R: Send>(py: Python<'_>, bytes: usize, work: impl FnOnce() -> Result<R, Error> + Send) -> PyResult<R> {
    if bytes < WORTH_DETACHING { work() } else { py.detach(work) }.map_err(value_error)
}

/// The named tuple that backward passes return.
pub(crate) fn gradients<'py>(
    back: &Back<'py>,
    epilogue: &Epilogue<'py>,
    sums: &batchnorm::GradientSums,
) -> PyResult<Bound<'py, PyAny>> {
    static GRADIENTS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let dx = &back.dx.array;
    let py = dx.py();
    let (dgamma, dbeta) = (PyArray1::from_slice(py, sums.dgamma()), PyArray1::from_slice(py, sums.dbeta()));
    let gradients = GRADIENTS.import(py, "batchnorm._types", "Gradients")?.call1((dx, dgamma, dbeta))?;
    if let Some(dresidual) = back.dresidual(epilogue) {
        gradients.setattr(intern!(py, "dresidual"), dresidual)?;
    }
    Ok(gradients)
}

/// Moments of x: count, mean and M2 of each channel over all other axes.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     channel_axis: The axis of the channels; negative counts from the end.
///
/// Returns:
///     Moments in float64. Of zero rows: the neutral element, count 0. Of values that are not finite, or that differ by
///     more than about 1e154 so that their squares overflow, the statistics are not finite.
///
/// Raises:
///     ValueError: Rank, channel_axis or size are not as said.
///     TypeError: x is no tensor of these dtypes.
#[pyfunction]
#[pyo3(signature = (x, *, channel_axis=1))]
pub(crate) fn moments(py: Python<'_>, x: &Bound<'_, PyAny>, channel_axis: isize) -> PyResult<Moments> {
    let x = Tensor::read("x", x, channel_axis)?;
    with_element!(x.dtype, T => {
        let view = x.view::<T>();
        run(py, x.bytes(), || batchnorm::moments(view))
    })
    .map(Moments)
}

/// Normalizes x by given moments: y = γ·(x − mean)/√(var + ε) + β, with the biased variance (Algorithm 1).
///
/// With ``residual`` and ``activation``, y = activation(γ·(x − mean)/√(var + ε) + β + residual), rounded once.
///
/// The moments may be those of more than x: merged over micro-batches or processes.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     moments: Moments with 2 values a channel or more.
///     gamma: γ, shape (channels,) or a number; ones where absent.
///     beta: β, shape (channels,) or a number; zeros where absent.
///     eps: ε, finite and more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write y to; it shares no memory with x or residual.
///     activation: None or "relu", applied to the sum: max(·, 0), NaN stays NaN.
///     residual: Tensor of x's shape and dtype that is added before it; copied where its memory order is another.
///
/// Returns:
///     y, of x's shape, dtype and memory order, and the cache for the backward pass.
///
/// Raises:
///     ValueError: A shape or value is not as said.
///     TypeError: x is no tensor of these dtypes, or out or a parameter is of a wrong type.
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
    let parameters = Parameters::read(gamma, beta, x.layout.channels())?;
    let epilogue = Epilogue::read(&x, activation, residual)?;
    let mut y = x.output("out", out, &epilogue.inputs(&[("x", &x)]))?;
    let moments = moments.0.clone();
    let affine = with_element!(x.dtype, T => {
        let (view, follows, mut y) = (x.view::<T>(), epilogue.of::<T>(), y.view_mut::<T>());
        run(py, x.bytes(), || {
            batchnorm::normalize(view, &moments, parameters.gamma(), parameters.beta(), eps, follows, &mut y)
        })
    })?;
    Ok((y.array, Cache::new(Some(x), moments, affine, channel_axis, epilogue)))
}

/// Batch normalization in training (Algorithm 1): ``normalize`` by the moments of x itself, to the bit.
///
/// With ``residual`` and ``activation``, y = activation(γ·x̂ + β + residual), rounded once.
///
/// Args:
///     x: Tensor of rank 2 or more, with 2 values a channel or more; float32, float64, float16 or bfloat16.
///     gamma: γ, shape (channels,) or a number; ones where absent.
///     beta: β, shape (channels,) or a number; zeros where absent.
///     eps: ε, finite and more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write y to; memory of its own, or x itself.
///     activation: None or "relu", applied to the sum: max(·, 0), NaN stays NaN.
///     residual: Tensor of x's shape and dtype that is added before it; copied where its memory order is another.
///
/// Returns:
///     y, of x's shape, dtype and memory order, and the cache for ``backward``, which holds x and residual by reference.
///     Where y was written over x there is none to hold, and ``backward`` needs a copy of x.
///
/// Raises:
///     ValueError: A shape or value is not as said.
///     TypeError: x is no tensor of these dtypes, or out or a parameter is of a wrong type.
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
    let parameters = Parameters::read(gamma, beta, x.layout.channels())?;
    let epilogue = Epilogue::read(&x, activation, residual)?;
    let (mut y, in_place) = x.output_over("out", out, ("x", &x), &epilogue.inputs(&[]))?;
    let (gamma, beta) = (parameters.gamma(), parameters.beta());
    let (moments, affine) = with_element!(x.dtype, T => {
        let (follows, mut y) = (epilogue.of::<T>(), y.view_mut::<T>());
        if in_place {
            run(py, x.bytes(), || batchnorm::train_forward_in_place(gamma, beta, eps, follows, &mut y))
        } else {
            let view = x.view::<T>();
            run(py, x.bytes(), || batchnorm::train_forward(view, gamma, beta, eps, follows, &mut y))
        }
    })?;
    Ok((y.array, Cache::new((!in_place).then_some(x), moments, affine, channel_axis, epilogue)))
}

/// The sums of a backward pass: dγ = Σdy·x̂ and dβ = Σdy of each channel (section 3), before any division by m.
///
/// Where the forward pass ended in an activation, dy stands for dy where y > 0, else 0.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     cache: What the forward pass returned.
///     x: A copy of x, where the forward pass wrote y over x.
///
/// Returns:
///     GradientSums in float64, which merge over micro-batches and processes.
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
        let (dy, view, follows) = (dy.view::<T>(), x.view::<T>(), epilogue.of::<T>());
        run(py, x.bytes(), || batchnorm::gradient_sums(dy, view, &cache.affine, follows))
    })
    .map(GradientSums)
}

/// The input gradient from the sums: dx = γ/√(σ²+ε)·(dy − dβ/m − x̂·dγ/m) (section 3, in closed form).
///
/// Where the forward pass ended in an activation, dy stands for dy where y > 0, else 0.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     cache: What the forward pass returned.
///     sums: Sums over all values whose moments were merged; m is their count.
///     x: A copy of x, where the forward pass wrote y over x.
///     out: Array of x's shape, dtype and memory order to write dx to; memory of its own, or dy itself.
///     dresidual: Array of x's shape, dtype and memory order to write the gradient of residual to, which is the gradient
///         that passes the activation; memory of its own, or dy itself. Only where the forward pass had a residual.
///
/// Returns:
///     dx, of x's shape, dtype and memory order.
///
/// Raises:
///     ValueError: A shape is not as said, or the sums are over another number of values than the moments by which x was
///         normalized.
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
    let (affine, sums) = (&cache.affine, &sums.0);
    with_element!(x.dtype, T => {
        let (views, view, follows) = (back.views::<T>(), x.view::<T>(), epilogue.of::<T>());
        run(py, x.bytes(), || {
            views.go(view, affine, follows, sums.count().iter().copied(), |dy, follows, dx| {
                batchnorm::gradient_apply(dy, view, affine, follows, sums, dx)
            })
        })
    })?;
    Ok(back.dx.array)
}

/// The backward pass of training (section 3): ``gradient_apply`` with ``gradient_sums``, to the bit.
///
/// Where the forward pass ended in an activation, the gradient passes where the rounded y > 0. y is not needed for it, but
/// x and residual must be as they were.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     cache: What the forward pass returned.
///     x: A copy of x, where the forward pass wrote y over x.
///     out: Array of x's shape, dtype and memory order to write dx to; memory of its own, or dy itself.
///     dresidual: Array of x's shape, dtype and memory order to write the gradient of residual to, which is the gradient
///         that passes the activation; memory of its own, or dy itself. Only where the forward pass had a residual.
///
/// Returns:
///     Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64, also where γ, β were absent.
///     Its attribute dresidual is that array; without one it is dy where the forward pass had a residual and no activation
///     (and dx was not written over dy), else None.
///
/// Raises:
///     ValueError: A shape is not as said, or x was normalized by the moments of more than x: merge gradient sums then.
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
    let (affine, count) = (&cache.affine, repeat_n(x.layout.count() as f64, x.layout.channels()));
    let sums = with_element!(x.dtype, T => {
        let (views, view, follows) = (back.views::<T>(), x.view::<T>(), epilogue.of::<T>());
        run(py, x.bytes(), || {
            views.go(view, affine, follows, count, |dy, follows, dx| {
                batchnorm::backward(dy, view, affine, follows, dx)
            })
        })
    })?;
    gradients(&back, &epilogue, &sums)
}

/// The x of a forward pass, the one that the cache holds or the copy that the caller has kept, and what followed.
fn cached<'py>(
    py: Python<'py>,
    cache: &Cache,
    copy: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Tensor<'py>, Epilogue<'py>)> {
    let x = match (copy, &cache.x) {
        (Some(copy), _) => Tensor::read("x", copy, cache.channel_axis),
        (None, Some(x)) => Tensor::read("x", x.bind(py).as_any(), cache.channel_axis),
        (None, None) => Err(PyValueError::new_err(
            "x is needed: the forward pass wrote y over x (out=x); wanted x=, a copy of what x was",
        )),
    }?;
    let residual = cache.residual.as_ref().map(|residual| x.read_like("residual", residual.bind(py))).transpose()?;
    Ok((x, Epilogue { activation: cache.activation, residual }))
}

/// Batch normalization with frozen statistics (Algorithm 2): y = (x − mean)·s + β, s = γ/√(var + ε).
///
/// With ``residual`` and ``activation``, y = activation((x − mean)·s + β + residual), rounded once.
///
/// Computed in float64 for 32- and 64-bit tensors, in float32 with a two-part mean for 16-bit ones; each operation
/// rounded, none fused. The bits do not depend on the batch, on threads or on the instruction set. Of 16-bit tensors
/// ``|x − mean|`` and s must be in the range of float32 (up to 3.4e38); beyond it y is not finite.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     mean: E[x], shape (channels,) or a number.
///     var: Var[x], shape (channels,) or a number; 0 or more.
///     gamma: γ, shape (channels,) or a number; ones where absent.
///     beta: β, shape (channels,) or a number; zeros where absent.
///     eps: ε, finite, 0 or more; 0 only where every var is more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write y to; x itself, or memory of its own.
///     activation: None or "relu", applied to the sum: max(·, 0), NaN stays NaN.
///     residual: Tensor of x's shape and dtype that is added before it; copied where its memory order is another.
///
/// Returns:
///     y, of x's shape, dtype and memory order.
///
/// Raises:
///     ValueError: A shape or value is not as said.
///     TypeError: x is no tensor of these dtypes, or out or a parameter is of a wrong type.
#[pyfunction]
#[pyo3(signature = (
    x, mean, var, gamma=None, beta=None, *, eps=1e-5, channel_axis=1, out=None, activation=None, residual=None
))]
#[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
pub(crate) fn infer<'py>(
    x: &Bound<'py, PyAny>,
    mean: &Bound<'py, PyAny>,
    var: &Bound<'py, PyAny>,
    gamma: Option<&Bound<'py, PyAny>>,
    beta: Option<&Bound<'py, PyAny>>,
    eps: f64,
    channel_axis: isize,
    out: Option<&Bound<'py, PyAny>>,
    activation: Option<&Bound<'py, PyAny>>,
    residual: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let x = Tensor::read("x", x, channel_axis)?;
    let affine = affine(mean, var, gamma, beta, eps, x.layout.channels())?;
    infer_into(&x, &affine, out, &Epilogue::read(&x, activation, residual)?)
}

pub(crate) fn infer_into<'py>(
    x: &Tensor<'py>,
    affine: &batchnorm::Affine,
    out: Option<&Bound<'py, PyAny>>,
    epilogue: &Epilogue<'py>,
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let (mut y, in_place) = x.output_over("out", out, ("x", x), &epilogue.inputs(&[]))?;
    let py = x.array.py();
    with_element!(x.dtype, T => {
        let (follows, mut target) = (epilogue.of::<T>(), y.view_mut::<T>());
        if in_place {
            run(py, x.bytes(), || batchnorm::infer_in_place(affine, follows, &mut target))
        } else {
            let view = x.view::<T>();
            run(py, x.bytes(), || batchnorm::infer(view, affine, follows, &mut target))
        }
    })?;
    Ok(y.array)
}

/// The backward pass with frozen statistics: dx = γ/√(var + ε)·dy, dγ = Σdy·x̂, dβ = Σdy.
///
/// With the ``activation`` of the forward pass, dy stands for dy where y > 0, else 0; that takes its ``beta`` and
/// ``residual``, which change nothing else.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     mean: E[x], shape (channels,) or a number.
///     var: Var[x], shape (channels,) or a number; 0 or more.
///     gamma: γ, shape (channels,) or a number; ones where absent.
///     beta: β, shape (channels,) or a number; zeros where absent.
///     eps: ε, finite, 0 or more; 0 only where every var is more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write dx to; memory of its own, or dy itself.
///     activation: None or "relu", as in the forward pass.
///     residual: As in the forward pass.
///     dresidual: Array of x's shape, dtype and memory order to write the gradient of residual to, which is the gradient
///         that passes the activation; memory of its own, or dy itself. Only with residual.
///
/// Returns:
///     Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64.
///     Its attribute dresidual is that array; without one it is dy where the forward pass had a residual and no activation
///     (and dx was not written over dy), else None.
///
/// Raises:
///     ValueError: A shape or value is not as said.
///     TypeError: dy, x, out or a parameter is of a wrong type.
#[pyfunction]
#[pyo3(signature = (
    dy, x, mean, var, gamma=None, *, beta=None, eps=1e-5, channel_axis=1, out=None, activation=None, residual=None,
    dresidual=None
))]
#[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
pub(crate) fn infer_backward<'py>(
    dy: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    mean: &Bound<'py, PyAny>,
    var: &Bound<'py, PyAny>,
    gamma: Option<&Bound<'py, PyAny>>,
    beta: Option<&Bound<'py, PyAny>>,
    eps: f64,
    channel_axis: isize,
    out: Option<&Bound<'py, PyAny>>,
    activation: Option<&Bound<'py, PyAny>>,
    residual: Option<&Bound<'py, PyAny>>,
    dresidual: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let x = Tensor::read("x", x, channel_axis)?;
    let affine = affine(mean, var, gamma, beta, eps, x.layout.channels())?;
    infer_backward_of(dy, &x, &affine, out, &Epilogue::read(&x, activation, residual)?, dresidual)
}

pub(crate) fn infer_backward_of<'py>(
    dy: &Bound<'py, PyAny>,
    x: &Tensor<'py>,
    affine: &batchnorm::Affine,
    out: Option<&Bound<'py, PyAny>>,
    epilogue: &Epilogue<'py>,
    dresidual: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let mut back = Back::read(dy, x, epilogue, out, dresidual)?;
    let (py, count) = (x.array.py(), repeat_n(x.layout.count() as f64, x.layout.channels()));
    let sums = with_element!(x.dtype, T => {
        let (views, view, follows) = (back.views::<T>(), x.view::<T>(), epilogue.of::<T>());
        run(py, x.bytes(), || {
            views.go(view, affine, follows, count, |dy, follows, dx| {
                batchnorm::infer_backward(dy, view, affine, follows, dx)
            })
        })
    })?;
    gradients(&back, epilogue, &sums)
}

/// The floor that benchmarks compare with: out = x, or out = x + z, on the threads that every function here works on.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     out: Array like x, in memory of its own.
///     z: Tensor like x.
///     streaming: Whether out is written past the caches.
///
/// Raises:
///     ValueError: A shape is not as said.
///     TypeError: out or z has another dtype than x.
#[pyfunction]
#[pyo3(signature = (x, out, *, z=None, streaming=false))]
pub(crate) fn copy<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    z: Option<&Bound<'py, PyAny>>,
    streaming: bool,
) -> PyResult<()> {
    let x = Tensor::read("x", x, 1)?;
    let z = z.map(|z| x.read_like("z", z)).transpose()?;
    let mut y = x.output("out", Some(out), &[("x", &x.array), ("z", &z.as_ref().unwrap_or(&x).array)])?;
    with_element!(x.dtype, T => {
        let (view, z, mut y) = (x.view::<T>(), z.as_ref().map(Tensor::view::<T>), y.view_mut::<T>());
        run(py, x.bytes(), || batchnorm::copy(view, z, &mut y, streaming))
    })
}
