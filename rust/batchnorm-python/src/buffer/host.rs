//! The tensors of one call, in the memory of a host library.

use super::exchange::{Exchange, Lent};
use super::{DType, collected};
use crate::value_error;
use batchnorm::{Element, Error, Layout, Numbers, View, ViewMut};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::slice;

/// The axis of the channels in every tensor of a host.
const CHANNEL_AXIS: isize = 1;
/// Rows of the tables in which moments and gradient sums travel.
const ROWS: usize = 3;

/// Reads the tensors of one call. What the call writes shares memory with nothing else that it reads or writes.
///
/// Like the host's own operators, it relies on no other thread changing the tensors meanwhile.
pub(crate) struct HostTensors<'a> {
    exchange: &'a Exchange,
    places: Vec<Place>,
}

/// Memory that a tensor of the call occupies.
struct Place {
    argument: &'static str,
    addresses: Range<usize>,
    written: bool,
}

impl<'a> HostTensors<'a> {
    pub(crate) fn new(exchange: &'a Exchange) -> Self {
        Self { exchange, places: Vec::with_capacity(14) }
    }

    /// The tensor x, whose shape, dtype and memory order the other tensors have: dense, of rank 2 or more.
    pub(crate) fn x(&mut self, value: &'a Bound<'_, PyAny>) -> PyResult<HostTensor<'a>> {
        let lent = self.exchange.lent("x", value)?;
        let dtype = lent.dtype().ok_or_else(|| lent.other_dtype("float32, float64, float16 or bfloat16"))?;
        let overflow = |_| value_error(Error::Overflow);
        let shape: Vec<usize> =
            lent.shape().iter().map(|&n| n.try_into()).collect::<Result<_, _>>().map_err(overflow)?;
        let strides: Vec<isize> =
            lent.strides().iter().map(|&n| n.try_into()).collect::<Result<_, _>>().map_err(overflow)?;
        // Strides count elements here, so an element is the unit.
        let layout = Layout::of_strides(&shape, &strides, 1, CHANNEL_AXIS).map_err(value_error)?.ok_or_else(|| {
            let wanted = "a tensor that is dense in some order of its axes";
            PyValueError::new_err(format!("x has shape {shape:?} and strides {strides:?}; wanted {wanted}"))
        })?;
        self.occupy("x", &lent, dtype, false)?;
        let axes = lent.shape().iter().copied().zip(lent.strides().iter().copied()).collect();
        Ok(HostTensor { start: lent.start(), dtype, layout, axes, owner: PhantomData })
    }

    /// A tensor that is read, of the shape, dtype and memory order of x.
    pub(crate) fn input(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        x: &HostTensor<'_>,
    ) -> PyResult<HostTensor<'a>> {
        self.like(argument, value, x, false)
    }

    /// A tensor that is written, of the shape, dtype and memory order of x.
    pub(crate) fn output(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        x: &HostTensor<'_>,
    ) -> PyResult<HostOutput<'a>> {
        self.like(argument, value, x, true).map(HostOutput)
    }

    fn like(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        x: &HostTensor<'_>,
        written: bool,
    ) -> PyResult<HostTensor<'a>> {
        let lent = self.exchange.lent(argument, value)?;
        if lent.dtype() != Some(x.dtype) {
            return Err(lent.other_dtype(&format!("that of x, {}", x.dtype.name())));
        }
        let (shape, strides) = (lent.shape(), lent.strides());
        if !shape.iter().eq(x.axes.iter().map(|(n, _)| n)) {
            let wanted: Vec<i64> = x.axes.iter().map(|&(n, _)| n).collect();
            return Err(PyValueError::new_err(format!("{argument} has shape {shape:?}; wanted that of x, {wanted:?}")));
        }
        // Strides of axes of length 1 lead nowhere.
        if !x.layout.is_empty() && !strides.iter().zip(&x.axes).all(|(a, (n, b))| a == b || *n == 1) {
            let wanted: Vec<i64> = x.axes.iter().map(|&(_, stride)| stride).collect();
            let message =
                format!("{argument} has strides {strides:?}; wanted the memory order of x, strides {wanted:?}");
            return Err(PyValueError::new_err(message));
        }
        self.occupy(argument, &lent, x.dtype, written)?;
        Ok(HostTensor { start: lent.start(), dtype: x.dtype, layout: x.layout, axes: Vec::new(), owner: PhantomData })
    }

    /// Per-channel numbers that are read, shape (channels,), float32 or float64.
    pub(crate) fn numbers(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        x: &HostTensor<'_>,
    ) -> PyResult<Vec<f64>> {
        self.vector(argument, value, &[x.channels()], false)?.read()
    }

    /// Per-channel numbers that are written, shape (channels,), float32 or float64.
    pub(crate) fn numbers_out(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        x: &HostTensor<'_>,
    ) -> PyResult<HostVector<'a>> {
        self.vector(argument, value, &[x.channels()], true)
    }

    /// The rows of a table that is read, shape (3, channels), float64.
    pub(crate) fn table(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        x: &HostTensor<'_>,
    ) -> PyResult<[Vec<f64>; ROWS]> {
        let table = self.vector(argument, value, &[ROWS, x.channels()], false)?.read()?;
        let row = |r: usize| collected(table[r * x.channels()..][..x.channels()].iter().copied());
        Ok([row(0)?, row(1)?, row(2)?])
    }

    /// A table that is written, shape (3, channels), float64.
    pub(crate) fn table_out(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        x: &HostTensor<'_>,
    ) -> PyResult<HostTable<'a>> {
        self.vector(argument, value, &[ROWS, x.channels()], true).map(HostTable)
    }

    /// A contiguous tensor of this shape: of float32 or float64 if it has one axis, else of float64.
    fn vector(
        &mut self,
        argument: &'static str,
        value: &'a Bound<'_, PyAny>,
        wanted: &[usize],
        written: bool,
    ) -> PyResult<HostVector<'a>> {
        let lent = self.exchange.lent(argument, value)?;
        let dtype = match lent.dtype() {
            Some(DType::F64) => DType::F64,
            Some(DType::F32) if wanted.len() == 1 => DType::F32,
            _ => return Err(lent.other_dtype(if wanted.len() == 1 { "float32 or float64" } else { "float64" })),
        };
        let (shape, strides) = (lent.shape(), lent.strides());
        if !shape.iter().map(|&n| n as usize).eq(wanted.iter().copied()) {
            return Err(PyValueError::new_err(format!("{argument} has shape {shape:?}; wanted {wanted:?}")));
        }
        let mut stride = 1;
        for (&n, &found) in shape.iter().zip(strides).rev() {
            if found != stride && n != 1 {
                let message = format!("{argument} has strides {strides:?}; wanted a contiguous tensor");
                return Err(PyValueError::new_err(message));
            }
            stride *= n;
        }
        if !(lent.start().as_ptr() as usize).is_multiple_of(dtype.bytes()) {
            return Err(PyValueError::new_err(format!("{argument} is not aligned to its elements; wanted that it is")));
        }
        self.occupy(argument, &lent, dtype, written)?;
        Ok(HostVector { argument, start: lent.start(), dtype, len: lent.len(), owner: PhantomData })
    }

    /// Notes which memory a dense tensor occupies.
    fn occupy(&mut self, argument: &'static str, lent: &Lent<'_>, dtype: DType, written: bool) -> PyResult<()> {
        let start = lent.start().as_ptr() as usize;
        let addresses = start..start.saturating_add(lent.len().saturating_mul(dtype.bytes()));
        let shared = |other: &&Place| {
            (written || other.written) && addresses.start < other.addresses.end && other.addresses.start < addresses.end
        };
        if let Some(other) = self.places.iter().find(shared) {
            let (output, other) = if written { (argument, other.argument) } else { (other.argument, argument) };
            let message = format!("{output} shares memory with {other}; wanted memory of its own");
            return Err(PyValueError::new_err(message));
        }
        self.places.push(Place { argument, addresses, written });
        Ok(())
    }
}

/// A dense tensor of the host.
pub(crate) struct HostTensor<'a> {
    start: NonNull<u8>,
    pub(crate) dtype: DType,
    layout: Layout,
    /// Length and stride of each axis of x; empty for tensors like x.
    axes: Vec<(i64, i64)>,
    owner: PhantomData<&'a Py<PyAny>>,
}

impl<'a> HostTensor<'a> {
    pub(crate) fn channels(&self) -> usize {
        self.layout.channels()
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.layout.len() * self.dtype.bytes()
    }

    /// A view of the tensor; `T` must be the element type that `dtype` names.
    pub(crate) fn view<T: Element>(&self) -> View<'a, T> {
        self.dtype.check::<T>();
        // SAFETY: its owner is borrowed for `'a`; the tensor is dense, with `layout.len()` elements of this type, and no output
        // of the call shares its memory, as `HostTensors` has checked.
        unsafe { View::from_raw(self.start.as_ptr().cast(), self.layout) }
    }
}

/// A dense tensor of the host that a result is written to.
pub(crate) struct HostOutput<'a>(HostTensor<'a>);

impl HostOutput<'_> {
    /// A view that writes the tensor; `T` must be the element type of x.
    pub(crate) fn view_mut<T: Element>(&mut self) -> ViewMut<'_, T> {
        self.0.dtype.check::<T>();
        // SAFETY: its owner is borrowed as long as `self` lives; the tensor is dense, with `layout.len()` elements of this type,
        // and no other tensor of the call shares its memory, as `HostTensors` has checked.
        unsafe { ViewMut::from_raw(self.0.start.as_ptr().cast(), self.0.layout) }
    }
}

/// Contiguous numbers of the host, in float32 or float64.
pub(crate) struct HostVector<'a> {
    argument: &'static str,
    start: NonNull<u8>,
    dtype: DType,
    len: usize,
    owner: PhantomData<&'a Py<PyAny>>,
}

impl HostVector<'_> {
    fn read(&self) -> PyResult<Vec<f64>> {
        // SAFETY: the owner is borrowed as long as `self` lives; the numbers are contiguous and aligned, `len` of this type, as
        // `HostTensors::vector` has checked.
        unsafe {
            match self.dtype {
                DType::F32 => {
                    let numbers = slice::from_raw_parts(self.start.cast::<f32>().as_ptr(), self.len);
                    collected(numbers.iter().map(|&number| number.into()))
                }
                _ => collected(slice::from_raw_parts(self.start.cast::<f64>().as_ptr(), self.len).iter().copied()),
            }
        }
    }

    /// The numbers where they lie.
    pub(crate) fn numbers(&mut self) -> Numbers<'_> {
        // SAFETY: as in `read`; and no other tensor of the call shares their memory.
        unsafe {
            match self.dtype {
                DType::F32 => Numbers::F32(slice::from_raw_parts_mut(self.start.cast().as_ptr(), self.len)),
                _ => Numbers::F64(slice::from_raw_parts_mut(self.start.cast().as_ptr(), self.len)),
            }
        }
    }

    /// Writes values, one for each channel, rounded to the dtype of the numbers.
    pub(crate) fn fill(&mut self, values: &[f64]) -> PyResult<()> {
        let argument = self.argument;
        self.numbers().fill(argument, values).map_err(value_error)
    }
}

/// A table of the host in float64, with a column for each channel.
pub(crate) struct HostTable<'a>(HostVector<'a>);

impl HostTable<'_> {
    /// Writes its rows.
    pub(crate) fn fill(&mut self, rows: [&[f64]; ROWS]) {
        if let Numbers::F64(table) = self.0.numbers() {
            let channels = table.len() / ROWS;
            table.chunks_exact_mut(channels).zip(rows).for_each(|(row, values)| row.copy_from_slice(values));
        }
    }
}
