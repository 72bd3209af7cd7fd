//! Functions that normalize by frozen statistics, and the coefficients that a frozen layer holds.

use crate::backward::Back;
use crate::buffer::{Tensor, with_element};
use crate::epilogue::{Epilogue, input};
use crate::parameters::{Parameters, per_channel, vector};
use crate::run::run;
use crate::value_error;
use numpy::PyUntypedArray;
use pyo3::prelude::*;

/// Normalize x by frozen statistics (Algorithm 2): y = (x − mean)·s + β with s = γ/√(var + ε).
///
/// With `residual` and `activation`, y = activation((x − mean)·s + β + residual), rounded once.
///
/// y is computed in float64 for 32- and 64-bit tensors, and in float32 with a two-part mean for 16-bit ones. Each
/// operation is rounded; none are fused. The bits do not depend on the rest of the batch, on threads or on the
/// instruction set. For 16-bit tensors, `|x − mean|` must be in the range of float32 (up to 3.4e38), or y is not finite.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     mean: E[x], shape (channels,) or a number.
///     var: Var[x], shape (channels,) or a number; 0 or more.
///     gamma: γ, shape (channels,) or a number; 1 if None.
///     beta: β, shape (channels,) or a number; 0 if None.
///     eps: ε, finite, 0 or more; 0 only if every var is more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write y to; x itself, or memory that no input shares.
///     activation: None, "relu" or "relu6", applied last: max(·, 0), or min(max(·, 0), 6); NaN stays NaN.
///     residual: Tensor of x's shape and dtype that is added before the activation; copied if its memory order differs.
///
/// Returns:
///     y, of x's shape, dtype and memory order.
///
/// Raises:
///     ValueError: A shape or value is not as described.
///     TypeError: x is not a tensor of one of these dtypes, or out or a parameter is of a wrong type.
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
    let coefficients = Coefficients::read(mean, var, gamma, beta, eps, x.layout.channels())?;
    coefficients.infer_tensor(&x, out, &Epilogue::read(&x, activation, residual)?)
}

/// Compute the gradients with frozen statistics: dx = γ/√(var + ε)·dy, dγ = Σdy·x̂, dβ = Σdy.
///
/// If the forward pass ended in an activation, dy in these formulas is the gradient that passes it: dy where y > 0
/// (and y < 6 for relu6), else 0. `beta` and `residual` are needed for nothing else.
///
/// Args:
///     dy: ∂ℓ/∂y, of the shape and dtype of x.
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     mean: E[x], shape (channels,) or a number.
///     var: Var[x], shape (channels,) or a number; 0 or more.
///     gamma: γ, shape (channels,) or a number; 1 if None.
///     beta: β, shape (channels,) or a number; 0 if None.
///     eps: ε, finite, 0 or more; 0 only if every var is more than 0.
///     channel_axis: The axis of the channels; negative counts from the end.
///     out: Array of x's shape, dtype and memory order to write dx to; dy itself, or memory that no input shares.
///     activation: The activation of the forward pass: None, "relu" or "relu6".
///     residual: The residual of the forward pass, or None.
///     dresidual: Array of x's shape, dtype and memory order to write ∂ℓ/∂residual to, which is the gradient that passes
///         the activation; dy itself, or memory that no input shares. Only with residual.
///
/// Returns:
///     Gradients (dx, dgamma, dbeta): dx like x; dγ and dβ of shape (channels,) in float64.
///     The attribute dresidual is the array that was given. If none was, it is dy itself where the forward pass had a
///     residual and no activation (and dx was not written over dy), else None.
///
/// Raises:
///     ValueError: A shape or value is not as described.
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
    let coefficients = Coefficients::read(mean, var, gamma, beta, eps, x.layout.channels())?;
    coefficients.backward_tensor(dy, &x, out, &Epilogue::read(&x, activation, residual)?, dresidual)
}

/// The validated coefficients of a frozen layer: y = (x − mean)·s + β with s = γ/√(var + ε), in float64.
///
/// Args:
///     mean: E[x], shape (channels,) or a number.
///     var: Var[x], shape (channels,) or a number; 0 or more.
///     gamma: γ, shape (channels,) or a number; 1 if None.
///     beta: β, shape (channels,) or a number; 0 if None.
///     eps: ε, finite, 0 or more; 0 only if every var is more than 0.
///
/// Raises:
///     ValueError: A shape or value is not as described.
///     TypeError: A parameter is not an array of real numbers.
#[pyclass(frozen, module = "batchnorm._core", name = "Coefficients")]
pub(crate) struct Coefficients(batchnorm::Coefficients);

impl Coefficients {
    fn read(
        mean: &Bound<'_, PyAny>,
        var: &Bound<'_, PyAny>,
        gamma: Option<&Bound<'_, PyAny>>,
        beta: Option<&Bound<'_, PyAny>>,
        eps: f64,
        channels: usize,
    ) -> PyResult<Self> {
        let (mean, var) = (per_channel("mean", mean, channels)?, per_channel("var", var, channels)?);
        let parameters = Parameters::read(gamma, beta, eps, channels)?;
        batchnorm::Coefficients::new(&mean, &var, parameters.of()).map(Self).map_err(value_error)
    }

    fn infer_tensor<'py>(
        &self,
        x: &Tensor<'py>,
        out: Option<&Bound<'py, PyAny>>,
        epilogue: &Epilogue<'py>,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let (mut y, in_place) = x.output_over("out", out, ("x", x), &epilogue.inputs(&[]))?;
        with_element!(x.dtype, T => {
            let (input, follows, mut y) = (input::<T>(x, in_place), epilogue.of::<T>(), y.view_mut::<T>());
            run(x.array.py(), x.bytes(), || batchnorm::infer(input, &self.0, follows, &mut y))
        })?;
        Ok(y.array)
    }

    fn backward_tensor<'py>(
        &self,
        dy: &Bound<'py, PyAny>,
        x: &Tensor<'py>,
        out: Option<&Bound<'py, PyAny>>,
        epilogue: &Epilogue<'py>,
        dresidual: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut back = Back::read(dy, x, epilogue, out, dresidual)?;
        let vectors = back.vectors()?;
        let sums = with_element!(x.dtype, T => {
            let ((dy, mut dresidual, mut dx), pass) = (back.views::<T>(), epilogue.pass::<T>(x, &self.0));
            run(x.array.py(), x.bytes(), || batchnorm::infer_backward(dy, pass, dresidual.as_mut(), &mut dx))
        })?;
        back.gradients(epilogue, &sums, vectors)
    }
}

#[pymethods]
impl Coefficients {
    #[new]
    #[pyo3(signature = (mean, var, gamma=None, beta=None, *, eps=1e-5))]
    fn new(
        mean: &Bound<'_, PyAny>,
        var: &Bound<'_, PyAny>,
        gamma: Option<&Bound<'_, PyAny>>,
        beta: Option<&Bound<'_, PyAny>>,
        eps: f64,
    ) -> PyResult<Self> {
        // All four broadcast: the first that is not a single number gives the number of channels.
        let mut channels = 1;
        for (argument, value) in [("mean", Some(mean)), ("var", Some(var)), ("gamma", gamma), ("beta", beta)] {
            if let (1, Some(value)) = (channels, value) {
                channels = vector(argument, value)?.len();
            }
        }
        Self::read(mean, var, gamma, beta, eps, channels)
    }

    /// Number of channels.
    #[getter]
    fn channels(&self) -> usize {
        self.0.channels()
    }

    /// Normalize x by these coefficients; `batchnorm.infer` documents the arguments.
    #[pyo3(signature = (x, *, channel_axis=1, out=None, activation=None, residual=None))]
    fn infer<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        channel_axis: isize,
        out: Option<&Bound<'py, PyAny>>,
        activation: Option<&Bound<'py, PyAny>>,
        residual: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let x = Tensor::read("x", x, channel_axis)?;
        self.infer_tensor(&x, out, &Epilogue::read(&x, activation, residual)?)
    }

    /// Compute the gradients with these coefficients; `batchnorm.infer_backward` documents the arguments.
    #[pyo3(signature = (dy, x, *, channel_axis=1, out=None, activation=None, residual=None, dresidual=None))]
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn backward<'py>(
        &self,
        dy: &Bound<'py, PyAny>,
        x: &Bound<'py, PyAny>,
        channel_axis: isize,
        out: Option<&Bound<'py, PyAny>>,
        activation: Option<&Bound<'py, PyAny>>,
        residual: Option<&Bound<'py, PyAny>>,
        dresidual: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let x = Tensor::read("x", x, channel_axis)?;
        self.backward_tensor(dy, &x, out, &Epilogue::read(&x, activation, residual)?, dresidual)
    }
}
