//! The copy that benchmarks compare the other functions with.

use crate::buffer::{Tensor, with_element};
use crate::run::run;
use pyo3::prelude::*;

/// Copy x to out, or write x + z to out: the least time that any function here can take, for benchmarks.
///
/// Args:
///     x: Tensor of rank 2 or more; float32, float64, float16 or bfloat16.
///     out: Array of x's shape, dtype and memory order to write to; it must not share memory with x or z.
///     z: Tensor of x's shape and dtype, or None.
///     streaming: Whether out is written with non-temporal stores.
///
/// Raises:
///     ValueError: A shape is not as described.
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
