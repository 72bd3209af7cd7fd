//! Numbers of the HTTP protocol: the `data` arrays of JSON messages ↔ float buffers, without an object a number.
//!
//! Texts are parsed by `jiter` and floats printed by `zmij`; here is only which arrays, and what their shape must be.

use jiter::{Jiter, JiterError, JiterErrorType, JsonErrorType, Peek};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Texts shorter than this are done before another thread could use the interpreter.
const WORTH_DETACHING: usize = 32 * 1024;

/// Bytes of a number in JSON and its comma.
const USUAL_LENGTH: usize = 10;

/// Readers of JSON round to float64 and then to float32. Of all float32 (all were tried) this one and its negative
/// alone have a shortest text, 7.038531e-26, which so becomes a neighbour; a float64 has more digits.
const MISREAD: u32 = 0x15AE_43FD;

/// The numbers of one ``data`` array, flat or nested, as float64.
///
/// ``shape`` is that of the nesting: of [[1, 2, 3]] it is (1, 3), and of [[], []] (2, 0).
#[pyclass(frozen, module = "batchnorm._core", name = "JsonNumbers")]
pub(crate) struct JsonNumbers {
    values: Vec<f64>,
    shape: Vec<usize>,
}

#[pymethods]
impl JsonNumbers {
    /// Lengths of the nested arrays, outermost first.
    #[getter]
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn __len__(&self) -> usize {
        self.values.len()
    }

    /// The numbers in a new flat array of float64.
    fn float64<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_slice(py, &self.values)
    }

    /// The numbers in a new flat array of float32, each rounded to the nearest.
    ///
    /// Raises:
    ///     ValueError: A finite number is beyond the range of float32.
    fn float32<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let narrow: Vec<f32> = self.values.iter().map(|&value| value as f32).collect();
        if narrow.iter().zip(&self.values).any(|(narrow, wide)| narrow.is_infinite() && wide.is_finite()) {
            return Err(PyValueError::new_err("data: a finite number is beyond the range of FP32"));
        }
        Ok(PyArray1::from_vec(py, narrow))
    }
}

/// A text in Python's memory.
#[derive(FromPyObject)]
pub(crate) enum Text<'py> {
    Bytes(Bound<'py, PyBytes>),
    Array(PyReadonlyArray1<'py, u8>),
}

/// Cuts the ``data`` arrays out of an inference request.
///
/// Args:
///     text: A JSON message, as bytes or as an array of them; NaN, Infinity and -Infinity are numbers too, and null is NaN in ``data``.
///     max_elements: The most numbers that all these arrays may hold.
///
/// Returns:
///     The text in which each array ``data`` of an object of ``inputs`` is [i], and the arrays, of which that is number
///     i. What else the text holds is for a JSON parser to judge.
///
/// Raises:
///     ValueError: The text is malformed, an array holds something else than numbers or is ragged, or a finite number
///         is beyond the range of float64.
///     OverflowError: There are more numbers than may be.
#[pyfunction]
pub(crate) fn json_cut_data<'py>(
    py: Python<'py>,
    text: Text<'py>,
    max_elements: usize,
) -> PyResult<(Bound<'py, PyBytes>, Vec<JsonNumbers>)> {
    let bytes = match &text {
        Text::Bytes(bytes) => bytes.as_bytes(),
        Text::Array(array) => array.as_slice()?,
    };
    let cut = || {
        let mut cutter = Cutter {
            json: Jiter::new(bytes).with_allow_inf_nan(),
            text: bytes,
            done: 0,
            head: Vec::new(),
            arrays: Vec::new(),
            left: max_elements,
        };
        cutter.message().map(|()| (cutter.head, cutter.arrays))
    };
    let (head, arrays) = if bytes.len() < WORTH_DETACHING { cut() } else { py.detach(cut) }?;
    Ok((PyBytes::new(py, &head), arrays))
}

struct Cutter<'a> {
    json: Jiter<'a>,
    text: &'a [u8],
    /// How much of the text is in `head`.
    done: usize,
    head: Vec<u8>,
    arrays: Vec<JsonNumbers>,
    /// How many numbers may still come.
    left: usize,
}

/// What an array holds, as far as it is read.
#[derive(Default)]
struct Found {
    values: Vec<f64>,
    /// The length of the arrays of each depth, known when the first of them ends.
    shape: Vec<Option<usize>>,
    /// The depth of the arrays that hold the numbers, known with the first number.
    numbers_at: Option<usize>,
}

impl Cutter<'_> {
    fn message(&mut self) -> Result<(), Refusal> {
        self.members("inputs", |this| this.items(|this| this.members("data", Self::data)))?;
        self.json.finish().map_err(|error| self.malformed(error))?;
        self.head.extend_from_slice(&self.text[self.done..]);
        Ok(())
    }

    /// Passes over the next value; if it is an object, `each` is to pass over its members of this name.
    fn members(&mut self, name: &str, each: impl Fn(&mut Self) -> Result<(), Refusal>) -> Result<(), Refusal> {
        if self.peek()? != Peek::Object {
            return self.skip();
        }
        let mut key = self.json.known_object();
        loop {
            let found = match key {
                Ok(Some(key)) => key == name,
                Ok(None) => return Ok(()),
                Err(error) => return Err(self.malformed(error)),
            };
            if found {
                each(self)?
            } else {
                self.skip()?
            }
            key = self.json.next_key();
        }
    }

    /// Passes over the next value; if it is an array, `each` is to pass over each item.
    fn items(&mut self, each: impl Fn(&mut Self) -> Result<(), Refusal>) -> Result<(), Refusal> {
        if self.peek()? != Peek::Array {
            return self.skip();
        }
        let mut item = self.json.known_array();
        while item.map_err(|error| self.malformed(error))?.is_some() {
            each(self)?;
            item = self.json.array_step();
        }
        Ok(())
    }

    /// Passes over the next value; if it is an array, it is cut out.
    fn data(&mut self) -> Result<(), Refusal> {
        if self.peek()? != Peek::Array {
            return self.skip();
        }
        let start = self.json.current_index();
        let mut found = Found::default();
        // A guess that is right for numbers of usual length, and wrong by a factor at most.
        found.values.reserve(self.left.min((self.text.len() - start) / USUAL_LENGTH));
        self.array(0, &mut found)?;
        let shape: Vec<usize> = found.shape.into_iter().flatten().collect();
        if found.numbers_at.is_some_and(|depth| depth + 1 != shape.len()) {
            return Err(RAGGED.into());
        }
        self.head.extend_from_slice(&self.text[self.done..start]);
        self.head.extend_from_slice(format!("[{}]", self.arrays.len()).as_bytes());
        self.done = self.json.current_index();
        self.arrays.push(JsonNumbers { values: found.values, shape });
        Ok(())
    }

    /// Passes over an array of `data`; `depth` others are open around it.
    fn array(&mut self, depth: usize, found: &mut Found) -> Result<(), Refusal> {
        if depth == MAX_RANK || found.numbers_at.is_some_and(|numbers| numbers < depth) {
            return Err(RAGGED.into());
        }
        if depth == found.shape.len() {
            found.shape.push(None);
        }
        let mut length = 0;
        let mut item = self.json.known_array();
        while let Some(first) = item.map_err(|error| self.malformed(error))? {
            if first == Peek::Array {
                self.array(depth + 1, found)?;
            } else {
                if *found.numbers_at.get_or_insert(depth) != depth {
                    return Err(RAGGED.into());
                }
                found.values.push(self.number(first)?);
            }
            length += 1;
            item = self.json.array_step();
        }
        if *found.shape[depth].get_or_insert(length) == length { Ok(()) } else { Err(RAGGED.into()) }
    }

    fn number(&mut self, first: Peek) -> Result<f64, Refusal> {
        self.left = self.left.checked_sub(1).ok_or(Refusal::TooMany)?;
        let number = match first {
            Peek::Null => self.json.known_null().map(|()| f64::NAN),
            Peek::String => return Err(Refusal::NoNumber("a string")),
            Peek::Object => return Err(Refusal::NoNumber("an object")),
            Peek::True | Peek::False => return Err(Refusal::NoNumber("true or false")),
            number => self.json.known_float(number),
        };
        let number = number.map_err(|error| self.malformed(error))?;
        // The token of infinity ends in a letter.
        if number.is_infinite() && self.text[self.json.current_index() - 1] != b'y' {
            return Err("data: a finite number is beyond the range of float64".into());
        }
        Ok(number)
    }

    fn peek(&mut self) -> Result<Peek, Refusal> {
        self.json.peek().map_err(|error| self.malformed(error))
    }

    fn skip(&mut self) -> Result<(), Refusal> {
        self.json.next_skip().map_err(|error| self.malformed(error))
    }

    fn malformed(&self, error: JiterError) -> Refusal {
        match error.error_type {
            JiterErrorType::JsonError(JsonErrorType::RecursionLimitExceeded) => {
                "the JSON of the request is nested too deep".into()
            }
            _ => Refusal::Malformed(error.description(&self.json)),
        }
    }
}

/// NumPy's limit.
const MAX_RANK: usize = 64;
const RAGGED: &str = "data: nested otherwise than the shape says";

/// Why a text is not taken.
enum Refusal {
    Malformed(String),
    Other(&'static str),
    NoNumber(&'static str),
    TooMany,
}

impl From<&'static str> for Refusal {
    fn from(text: &'static str) -> Self {
        Self::Other(text)
    }
}

impl From<Refusal> for PyErr {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Malformed(reason) => {
                PyValueError::new_err(format!("the JSON of the request is malformed: {reason}"))
            }
            Refusal::Other(text) => PyValueError::new_err(text),
            Refusal::NoNumber(found) => PyValueError::new_err(format!("data: numbers or null wanted, got {found}")),
            Refusal::TooMany => PyOverflowError::new_err("data: more numbers than the service takes"),
        }
    }
}

/// A JSON text with an array of floats in it, each printed shortest.
///
/// Args:
///     before: What precedes the array.
///     values: Flat array of float32 or float64, dense.
///     after: What follows it.
///     null: Whether NaN and infinities are null; else they are the tokens NaN, Infinity and -Infinity.
///
/// Returns:
///     The text in a new array of bytes. A reader that rounds numbers to float64, and for float32 then to float32, gets
///     their bits back.
///
/// Raises:
///     TypeError: values is no such array.
#[pyfunction]
pub(crate) fn json_put_data<'py>(
    py: Python<'py>,
    before: &[u8],
    values: &Bound<'py, PyAny>,
    after: &[u8],
    null: bool,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let text = if let Ok(array) = values.extract::<PyReadonlyArray1<'_, f32>>() {
        print(py, before, array.as_slice()?, after, null, f64::from, |value, text| {
            if value.to_bits() & 0x7FFF_FFFF == MISREAD {
                shortest(f64::from(value), text);
            } else {
                shortest(value, text);
            }
        })
    } else {
        let array = values.extract::<PyReadonlyArray1<'_, f64>>()?;
        print(py, before, array.as_slice()?, after, null, |value| value, shortest)
    };
    Ok(PyArray1::from_vec(py, text))
}

fn print<T: Copy + Sync>(
    py: Python<'_>,
    before: &[u8],
    values: &[T],
    after: &[u8],
    null: bool,
    wide: impl Fn(T) -> f64 + Sync,
    finite: impl Fn(T, &mut Vec<u8>) + Sync,
) -> Vec<u8> {
    let print = || {
        let mut text = Vec::with_capacity(before.len() + values.len() * 3 * size_of::<T>() + after.len() + 2);
        text.extend_from_slice(before);
        text.push(b'[');
        for &value in values {
            match wide(value) {
                number if number.is_finite() => finite(value, &mut text),
                _ if null => text.extend_from_slice(b"null"),
                f64::INFINITY => text.extend_from_slice(b"Infinity"),
                f64::NEG_INFINITY => text.extend_from_slice(b"-Infinity"),
                _ => text.extend_from_slice(b"NaN"),
            }
            text.push(b',');
        }
        if !values.is_empty() {
            text.pop();
        }
        text.push(b']');
        text.extend_from_slice(after);
        text
    };
    if size_of_val(values) < WORTH_DETACHING { print() } else { py.detach(print) }
}

fn shortest(value: impl zmij::Float, text: &mut Vec<u8>) {
    text.extend_from_slice(zmij::Buffer::new().format_finite(value).as_bytes());
}
