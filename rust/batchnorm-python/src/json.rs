//! JSON of the HTTP protocol: Python functions over the crate `batchnorm_json`.

use batchnorm_json::{Build, Limits, NonFinite, Numbers, Scalar, cut_data, parse, put_data};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString};

/// Bytes of text from which the interpreter lock is released: shorter texts are done before another thread could use the
/// interpreter.
const WORTH_DETACHING: usize = 32 * 1024;

/// The numbers of a `data` array, flat, and the lengths of its nested arrays.
type Data<'py> = (Bound<'py, PyAny>, Vec<usize>);

/// A text in Python's memory: `bytes`, or an array of bytes.
#[derive(FromPyObject)]
pub(crate) enum Text<'py> {
    Bytes(Bound<'py, PyBytes>),
    Array(PyReadonlyArray1<'py, u8>),
}

/// Take the `data` arrays out of the JSON of an inference request.
///
/// NaN, Infinity and -Infinity are read as numbers. In `data`, null is read as NaN.
///
/// Args:
///     text: The request, as bytes or as an array of bytes.
///     max_elements: Largest number of elements of all `data` arrays together.
///     max_depth: Largest depth of nested arrays and objects, up to 255.
///
/// Returns:
///     The text, with [i] in place of the i-th `data` array of the objects in `inputs`; and a list of these arrays. Each
///     is a pair: a flat array of its numbers (float32 if the object's `datatype` is FP32, else float64), and the lengths
///     of its nested arrays, outermost first: (1, 3) for [[1, 2, 3]], and (2, 0) for [[], []].
///
/// Raises:
///     ValueError: The text is malformed or nested too deep; or an array holds anything but numbers, is ragged, or holds
///         a finite number beyond the range of its dtype.
///     OverflowError: There are more than max_elements numbers.
#[pyfunction]
pub(crate) fn json_cut_data<'py>(
    py: Python<'py>,
    text: Text<'py>,
    max_elements: usize,
    max_depth: u8,
) -> PyResult<(Bound<'py, PyBytes>, Vec<Data<'py>>)> {
    let bytes = match &text {
        Text::Bytes(bytes) => bytes.as_bytes(),
        Text::Array(array) => array.as_slice()?,
    };
    let limits = Limits { depth: max_depth, numbers: max_elements };
    let request = detached(py, bytes.len(), || cut_data(bytes, limits)).map_err(raised)?;
    let arrays = request.arrays.into_iter().map(|array| {
        let numbers = match array.numbers {
            Numbers::F32(values) => PyArray1::from_vec(py, values).into_any(),
            Numbers::F64(values) => PyArray1::from_vec(py, values).into_any(),
        };
        (numbers, array.shape)
    });
    Ok((PyBytes::new(py, &request.head), arrays.collect()))
}

/// Parse UTF-8 JSON.
///
/// NaN, Infinity and -Infinity are read as numbers. If an object has two members of one name, the last counts.
///
/// Args:
///     text: The text.
///     max_depth: Largest depth of nested arrays and objects, up to 255.
///
/// Returns:
///     The value: dict, list, str, int, float, bool or None.
///
/// Raises:
///     ValueError: The text is malformed or nested too deep, or holds a finite number beyond the range of float64.
#[pyfunction]
pub(crate) fn json_parse<'py>(py: Python<'py>, text: &[u8], max_depth: u8) -> PyResult<Bound<'py, PyAny>> {
    parse(text, max_depth, &mut Objects(py)).map_err(|Raised(error)| error)
}

/// Print a JSON text that contains an array of floats, each with the fewest digits that give its bits back.
///
/// Args:
///     before: The text before the array.
///     values: Dense one-dimensional array of float32 or float64.
///     after: The text after the array.
///     null: Whether NaN and infinities are printed as null; else as the tokens NaN, Infinity and -Infinity.
///
/// Returns:
///     The text, in a new array of bytes. A reader that rounds numbers to float64, and for float32 then to float32, gets
///     their bits back.
///
/// Raises:
///     TypeError: values is not such an array.
#[pyfunction]
pub(crate) fn json_put_data<'py>(
    py: Python<'py>,
    before: &[u8],
    values: &Bound<'py, PyAny>,
    after: &[u8],
    null: bool,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let non_finite = if null { NonFinite::Null } else { NonFinite::Tokens };
    let text = if let Ok(array) = values.extract::<PyReadonlyArray1<'_, f32>>() {
        let values = array.as_slice()?;
        detached(py, size_of_val(values), || put_data(before, values, after, non_finite))
    } else {
        let array = values.extract::<PyReadonlyArray1<'_, f64>>()?;
        let values = array.as_slice()?;
        detached(py, size_of_val(values), || put_data(before, values, after, non_finite))
    };
    Ok(PyArray1::from_vec(py, text.map_err(raised)?))
}

/// Does work on `bytes` of text, without the interpreter lock if there is much of it.
fn detached<T: Send>(py: Python<'_>, bytes: usize, work: impl FnOnce() -> T + Send) -> T {
    if bytes < WORTH_DETACHING { work() } else { py.detach(work) }
}

fn raised(error: batchnorm_json::Error) -> PyErr {
    let text = error.to_string();
    match error {
        batchnorm_json::Error::TooManyNumbers => PyOverflowError::new_err(text),
        batchnorm_json::Error::NoMemory => PyMemoryError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

/// Builds Python objects from parsed JSON.
struct Objects<'py>(Python<'py>);

struct Raised(PyErr);

impl From<batchnorm_json::Error> for Raised {
    fn from(error: batchnorm_json::Error) -> Self {
        Self(raised(error))
    }
}

impl From<PyErr> for Raised {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl<'py> Build for Objects<'py> {
    type Value = Bound<'py, PyAny>;
    type Error = Raised;

    fn scalar(&mut self, scalar: Scalar<'_>) -> Result<Self::Value, Raised> {
        let py = self.0;
        Ok(match scalar {
            Scalar::Null => py.None().into_bound(py),
            Scalar::Boolean(value) => PyBool::new(py, value).to_owned().into_any(),
            Scalar::Integer(digits) => match digits.parse::<i64>() {
                Ok(value) => PyInt::new(py, value).into_any(),
                Err(_) => py.get_type::<PyInt>().call1((digits,))?,
            },
            Scalar::Float(value) => PyFloat::new(py, value).into_any(),
            Scalar::String(text) => PyString::new(py, text).into_any(),
        })
    }

    fn array(&mut self) -> Result<Self::Value, Raised> {
        Ok(PyList::empty(self.0).into_any())
    }

    fn push(&mut self, array: &mut Self::Value, item: Self::Value) -> Result<(), Raised> {
        Ok(array.cast::<PyList>().map_err(PyErr::from)?.append(item)?)
    }

    fn object(&mut self) -> Result<Self::Value, Raised> {
        Ok(PyDict::new(self.0).into_any())
    }

    fn insert(&mut self, object: &mut Self::Value, name: &str, value: Self::Value) -> Result<(), Raised> {
        Ok(object.cast::<PyDict>().map_err(PyErr::from)?.set_item(name, value)?)
    }
}
