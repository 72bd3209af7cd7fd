//! Python objects as NumPy arrays: one rule for tensors and for parameters, whichever library made them.

use super::dlpack::bfloat16_by_dlpack;
use super::type_name;
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// Return a tensor as a NumPy array that shares its memory.
///
/// Args:
///     argument: Name of the argument in errors.
///     value: A NumPy array, or an object with `__dlpack__` (on the CPU) or `__array__`.
///
/// Raises:
///     TypeError: value is none of these, has a mask, or requires grad.
#[pyfunction]
pub(crate) fn tensor<'py>(argument: &str, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    const WANTED: &str = "a NumPy array or an object with __dlpack__ (on the CPU) or __array__";
    exported(argument, value, WANTED)?.ok_or_else(|| not_taken(argument, value, "", WANTED))
}

/// Return a parameter as a NumPy array of real numbers, of any shape.
///
/// Args:
///     argument: Name of the argument in errors.
///     value: A number, a sequence of numbers, or any tensor that `tensor` takes.
///
/// Raises:
///     TypeError: value is not real, has a mask, or requires grad.
#[pyfunction]
pub(crate) fn real_array<'py>(argument: &str, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    const WANTED: &str = "real numbers, an array of shape (channels,)";
    let array = match exported(argument, value, WANTED)? {
        Some(array) => array,
        None => numpy(value.py())?
            .call_method1(intern!(value.py(), "asarray"), (value,))
            .map_err(|error| not_taken(argument, value, &format!(" ({error})"), WANTED))?
            .cast_into()?,
    };
    let dtype = array.dtype();
    // Types that packages register (ml_dtypes) have kind V and a number from 256; they are real too.
    let real = matches!(dtype.kind(), b'f' | b'i' | b'u') || (dtype.kind() == b'V' && dtype.num() >= 256);
    if !real {
        return Err(PyTypeError::new_err(format!("{argument} has dtype {dtype}; wanted {WANTED}")));
    }
    Ok(array)
}

/// The value as an array: itself, or the memory that it exports by `__dlpack__` or `__array__`; `None` if it has neither.
fn exported<'py>(
    argument: &str,
    value: &Bound<'py, PyAny>,
    wanted: &str,
) -> PyResult<Option<Bound<'py, PyUntypedArray>>> {
    if let Ok(array) = value.cast_exact::<PyUntypedArray>() {
        return Ok(Some(array.clone()));
    }
    // A mask would be lost silently; other subclasses are plain arrays underneath.
    if has_mask(value)? {
        return Err(not_taken(argument, value, " with a mask", wanted));
    }
    if let Ok(array) = value.cast::<PyUntypedArray>() {
        return Ok(Some(array.clone()));
    }
    if value.is_instance_of::<PyType>() {
        return Ok(None);
    }
    let py = value.py();
    if value.hasattr("detach")? && value.getattr("requires_grad")?.is_truthy()? {
        let found = type_name(value);
        return Err(PyTypeError::new_err(format!(
            "{argument} is {found} that requires grad; wanted {argument}.detach()"
        )));
    }
    let value = &resolved(value)?;
    let mut why = None;
    if value.hasattr(intern!(py, "__dlpack__"))? {
        match numpy(py)?.call_method1(intern!(py, "from_dlpack"), (value,)) {
            Ok(array) => return Ok(Some(array.cast_into()?)),
            Err(error) => why = Some(error),
        }
        if let Some(array) = bfloat16_by_dlpack(argument, value)? {
            return Ok(Some(array));
        }
    }
    if value.hasattr(intern!(py, "__array__"))? {
        match numpy(py)?.call_method1(intern!(py, "asarray"), (value,)) {
            Ok(array) => return Ok(Some(array.cast_into()?)),
            Err(error) => why = Some(error),
        }
    }
    why.map_or(Ok(None), |error| Err(not_taken(argument, value, &format!(" ({error})"), wanted)))
}

/// The value itself, or a negated copy if its sign is still to be changed: PyTorch negates the imaginary part of a
/// conjugate lazily, which DLPack cannot express.
fn resolved<'py>(value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let lazy = value.hasattr("resolve_neg")? && value.call_method0("is_neg")?.is_truthy()?;
    if lazy { value.call_method0("resolve_neg") } else { Ok(value.clone()) }
}

/// Whether a value has a mask.
///
/// A method `mask`, which a pandas Series has, is not a mask. PyTorch's masked tensors have a method `get_mask`. Plain
/// arrays are answered first, since the lookups take as long as a small call.
pub(super) fn has_mask(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = value.py();
    if value.is_exact_instance_of::<PyUntypedArray>() {
        return Ok(false);
    }
    let mask = value.getattr_opt(intern!(py, "mask"))?;
    Ok(mask.is_some_and(|mask| !mask.is_callable()) || value.hasattr(intern!(py, "get_mask"))?)
}

fn not_taken(argument: &str, value: &Bound<'_, PyAny>, why: &str, wanted: &str) -> PyErr {
    PyTypeError::new_err(format!("{argument} is {}{why}; wanted {wanted}", type_name(value)))
}

pub(super) fn numpy(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import(intern!(py, "numpy"))
}
