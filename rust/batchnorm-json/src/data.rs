//! Reading of the `data` arrays of a request.

use crate::reader::Reader;
use crate::{Error, Float, Numbers};

/// Largest depth of nested arrays in `data`, which is NumPy's largest rank.
const MAX_RANK: usize = 64;

/// Largest number of `data` arrays; a valid request has one.
const MAX_ARRAYS: usize = 64;

/// The limits of a request.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest depth of nested arrays and objects.
    pub depth: u8,
    /// Largest number of elements of all `data` arrays together.
    pub numbers: usize,
}

/// A request with its `data` arrays taken out.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The text, with `[i]` in place of the i-th `data` array of the objects in `inputs`.
    pub head: Vec<u8>,
    /// The `data` arrays.
    pub arrays: Vec<Array>,
}

/// A `data` array, flat or nested.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// The numbers, row-major.
    pub numbers: Numbers,
    /// The lengths of the nested arrays, outermost first: 1, 3 for `[[1, 2, 3]]`, and 2, 0 for `[[], []]`.
    pub shape: Vec<usize>,
}

/// Takes the `data` arrays out of a request, and checks the grammar of the whole text.
///
/// `null` in an array is read as NaN. If an object has two members `data`, both are read; the head shows which one counts.
///
/// # Errors
/// The text is malformed or exceeds a limit; an array holds anything but numbers, is ragged, or holds a finite number
/// beyond the range of its type; or there is no memory.
pub fn cut_data(text: &[u8], limits: Limits) -> Result<Request, Error> {
    let mut reader = Reader::new(text, limits.depth)?;
    let mut cut = Cut { text, done: 0, head: Vec::new(), arrays: Vec::new(), left: limits.numbers };
    if reader.peek() == Some(b'{') {
        reader.object(|reader, name| match &*name {
            "inputs" if reader.peek() == Some(b'[') => reader.array(|reader| cut.input(reader)),
            _ => reader.skip(),
        })?;
    } else {
        reader.skip()?;
    }
    reader.finish()?;
    cut.copy_head(text.len())?;
    let arrays = cut.arrays.into_iter().map(|(_, array)| array).collect();
    Ok(Request { head: cut.head, arrays })
}

struct Cut<'a> {
    text: &'a [u8],
    /// Number of bytes of the text that have been copied to `head`.
    done: usize,
    head: Vec<u8>,
    /// Each array, and the reader at its start.
    arrays: Vec<(Reader<'a>, Array)>,
    /// Number of elements that are still allowed.
    left: usize,
}

impl<'a> Cut<'a> {
    /// Reads an item of `inputs`.
    fn input(&mut self, reader: &mut Reader<'a>) -> Result<(), Error> {
        if reader.peek() != Some(b'{') {
            return reader.skip();
        }
        let first = self.arrays.len();
        let mut single = false;
        reader.object(|reader, name| match (&*name, reader.peek()) {
            ("data", Some(b'[')) => self.data(reader, single),
            ("datatype", Some(b'"')) => {
                single = reader.string()? == "FP32";
                Ok(())
            }
            ("datatype", _) => {
                single = false;
                reader.skip()
            }
            _ => reader.skip(),
        })?;
        // The datatype may follow the data.
        for (before, Array { numbers, .. }) in &mut self.arrays[first..] {
            match numbers {
                Numbers::F64(values) if single => *numbers = Numbers::F32(narrow(values)?),
                Numbers::F32(_) if !single => *numbers = array::<f64>(before, usize::MAX)?.numbers,
                _ => {}
            }
        }
        Ok(())
    }

    fn data(&mut self, reader: &mut Reader<'a>, single: bool) -> Result<(), Error> {
        if self.arrays.len() == MAX_ARRAYS {
            return Err(Error::TooManyArrays(MAX_ARRAYS));
        }
        let before = reader.clone();
        let array = if single { array::<f32>(reader, self.left) } else { array::<f64>(reader, self.left) }?;
        self.left -= array.numbers.len();
        self.copy_head(before.position())?;
        self.head.extend_from_slice(format!("[{}]", self.arrays.len()).as_bytes());
        self.done = reader.position();
        self.arrays.push((before, array));
        Ok(())
    }

    /// Copies the text from where the last copy ended, up to `end`, to the head.
    fn copy_head(&mut self, end: usize) -> Result<(), Error> {
        let part = &self.text[self.done..end];
        self.head.try_reserve(part.len())?;
        self.head.extend_from_slice(part);
        Ok(())
    }
}

/// Reads the array that comes next, with a limit on the number of elements.
fn array<T: Float>(reader: &mut Reader<'_>, limit: usize) -> Result<Array, Error> {
    let mut found = Found::<T> { values: Vec::new(), limit, shape: Vec::new(), numbers_at: None };
    found.array(reader, 0)?;
    if found.numbers_at.is_some_and(|depth| depth + 1 != found.shape.len()) {
        return Err(Error::Ragged);
    }
    Ok(Array { numbers: T::numbers(found.values), shape: found.shape.into_iter().flatten().collect() })
}

/// The contents of an array, as far as it has been read.
struct Found<T> {
    values: Vec<T>,
    limit: usize,
    /// The length of the arrays of each depth, known when the first of them ends.
    shape: Vec<Option<usize>>,
    /// The depth of the arrays that hold the numbers, known with the first number.
    numbers_at: Option<usize>,
}

impl<T: Float> Found<T> {
    /// Reads an array inside `depth` open ones.
    fn array(&mut self, reader: &mut Reader<'_>, depth: usize) -> Result<(), Error> {
        if depth == MAX_RANK {
            return Err(Error::Ragged);
        }
        if depth == self.shape.len() {
            self.shape.push(None);
        }
        let mut length = 0;
        reader.array(|reader| {
            length += 1;
            let first = reader.peek();
            if first == Some(b'[') {
                return self.array(reader, depth + 1);
            }
            if *self.numbers_at.get_or_insert(depth) != depth {
                return Err(Error::Ragged);
            }
            self.number(reader, first)
        })?;
        if *self.shape[depth].get_or_insert(length) == length { Ok(()) } else { Err(Error::Ragged) }
    }

    /// Reads a number that begins with `first`.
    #[inline]
    fn number(&mut self, reader: &mut Reader<'_>, first: Option<u8>) -> Result<(), Error> {
        if self.values.len() == self.values.capacity() {
            self.values.try_reserve(1)?; // twice as much as there is
        }
        if self.values.len() == self.limit {
            return Err(Error::TooManyNumbers);
        }
        let wide = match first {
            Some(b'n') => reader.literal("null").map(|()| f64::NAN)?,
            Some(b'"') => return Err(Error::NotANumber("a string")),
            Some(b'{') => return Err(Error::NotANumber("an object")),
            Some(b't' | b'f') => return Err(Error::NotANumber("true or false")),
            _ => reader.number()?,
        };
        let value = T::rounded(wide);
        if value.wide().is_infinite() && !reader.ended_in_token() {
            return Err(Error::OutOfRange(T::NAME));
        }
        self.values.push(value);
        Ok(())
    }
}

/// Rounds numbers to float32.
fn narrow(wide: &[f64]) -> Result<Vec<f32>, Error> {
    let mut values = Vec::new();
    values.try_reserve_exact(wide.len())?;
    values.extend(wide.iter().map(|&wide| wide as f32));
    let beyond = values.iter().zip(wide).any(|(value, wide)| value.is_infinite() && wide.is_finite());
    if beyond { Err(Error::OutOfRange("FP32")) } else { Ok(values) }
}
