//! Tensors in Python's memory: NumPy arrays, objects that convert to them, and output memory.

#![allow(unsafe_code, reason = "memory that NumPy owns")]

mod arrays;
mod dlpack;
mod exchange;
mod host;
mod types;

use crate::memory::Memory;
use crate::value_error;
use arrays::{has_mask, numpy};
pub(crate) use arrays::{real_array, tensor};
use batchnorm::{Element, Layout, View, ViewMut, bf16, f16};
pub(crate) use exchange::Exchange;
pub(crate) use host::{HostOutput, HostTensor, HostTensors, HostVector};
use numpy::npyffi::{
    self, NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_F_CONTIGUOUS, NPY_ARRAY_WRITEABLE, NPY_ORDER,
    PY_ARRAY_API,
};
use numpy::{PyArray1, PyArrayDescr, PyArrayDescrMethods, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyMemoryError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;
use std::any::TypeId;
use std::ffi::c_int;
pub(crate) use types::HostTypes;

/// The element types of the core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DType {
    F32,
    F64,
    F16,
    Bf16,
}

const WANTED: &str = "float32, float64, float16 or bfloat16 (ml_dtypes)";

impl DType {
    fn of(descr: &Bound<'_, PyArrayDescr>) -> Option<Self> {
        match descr.num() {
            11 => Some(Self::F32),
            12 => Some(Self::F64),
            23 => Some(Self::F16),
            // Types that packages register; bfloat16 is known by its name.
            256.. if descr.typeobj().name().is_ok_and(|name| name == "bfloat16") => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Stops where memory of this type would be read or written as another: a defect of ours.
    fn check<T: Element>(self) {
        let own = match self {
            Self::F32 => TypeId::of::<f32>(),
            Self::F64 => TypeId::of::<f64>(),
            Self::F16 => TypeId::of::<f16>(),
            Self::Bf16 => TypeId::of::<bf16>(),
        };
        assert!(own == TypeId::of::<T>(), "a tensor of {self:?} is viewed as {}", std::any::type_name::<T>());
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Calls `$body` with `$T` as the element type that `$dtype` names.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::buffer::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::buffer::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::buffer::DType::F16 => {
                type $T = batchnorm::f16;
                $body
            }
            $crate::buffer::DType::Bf16 => {
                type $T = batchnorm::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// A dense array of a known element type and layout, in native byte order.
pub(crate) struct Tensor<'py> {
    pub(crate) array: Bound<'py, PyUntypedArray>,
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
    /// Whether it is a copy of the argument.
    copied: bool,
}

impl<'py> Tensor<'py> {
    /// The argument as a tensor. It is copied only if it is strided or of foreign byte order.
    pub(crate) fn read(argument: &str, value: &Bound<'py, PyAny>, channel_axis: isize) -> PyResult<Self> {
        let array = tensor(argument, value)?;
        let dtype = dtype_of(argument, &array)?;
        if array.dtype().is_native_byteorder() != Some(false)
            && let Some(layout) = layout_of(&array, dtype, channel_axis)?
        {
            return Ok(Self { array, dtype, layout, copied: false });
        }
        let copy = copied(&array)?;
        match layout_of(&copy, dtype, channel_axis)? {
            Some(layout) => Ok(Self { array: copy, dtype, layout, copied: true }),
            None => Err(PyValueError::new_err(format!("{argument} cannot be copied to dense memory"))),
        }
    }

    /// The argument as a tensor of the shape, dtype and memory order of this one; copied where its order differs.
    pub(crate) fn read_like(&self, argument: &str, value: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = tensor(argument, value)?;
        self.check_like(argument, &array)?;
        let native = array.dtype().is_native_byteorder() != Some(false);
        let array = if native && self.same_order(&array) {
            array
        } else {
            let copy = self.empty_like()?;
            numpy(self.array.py())?.call_method1(intern!(self.array.py(), "copyto"), (&copy, &array))?;
            copy
        };
        Ok(Self { array, dtype: self.dtype, layout: self.layout, copied: false })
    }

    /// Memory for a result of the shape, dtype and memory order of this tensor: the argument `out`, or new memory.
    ///
    /// It is an error if `out` does not fit, or shares memory with one of `inputs`.
    pub(crate) fn output(
        &self,
        argument: &str,
        out: Option<&Bound<'py, PyAny>>,
        inputs: &[(&str, &Bound<'py, PyUntypedArray>)],
    ) -> PyResult<Output<'py>> {
        let Some(out) = out else {
            return Ok(Output { array: self.empty_like()?, dtype: self.dtype, layout: self.layout });
        };
        let array = self.check_output(argument, out)?;
        let place = addresses(&array);
        for (name, input) in inputs {
            let other = addresses(input);
            if place.start < other.end && other.start < place.end {
                let message = format!("{argument} shares memory with {name}; wanted memory of its own");
                return Err(PyValueError::new_err(message));
            }
        }
        Ok(Output { array, dtype: self.dtype, layout: self.layout })
    }

    /// Like [`Tensor::output`], but `out` may also be exactly the memory of `over`; then the second value is true.
    pub(crate) fn output_over(
        &self,
        argument: &str,
        out: Option<&Bound<'py, PyAny>>,
        over: (&str, &Self),
        inputs: &[(&str, &Bound<'py, PyUntypedArray>)],
    ) -> PyResult<(Output<'py>, bool)> {
        // Where both begin at one address, `out` is the whole of `over`: `output` checks shape, dtype and memory order.
        let in_place = out
            .and_then(|out| out.cast::<PyUntypedArray>().ok())
            .is_some_and(|out| data(out) == data(&over.1.array) && !self.layout.is_empty());
        let inputs = if in_place { inputs.to_vec() } else { [&[(over.0, &over.1.array)], inputs].concat() };
        Ok((self.output(argument, out, &inputs)?, in_place))
    }

    /// Checks that channels have 2 values or more, which training needs: the variance of one value is 0.
    pub(crate) fn check_batch(&self) -> PyResult<()> {
        let (shape, values) = (self.array.shape(), self.layout.count());
        if values >= 2 {
            return Ok(());
        }
        let plural = if values == 1 { "" } else { "s" };
        Err(PyValueError::new_err(format!(
            "x has shape {shape:?}, {values} value{plural} in each channel; training wants 2 or more, because it normalizes \
             by their variance"
        )))
    }

    fn check_output(&self, argument: &str, out: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
        let array = out
            .cast::<PyUntypedArray>()
            .map_err(|_| PyTypeError::new_err(format!("{argument} is {}; wanted a NumPy array", type_name(out))))?;
        if has_mask(out)? {
            let message = format!("{argument} is {} with a mask; wanted a NumPy array", type_name(out));
            return Err(PyTypeError::new_err(message));
        }
        self.check_like(argument, array)?;
        if array.dtype().is_native_byteorder() == Some(false) {
            let message = format!("{argument} is of foreign byte order; wanted native byte order");
            return Err(PyTypeError::new_err(message));
        }
        if !self.same_order(array) {
            return Err(PyValueError::new_err(format!(
                "{argument} has strides {:?}; wanted the memory order of {}, strides {:?}",
                array.strides(),
                if self.copied { "the dense copy that was made of x" } else { "x" },
                self.array.strides()
            )));
        }
        if flags(array) & NPY_ARRAY_WRITEABLE == 0 {
            let message = format!("{argument} is read-only; wanted an array that can be written");
            return Err(PyValueError::new_err(message));
        }
        Ok(array.clone())
    }

    fn check_like(&self, argument: &str, array: &Bound<'py, PyUntypedArray>) -> PyResult<()> {
        if dtype_of(argument, array)? != self.dtype {
            return Err(PyTypeError::new_err(format!(
                "{argument} has dtype {}; wanted that of x, {}",
                array.dtype(),
                self.array.dtype()
            )));
        }
        if array.shape() != self.array.shape() {
            return Err(PyValueError::new_err(format!(
                "{argument} has shape {:?}; wanted that of x, {:?}",
                array.shape(),
                self.array.shape()
            )));
        }
        Ok(())
    }

    /// Whether an array of this shape has its elements at the same offsets. Strides of axes of size 1 are ignored.
    fn same_order(&self, array: &Bound<'py, PyUntypedArray>) -> bool {
        let mut strides = array.strides().iter().zip(self.array.strides()).zip(self.array.shape());
        self.layout.is_empty() || strides.all(|((a, b), &n)| a == b || n == 1)
    }

    fn empty_like(&self) -> PyResult<Bound<'py, PyUntypedArray>> {
        let (py, array) = (self.array.py(), self.array.as_array_ptr());
        if let Some(memory) = Memory::worth_keeping(self.bytes())? {
            return self.array_in(memory);
        }
        // SAFETY: the prototype is alive; a null dtype stands for its own. The result is a new reference or null with
        // an error set, as `from_owned_ptr_or_err` expects.
        let new = unsafe {
            let new = PY_ARRAY_API.PyArray_NewLikeArray(py, array, NPY_ORDER::NPY_KEEPORDER, std::ptr::null_mut(), 0);
            Bound::from_owned_ptr_or_err(py, new)?
        };
        Ok(new.cast_into::<PyUntypedArray>()?)
    }

    /// An array of the shape, dtype and memory order of this tensor, in the given memory, which is large enough.
    fn array_in(&self, mut memory: Memory) -> PyResult<Bound<'py, PyUntypedArray>> {
        let (py, array) = (self.array.py(), self.array.as_array_ptr());
        let start = memory.start();
        let memory = Bound::new(py, memory)?;
        // SAFETY: the prototype is alive and dense with `layout.len()` elements, so an array of its dimensions and
        // strides (those that NumPy makes for its order, where they are null) ends within the memory. That lives as
        // long as the array, whose base it is. Both functions take over the reference given last; the first gives a
        // new one, or null with an error set, and so does −1.
        unsafe {
            let prototype = &(*array).fields;
            let order = flags(&self.array) & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS);
            let new = PY_ARRAY_API.PyArray_NewFromDescr(
                py,
                npyffi::get_type_object(py, npyffi::NpyTypes::PyArray_Type),
                self.array.dtype().into_dtype_ptr(),
                prototype.nd,
                prototype.dimensions,
                if order == 0 { prototype.strides } else { std::ptr::null_mut() },
                start.cast(),
                NPY_ARRAY_WRITEABLE | order,
                std::ptr::null_mut(),
            );
            let new = Bound::from_owned_ptr_or_err(py, new)?;
            match PY_ARRAY_API.PyArray_SetBaseObject(py, new.as_ptr().cast(), memory.into_ptr()) {
                0 => Ok(new.cast_into::<PyUntypedArray>()?),
                _ => Err(PyErr::fetch(py)),
            }
        }
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.layout.len() * self.dtype.bytes()
    }

    /// A view of the tensor; `T` must be the element type that `dtype` names.
    ///
    /// Like NumPy's own functions, this relies on no other thread writing the array meanwhile.
    pub(crate) fn view<T: Element>(&self) -> View<'_, T> {
        self.dtype.check::<T>();
        // SAFETY: the array is alive and dense with `layout.len()` elements of this type, as `read` has checked.
        unsafe { View::from_raw(data(&self.array).cast(), self.layout) }
    }
}

/// An array that a result is written to, with the shape, dtype and memory order of its tensor.
pub(crate) struct Output<'py> {
    pub(crate) array: Bound<'py, PyUntypedArray>,
    dtype: DType,
    layout: Layout,
}

impl Output<'_> {
    /// A view that writes the array; `T` must be the element type of its tensor.
    pub(crate) fn view_mut<T: Element>(&mut self) -> ViewMut<'_, T> {
        self.dtype.check::<T>();
        // SAFETY: the array is alive, writable, dense with `layout.len()` elements of this type, and shares no memory
        // with the call's inputs (or is the input, of which no view is made then), as `output` has checked.
        unsafe { ViewMut::from_raw(data(&self.array).cast(), self.layout) }
    }
}

fn data(array: &Bound<'_, PyUntypedArray>) -> *mut u8 {
    // SAFETY: the array is alive; reading its data pointer has no effect.
    unsafe { (*array.as_array_ptr()).fields.data.cast() }
}

fn flags(array: &Bound<'_, PyUntypedArray>) -> c_int {
    // SAFETY: the array is alive, and its flags are plain data.
    unsafe { (*array.as_array_ptr()).fields.flags }
}

/// The range of addresses that a dense array occupies.
fn addresses(array: &Bound<'_, PyUntypedArray>) -> std::ops::Range<usize> {
    let start = data(array) as usize;
    start..start + array.len() * array.dtype().itemsize()
}

fn layout_of(array: &Bound<'_, PyUntypedArray>, dtype: DType, channel_axis: isize) -> PyResult<Option<Layout>> {
    Layout::of_strides(array.shape(), array.strides(), dtype.bytes(), channel_axis).map_err(value_error)
}

fn dtype_of(argument: &str, array: &Bound<'_, PyUntypedArray>) -> PyResult<DType> {
    let descr = array.dtype();
    DType::of(&descr).ok_or_else(|| PyTypeError::new_err(format!("{argument} has dtype {descr}; wanted {WANTED}")))
}

/// A dense copy in native byte order that keeps the order of the axes.
fn copied<'py>(array: &Bound<'py, PyUntypedArray>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let py = array.py();
    let native = array.dtype().call_method1(intern!(py, "newbyteorder"), ("=",))?;
    let options = [("dtype", native), ("order", "K".into_pyobject(py)?.into_any())].into_py_dict(py)?;
    let copy = numpy(py)?.call_method(intern!(py, "array"), (array,), Some(&options))?;
    Ok(copy.cast_into::<PyUntypedArray>()?)
}

/// The values of a contiguous one-dimensional array of float64 or float32; `None` for any other value.
pub(crate) fn floats(value: &Bound<'_, PyAny>) -> PyResult<Option<Vec<f64>>> {
    const WANTED: c_int = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;
    let Ok(array) = value.cast_exact::<PyUntypedArray>() else { return Ok(None) };
    let descr = array.dtype();
    if array.ndim() != 1 || flags(array) & WANTED != WANTED || descr.is_native_byteorder() != Some(true) {
        return Ok(None);
    }
    let len = array.len();
    // SAFETY: the array is alive, contiguous and aligned, with as many elements of this type as its axis says. Like
    // NumPy's own functions, this relies on no other thread writing the array meanwhile.
    unsafe {
        match DType::of(&descr) {
            Some(DType::F32) => {
                let values = std::slice::from_raw_parts(data(array).cast::<f32>(), len);
                collected(values.iter().map(|&value| value.into())).map(Some)
            }
            Some(DType::F64) => {
                let values = std::slice::from_raw_parts(data(array).cast::<f64>(), len);
                collected(values.iter().copied()).map(Some)
            }
            Some(DType::F16 | DType::Bf16) | None => Ok(None),
        }
    }
}

/// The values as a vector, or MemoryError.
pub(crate) fn collected(values: impl ExactSizeIterator<Item = f64>) -> PyResult<Vec<f64>> {
    let mut vector = Vec::new();
    vector
        .try_reserve_exact(values.len())
        .map_err(|_| PyMemoryError::new_err(format!("no memory for {} values, one for each channel", values.len())))?;
    vector.extend(values);
    Ok(vector)
}

/// A new NumPy array of these values.
pub(crate) fn new_vector<'py>(py: Python<'py>, values: &[f64]) -> PyResult<Bound<'py, PyArray1<f64>>> {
    filled(empty_vector(py, values.len())?, values)
}

/// The array, which is as long as the values, with these values in it.
pub(crate) fn filled<'py>(array: Bound<'py, PyArray1<f64>>, values: &[f64]) -> PyResult<Bound<'py, PyArray1<f64>>> {
    array.readwrite().as_slice_mut()?.copy_from_slice(values);
    Ok(array)
}

/// A new array of so many values, or MemoryError.
pub(crate) fn empty_vector(py: Python<'_>, len: usize) -> PyResult<Bound<'_, PyArray1<f64>>> {
    let (mut dimensions, null) = ([len as npyffi::npy_intp], std::ptr::null_mut());
    // SAFETY: there is one dimension, as the count says; with null pointers NumPy chooses strides and memory itself. The result
    // is a new reference or null with an error set, as `from_owned_ptr_or_err` expects.
    let new = unsafe {
        let (class, float64) =
            (npyffi::get_type_object(py, npyffi::NpyTypes::PyArray_Type), npyffi::NPY_TYPES::NPY_DOUBLE as c_int);
        let dimensions = dimensions.as_mut_ptr();
        let new = PY_ARRAY_API.PyArray_New(py, class, 1, dimensions, float64, null, null.cast(), 0, 0, null.cast());
        Bound::from_owned_ptr_or_err(py, new)?
    };
    Ok(new.cast_into::<PyArray1<f64>>()?)
}

pub(crate) fn type_name(value: &Bound<'_, PyAny>) -> String {
    value.get_type().fully_qualified_name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}
