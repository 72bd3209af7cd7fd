//! The errors of reading and printing.

use std::collections::TryReserveError;
use std::fmt;

/// Why a text cannot be read or printed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The text begins with the byte-order mark of UTF-8.
    ByteOrderMark,
    /// The text is not JSON, or has an integer with too many digits.
    Malformed {
        /// What was expected, or what is wrong.
        reason: &'static str,
        /// The line, counted from 1.
        line: usize,
        /// The byte within the line, counted from 1.
        column: usize,
    },
    /// Arrays and objects are nested deeper than this limit.
    TooDeep(u8),
    /// A `data` array holds something other than a number: this.
    NotANumber(&'static str),
    /// A finite number of a `data` array is beyond the range of this type.
    OutOfRange(&'static str),
    /// A `data` array has parts of different lengths or depths.
    Ragged,
    /// The `data` arrays hold more numbers than the limit.
    TooManyNumbers,
    /// There are more `data` arrays than this limit.
    TooManyArrays(usize),
    /// There is not enough memory for the contents of the text.
    NoMemory,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByteOrderMark => {
                f.write_str("the JSON begins with a byte-order mark (EF BB BF); send UTF-8 without it")
            }
            Self::Malformed { reason, line, column } => {
                write!(f, "the JSON of the request is malformed: {reason}, at line {line} column {column}")
            }
            Self::TooDeep(limit) => write!(f, "the JSON of the request is nested deeper than {limit} levels"),
            Self::NotANumber(found) => write!(f, "data: numbers or null wanted, got {found}"),
            Self::OutOfRange(datatype) => write!(f, "data: a finite number is beyond the range of {datatype}"),
            Self::Ragged => f.write_str("data: the nesting does not match the shape"),
            Self::TooManyNumbers => f.write_str("data: more numbers than the limit of the service"),
            Self::TooManyArrays(limit) => write!(f, "data: more than {limit} arrays, where one is wanted"),
            Self::NoMemory => f.write_str("no memory for the numbers or the text of a message"),
        }
    }
}

impl std::error::Error for Error {}

impl From<TryReserveError> for Error {
    fn from(_: TryReserveError) -> Self {
        Self::NoMemory
    }
}
