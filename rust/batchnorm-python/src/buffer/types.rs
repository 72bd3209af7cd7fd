//! Which tensors of a host library the passes take as its own operators would: asked before a call, answered without an error.

use super::DType;
use super::exchange::Exchange;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// An argument that may be None.
type Optional<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// The types of a host library whose tensors compute as its operators do: the passes of `Host` may take their place.
///
/// A plain tensor is of one of these types and no subclass, has its values in memory of the CPU, and is not lazily negated.
///
/// Args:
///     tensor_type: The type of the host's tensors, with PyTorch's `is_neg`, `is_inference` and `requires_grad`.
///     parameter_type: The type of its parameters, a subclass that computes as tensor_type does.
///
/// Raises:
///     TypeError: tensor_type has no DLPack C exchange API of version 1.
#[pyclass(frozen, module = "batchnorm._core", name = "HostTypes")]
pub(crate) struct HostTypes {
    exchange: Exchange,
    types: [Py<PyType>; 2],
}

#[pymethods]
impl HostTypes {
    #[new]
    fn new(tensor_type: Bound<'_, PyType>, parameter_type: Bound<'_, PyType>) -> PyResult<Self> {
        Ok(Self { exchange: Exchange::of(&tensor_type)?, types: [tensor_type.unbind(), parameter_type.unbind()] })
    }

    /// Return whether a value is a plain tensor.
    ///
    /// Args:
    ///     tensor: Any value.
    fn is_plain(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.is_itself(tensor)? && self.exchange.lent("", tensor).is_ok())
    }

    /// Return whether a forward pass of `Host` takes these arguments, and does what the host's own layer does with them.
    ///
    /// All are plain; x has values, in training 2 or more in a channel; the residual has x's shape and dtype; the others are
    /// contiguous, of shape (channels,), float64 for x of float64 and else float32. There are both running statistics, which
    /// require no grad, or in training neither.
    ///
    /// Args:
    ///     x: Tensor.
    ///     weight: γ, or None.
    ///     bias: β, or None.
    ///     residual: Tensor that is added, or None.
    ///     running_mean: Running mean, or None.
    ///     running_var: Running variance, or None.
    ///     training: Whether x is normalized by its own statistics.
    #[allow(clippy::too_many_arguments, reason = "the signature that Python has")]
    fn takes(
        &self,
        x: &Bound<'_, PyAny>,
        weight: Optional<'_, '_>,
        bias: Optional<'_, '_>,
        residual: Optional<'_, '_>,
        running_mean: Optional<'_, '_>,
        running_var: Optional<'_, '_>,
        training: bool,
    ) -> PyResult<bool> {
        let (parameters, running) = ([weight, bias], [running_mean, running_var]);
        // What can run Python comes first: shapes are read where they lie.
        for tensor in [Some(x), residual].into_iter().chain(parameters).chain(running).flatten() {
            if !self.is_itself(tensor)? {
                return Ok(false);
            }
        }
        for tensor in running.into_iter().flatten() {
            if tensor.getattr(intern!(tensor.py(), "requires_grad"))?.is_truthy()? {
                return Ok(false);
            }
        }
        let complete = match running {
            [None, None] => training,
            [mean, var] => mean.is_some() && var.is_some(),
        };
        Ok(complete && self.fit(x, residual, parameters.into_iter().chain(running).flatten(), training))
    }

    /// Add 1 to a plain tensor that is a single int64 without axes; return whether it is one.
    ///
    /// A tensor that was made in inference mode is left to the host, which knows whether it may change.
    ///
    /// Args:
    ///     count: Any value.
    fn increment(&self, count: &Bound<'_, PyAny>) -> PyResult<bool> {
        if !self.is_itself(count)? || count.call_method0(intern!(count.py(), "is_inference"))?.is_truthy()? {
            return Ok(false);
        }
        let Some(number) = self.exchange.lent("count", count).ok().and_then(|lent| lent.int64()) else {
            return Ok(false);
        };
        // SAFETY: the tensor is alive and its memory holds an aligned int64. As the host's own operators do, this relies on no
        // other thread changing it meanwhile.
        unsafe { number.write(number.read().wrapping_add(1)) };
        Ok(true)
    }
}

impl HostTypes {
    /// Whether a value is of these types, and not lazily negated.
    fn is_itself(&self, value: &Bound<'_, PyAny>) -> PyResult<bool> {
        let class = value.get_type();
        let own = self.types.iter().any(|own| class.is(own));
        Ok(own && !value.call_method0(intern!(value.py(), "is_neg"))?.is_truthy()?)
    }

    /// Whether shapes, dtypes and memory are as a forward pass wants them.
    fn fit<'a, 'py: 'a>(
        &self,
        x: &Bound<'_, PyAny>,
        residual: Optional<'_, '_>,
        mut vectors: impl Iterator<Item = &'a Bound<'py, PyAny>>,
        training: bool,
    ) -> bool {
        let Ok(x) = self.exchange.lent("x", x) else { return false };
        let (Some(dtype), [_, channels, ..]) = (x.dtype(), x.shape()) else { return false };
        let of_vectors = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let too_few = if training { *channels as usize } else { 0 };
        x.len() != 0
            && x.len() != too_few
            && residual.is_none_or(|residual| {
                self.exchange
                    .lent("residual", residual)
                    .is_ok_and(|residual| residual.dtype() == Some(dtype) && residual.shape() == x.shape())
            })
            && vectors.all(|vector| {
                self.exchange.lent("vector", vector).is_ok_and(|vector| {
                    let contiguous = vector.len() == 1 || vector.strides() == [1];
                    vector.dtype() == Some(of_vectors) && vector.shape() == [*channels] && contiguous
                })
            })
    }
}
