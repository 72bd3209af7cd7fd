//! Why a text is not taken.

use std::collections::TryReserveError;
use std::fmt;

/// Why a text is not taken, or not printed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The text begins with the byte-order mark of UTF-8.
    ByteOrderMark,
    /// The text breaks the grammar of JSON, or has a number that no reader takes.
    Malformed {
        /// What the grammar wants, or what is wrong.
        reason: &'static str,
        /// The line, counted from 1.
        line: usize,
        /// The byte within the line, counted from 1.
        column: usize,
    },
    /// Arrays and objects are nested deeper than this.
    TooDeep(u8),
    /// A `data` array holds this in place of a number.
    NotANumber(&'static str),
    /// A finite number of a `data` array is beyond the range of this type.
    OutOfRange(&'static str),
    /// A `data` array has parts of different lengths or depths.
    Ragged,
    /// The `data` arrays hold more numbers than may be.
    TooManyNumbers,
    /// There are more `data` arrays than this.
    TooManyArrays(usize),
    /// There is no memory for what the text holds.
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
            Self::Ragged => f.write_str("data: nested otherwise than the shape says"),
            Self::TooManyNumbers => f.write_str("data: more numbers than the service takes"),
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
