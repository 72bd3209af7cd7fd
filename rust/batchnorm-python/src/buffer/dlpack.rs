//! Tensors of bfloat16 by DLPack, which NumPy does not import.

use super::arrays::numpy;
use numpy::PyUntypedArray;
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use std::ffi::c_void;

/// DLPack's `DLTensor`: with it begins `DLManagedTensor`, which a capsule of version 0 of the protocol holds.
#[repr(C)]
pub(super) struct DlTensor {
    pub(super) data: *mut c_void,
    /// Type and number of the device.
    pub(super) device: [i32; 2],
    pub(super) rank: i32,
    pub(super) type_code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
    pub(super) shape: *const i64,
    /// In elements.
    pub(super) strides: *const i64,
    pub(super) byte_offset: u64,
}

impl DlTensor {
    const CAPSULE: &std::ffi::CStr = c"dltensor";
    pub(super) const INT: u8 = 0;
    pub(super) const UINT: u8 = 1;
    pub(super) const FLOAT: u8 = 2;
    pub(super) const BFLOAT: u8 = 4;
    pub(super) const CPU: i32 = 1;
}

/// An object that exports a DLPack capsule, as NumPy's `from_dlpack` needs it.
#[pyclass(frozen, module = "batchnorm._core")]
struct Export(Py<PyCapsule>);

#[pymethods]
impl Export {
    #[pyo3(signature = (**_options))]
    fn __dlpack__(&self, py: Python<'_>, _options: Option<&Bound<'_, PyDict>>) -> Py<PyCapsule> {
        self.0.clone_ref(py)
    }
}

/// The bfloat16 tensor that an object exports by DLPack; `None` if it exports another dtype.
///
/// NumPy does not import bfloat16. So it imports the memory as 16-bit integers, and the result is a view of these.
pub(super) fn bfloat16_by_dlpack<'py>(
    argument: &str,
    value: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyUntypedArray>>> {
    let py = value.py();
    let Some(capsule) =
        (value.call_method0(intern!(py, "__dlpack__")).ok()).and_then(|c| c.cast_into::<PyCapsule>().ok())
    else {
        return Ok(None);
    };
    let Ok(managed) = capsule.pointer_checked(Some(DlTensor::CAPSULE)) else { return Ok(None) };
    let managed = managed.cast::<DlTensor>().as_ptr();
    // SAFETY: a capsule of this name holds a DLManagedTensor, which begins with these fields. It belongs to whoever takes
    // it out of the capsule, as we do, and lives until its deleter is called.
    let dtype = unsafe { ((*managed).type_code, (*managed).bits, (*managed).lanes) };
    if dtype != (DlTensor::BFLOAT, 16, 1) {
        return Ok(None);
    }
    let bfloat16 = py.import("ml_dtypes").and_then(|module| module.getattr("bfloat16")).map_err(|_| {
        let wanted = "wanted the package ml_dtypes, which gives NumPy that type: pip install 'batchnorm[bfloat16]'";
        PyTypeError::new_err(format!("{argument} has dtype bfloat16; {wanted}"))
    })?;
    // SAFETY: as above; nobody else reads it meanwhile.
    unsafe { (*managed).type_code = DlTensor::UINT };
    let Ok(integers) = numpy(py)?.call_method1(intern!(py, "from_dlpack"), (Export(capsule.unbind()),)) else {
        return Ok(None);
    };
    // SAFETY: as above: `integers` keeps it alive. An exporter that hands out the same one again finds it as it was.
    unsafe { (*managed).type_code = DlTensor::BFLOAT };
    Ok(Some(integers.call_method1(intern!(py, "view"), (bfloat16,))?.cast_into()?))
}
