//! JSON of the inference protocol, independent of Python.
//!
//! [`cut_data`] takes the `data` arrays out of a request and reads their numbers into float buffers. [`parse`] reads
//! the rest of the request, its head, into the values of a [`Build`]. [`put_data`] prints the numbers of an answer. All
//! three accept untrusted text: whatever the bytes are, the result is a value or an [`Error`], depth and sizes are
//! bounded, and lack of memory is an error too.
//!
//! The grammar is that of RFC 8259, with the tokens `NaN`, `Infinity` and `-Infinity` as numbers.

#![forbid(unsafe_code)]

mod data;
mod decimal;
mod error;
mod float;
mod print;
mod reader;

pub use data::{Array, Limits, Request, cut_data};
pub use error::Error;
pub use float::{Float, Numbers};
pub use print::{NonFinite, put_data};
pub use reader::{Build, Scalar, parse};
