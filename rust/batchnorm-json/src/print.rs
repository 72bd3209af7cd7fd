//! Printing of floats as JSON.

use crate::{Error, Float};

/// How NaN and infinities are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonFinite {
    /// As `NaN`, `Infinity` and `-Infinity`, which many readers of JSON accept as numbers.
    Tokens,
    /// As `null`.
    Null,
}

/// Number of elements that are printed to the stack before they are copied to the text.
const BLOCK: usize = 64;

/// Bytes of the longest number and its comma: -2.2250738585072014e-308 has 24 bytes.
const LONGEST: usize = 25;

/// Prints an array of numbers between two texts, each with the fewest digits that give its bits back.
///
/// A reader that rounds to float64, and for float32 from there to float32, gets the bits of all finite numbers.
///
/// # Errors
/// There is no memory for the text.
pub fn put_data<T: Float>(before: &[u8], values: &[T], after: &[u8], non_finite: NonFinite) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    text.try_reserve(before.len() + values.len() * T::USUAL + after.len() + 2)?;
    text.extend_from_slice(before);
    text.push(b'[');
    let mut buffer = zmij::Buffer::new();
    let mut printed = [0; BLOCK * LONGEST];
    for block in values.chunks(BLOCK) {
        let mut end = 0;
        for &value in block {
            let number = match value.wide() {
                number if number.is_finite() => value.shortest(&mut buffer),
                _ if non_finite == NonFinite::Null => "null",
                f64::INFINITY => "Infinity",
                f64::NEG_INFINITY => "-Infinity",
                _ => "NaN",
            };
            copy(number.as_bytes(), &mut printed[end..]);
            end += number.len();
            printed[end] = b',';
            end += 1;
        }
        text.try_reserve(end + after.len() + 1)?;
        text.extend_from_slice(&printed[..end]);
    }
    if !values.is_empty() {
        text.pop();
    }
    text.push(b']');
    text.extend_from_slice(after);
    Ok(text)
}

/// Copies a short text to the start of another, as two pieces of a fixed length that may overlap, which avoids `memcpy`.
#[inline]
fn copy(from: &[u8], to: &mut [u8]) {
    fn pieces<const N: usize>(from: &[u8], to: &mut [u8]) -> bool {
        let (Some(first), Some(last)) = (from.first_chunk::<N>(), from.last_chunk::<N>()) else { return false };
        let to = &mut to[..from.len()];
        if let Some(start) = to.first_chunk_mut() {
            *start = *first;
        }
        if let Some(end) = to.last_chunk_mut() {
            *end = *last;
        }
        from.len() <= 2 * N
    }
    if !pieces::<8>(from, to) && !pieces::<16>(from, to) {
        to[..from.len()].copy_from_slice(from);
    }
}
