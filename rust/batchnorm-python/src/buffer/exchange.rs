//! Tensors of a host library by DLPack's C exchange API: functions in C that its tensor type exports.
//!
//! A tensor is read in tens of nanoseconds, without an attribute of it being looked up, also if it is of bfloat16 or requires
//! grad. The library goes on owning the memory.

use super::dlpack::DlTensor;
use super::{DType, type_name};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};
use pyo3::{ffi, intern};
use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::slice;

/// `DLPackExchangeAPIHeader`: the beginning of the table of every version.
#[repr(C)]
struct Header {
    major: u32,
    minor: u32,
    older: *const Header,
}

/// `DLPackExchangeAPI` of major version 1.
#[repr(C)]
struct Api {
    header: Header,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object_no_sync: *const c_void,
    managed_tensor_to_py_object_no_sync: *const c_void,
    dltensor_from_py_object_no_sync: Option<ReadTensor>,
    current_work_stream: *const c_void,
}

/// Fills in the tensor, which stays valid while the object lives unchanged; −1 with a Python exception set if it cannot.
type ReadTensor = unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int;

const CAPSULE: &CStr = c"dlpack_exchange_api";
const MAJOR: u32 = 1;

/// How the tensors of a host library are read.
pub(crate) struct Exchange {
    class: Py<PyType>,
    read: ReadTensor,
}

impl Exchange {
    /// The functions that a type exports.
    pub(crate) fn of(class: &Bound<'_, PyType>) -> PyResult<Self> {
        let wanted = |found: &str| {
            let name = class.fully_qualified_name().map_or_else(|_| "a type".to_owned(), |name| name.to_string());
            PyTypeError::new_err(format!(
                "tensor_type is {name}{found}; wanted the tensor type of a library with DLPack's C exchange API, version {MAJOR}"
            ))
        };
        let capsule = class.getattr_opt(intern!(class.py(), "__dlpack_c_exchange_api__"))?;
        let capsule = capsule.and_then(|capsule| capsule.cast_into::<PyCapsule>().ok()).ok_or_else(|| wanted(""))?;
        let mut table = capsule
            .pointer_checked(Some(CAPSULE))
            .map_err(|_| wanted(" with another capsule"))?
            .as_ptr()
            .cast::<Header>()
            .cast_const();
        // SAFETY: a capsule of this name points to a table that lives as long as the process, and that of every version begins
        // with this header. One of our major version has the fields of `Api`, in this order.
        let read = unsafe {
            while !table.is_null() && (*table).major != MAJOR {
                table = (*table).older;
            }
            if table.is_null() {
                return Err(wanted(" with another version"));
            }
            (*table.cast::<Api>()).dltensor_from_py_object_no_sync
        };
        let read = read.ok_or_else(|| wanted(", which cannot lend its tensors"))?;
        Ok(Self { class: class.clone().unbind(), read })
    }

    /// The argument, if it is a tensor of the host's type in the memory of the CPU.
    pub(super) fn lent<'a>(&self, argument: &'static str, value: &'a Bound<'_, PyAny>) -> PyResult<Lent<'a>> {
        let class = self.class.bind(value.py());
        // SAFETY: both are alive. Unlike `isinstance`, this asks no method that could claim another type.
        if unsafe { ffi::PyObject_TypeCheck(value.as_ptr(), class.as_type_ptr()) } == 0 {
            let wanted = class.fully_qualified_name()?;
            return Err(PyTypeError::new_err(format!("{argument} is {}; wanted a {wanted}", type_name(value))));
        }
        let mut tensor = MaybeUninit::uninit();
        // SAFETY: the object is an instance of the type that exports the function, as the function asks. It fills in the
        // whole tensor if it returns 0.
        let tensor = unsafe {
            match (self.read)(value.as_ptr(), tensor.as_mut_ptr()) {
                0 => tensor.assume_init(),
                _ => return Err(not_lent(argument, value)),
            }
        };
        let lent = Lent { argument, tensor, _owner: value };
        lent.check()?;
        Ok(lent)
    }
}

/// The error of a tensor that the host library does not lend; its cause is the exception that the library has set.
fn not_lent(argument: &str, value: &Bound<'_, PyAny>) -> PyErr {
    let py = value.py();
    let cause = PyErr::take(py); // before anything else, since Python must not be called with an exception set
    let found = type_name(value);
    let text = cause.as_ref().map_or_else(String::new, |cause| cause.value(py).to_string());
    let why = text.lines().next().unwrap_or_default();
    let error = PyTypeError::new_err(format!("{argument} is {found} ({why}); wanted a dense tensor on the CPU"));
    error.set_cause(py, cause);
    error
}

/// A tensor of the host, as long as the object that owns it is borrowed.
pub(super) struct Lent<'a> {
    argument: &'static str,
    tensor: DlTensor,
    _owner: &'a Bound<'a, PyAny>,
}

impl Lent<'_> {
    /// Checks what the type of the fields does not say.
    fn check(&self) -> PyResult<()> {
        let Self { argument, tensor, .. } = self;
        if tensor.device[0] != DlTensor::CPU {
            let message = format!("{argument} is on a device of DLPack's type {}; wanted the CPU", tensor.device[0]);
            return Err(PyTypeError::new_err(message));
        }
        if tensor.rank < 0 || tensor.rank > 0 && (tensor.shape.is_null() || tensor.strides.is_null()) {
            return Err(PyTypeError::new_err(format!("{argument} has no shape or no strides; wanted both")));
        }
        if tensor.data.is_null() && !self.shape().contains(&0) {
            return Err(PyTypeError::new_err(format!("{argument} has no memory; wanted a dense tensor on the CPU")));
        }
        Ok(())
    }

    /// The length of each axis.
    pub(super) fn shape(&self) -> &[i64] {
        self.axes(self.tensor.shape)
    }

    /// The stride of each axis, in elements.
    pub(super) fn strides(&self) -> &[i64] {
        self.axes(self.tensor.strides)
    }

    fn axes(&self, numbers: *const i64) -> &[i64] {
        if self.tensor.rank == 0 {
            return &[];
        }
        // SAFETY: there is a number for each axis, at an address that `check` found not to be null; it stays valid as long
        // as its owner is borrowed and unchanged, and no Python code that could change it runs meanwhile.
        unsafe { slice::from_raw_parts(numbers, self.tensor.rank as usize) }
    }

    /// Number of elements.
    pub(super) fn len(&self) -> usize {
        self.shape().iter().fold(1, |size, &n| size.saturating_mul(n as usize))
    }

    /// The element type.
    pub(super) fn dtype(&self) -> Option<DType> {
        match (self.tensor.type_code, self.tensor.bits, self.tensor.lanes) {
            (DlTensor::FLOAT, 32, 1) => Some(DType::F32),
            (DlTensor::FLOAT, 64, 1) => Some(DType::F64),
            (DlTensor::FLOAT, 16, 1) => Some(DType::F16),
            (DlTensor::BFLOAT, 16, 1) => Some(DType::Bf16),
            _ => None,
        }
    }

    /// The number that it holds, if it is a single int64 without axes.
    pub(super) fn int64(&self) -> Option<NonNull<i64>> {
        let of_int64 = (self.tensor.type_code, self.tensor.bits, self.tensor.lanes) == (DlTensor::INT, 64, 1);
        let number = self.start().cast::<i64>();
        (of_int64 && self.tensor.rank == 0 && number.is_aligned()).then_some(number)
    }

    /// The error that it has another element type than wanted.
    pub(super) fn other_dtype(&self, wanted: &str) -> PyErr {
        const NAMES: [&str; 7] = ["int", "uint", "float", "opaque", "bfloat", "complex", "bool"];
        let (argument, bits, lanes) = (self.argument, self.tensor.bits, self.tensor.lanes);
        let name = NAMES.get(usize::from(self.tensor.type_code)).copied().unwrap_or("another type of bits ");
        let lanes = if lanes == 1 { String::new() } else { format!(" in {lanes} lanes") };
        PyTypeError::new_err(format!("{argument} has dtype {name}{bits}{lanes}; wanted {wanted}"))
    }

    /// The address of the first element; not null, also where there is none.
    pub(super) fn start(&self) -> NonNull<u8> {
        let data = self.tensor.data.cast::<u8>().wrapping_add(self.tensor.byte_offset as usize);
        NonNull::new(data).unwrap_or(NonNull::dangling())
    }
}
