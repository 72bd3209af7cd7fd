//! The frozen whitening layer's map.

use crate::buffer::{Tensor, with_element};
use crate::epilogue::input;
use crate::parameters::vector;
use crate::run::run;
use crate::value_error;
use crate::whitening::array;
use numpy::PyUntypedArray;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The validated map of a frozen whitening layer: y = M(x − mean) + bias of each group of channels.
///
/// y_o = round(Σ M_oi·(x_i − mean_i) + bias_o) in float64. The sum begins at 0 and goes in the order of i, and each operation is
/// rounded; so the bits are the same for any batch split, any number of threads and any instruction-set level.
///
/// Args:
///     matrix: M, shape (channels, D), where D divides channels: row o has the weights of the channels of o's group.
///     mean: Shape (channels,).
///     bias: Shape (channels,).
///
/// Raises:
///     ValueError: A shape is not as described, or a value is not finite.
///     TypeError: A parameter is not an array of real numbers.
#[pyclass(frozen, module = "batchnorm._core", name = "WhiteningMap")]
pub(crate) struct WhiteningMap(batchnorm::WhiteningMap);

impl WhiteningMap {
    fn pass<'py>(
        &self,
        argument: &str,
        x: &Bound<'py, PyAny>,
        channel_axis: isize,
        out: Option<&Bound<'py, PyAny>>,
        backward: bool,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        let x = Tensor::read(argument, x, channel_axis)?;
        let (mut y, in_place) = x.output_over("out", out, (argument, &x), &[])?;
        let bytes = x.bytes().saturating_mul(self.0.channels() / self.0.groups());
        with_element!(x.dtype, T => {
            let (input, mut y) = (input::<T>(&x, in_place), y.view_mut::<T>());
            run(x.array.py(), bytes, || match backward {
                false => self.0.apply(input, &mut y),
                true => self.0.backward(input, &mut y),
            })
        })?;
        Ok(y.array)
    }
}

#[pymethods]
impl WhiteningMap {
    #[new]
    fn new(matrix: &Bound<'_, PyAny>, mean: &Bound<'_, PyAny>, bias: &Bound<'_, PyAny>) -> PyResult<Self> {
        let wanted = "(channels, D), where D divides channels";
        let (matrix, [channels, d]) = array::<2>("matrix", matrix, wanted)?;
        let (mean, bias) = (vector("mean", mean)?, vector("bias", bias)?);
        if mean.len() != channels || d == 0 || !channels.is_multiple_of(d) {
            let count = mean.len();
            return Err(PyValueError::new_err(format!(
                "matrix has shape [{channels}, {d}]; wanted {wanted}, with channels = {count}, as mean has"
            )));
        }
        batchnorm::WhiteningMap::new(matrix, mean, bias).map(Self).map_err(value_error)
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

    /// Apply the map to x.
    ///
    /// Args:
    ///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
    ///     channel_axis: The axis of the channels; negative counts from the end.
    ///     out: Array of x's shape, dtype and memory order to write y to; may be x itself.
    ///
    /// Returns:
    ///     y, of x's shape, dtype and memory order.
    ///
    /// Raises:
    ///     ValueError: A shape is not as described.
    ///     TypeError: x is not a tensor of one of these dtypes, or out has another dtype.
    #[pyo3(signature = (x, *, channel_axis=1, out=None))]
    fn apply<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        channel_axis: isize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        self.pass("x", x, channel_axis, out, false)
    }

    /// Compute dx = Mᵀ·dy, the gradient with the statistics held fixed.
    ///
    /// Args:
    ///     dy: ∂ℓ/∂y; float32, float64, float16 or bfloat16.
    ///     channel_axis: The axis of the channels; negative counts from the end.
    ///     out: Array of dy's shape, dtype and memory order to write dx to; may be dy itself.
    ///
    /// Returns:
    ///     dx, of dy's shape, dtype and memory order.
    ///
    /// Raises:
    ///     ValueError: A shape is not as described.
    ///     TypeError: dy is not a tensor of one of these dtypes, or out has another dtype.
    #[pyo3(signature = (dy, *, channel_axis=1, out=None))]
    fn backward<'py>(
        &self,
        dy: &Bound<'py, PyAny>,
        channel_axis: isize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyUntypedArray>> {
        self.pass("dy", dy, channel_axis, out, true)
    }
}
