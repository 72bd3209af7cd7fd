//! Arrays whose length grows with the input. Where there is no memory for one, the verb fails, and the process lives.
//!
//! Only what kernels return of a block of a few channels (less than a KiB, whatever the input) comes from the ordinary
//! constructors.

use crate::error::Error;
use std::iter::repeat_n;

/// An empty vector with memory for `n` values.
///
/// # Errors
/// [`Error::NoMemory`], here and in all functions of this module.
pub(crate) fn with_capacity<T>(n: usize) -> Result<Vec<T>, Error> {
    let mut vector = Vec::new();
    vector.try_reserve_exact(n).map_err(|_| no_memory::<T>(n))?;
    Ok(vector)
}

/// The values as a vector.
pub(crate) fn collected<T>(values: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>, Error> {
    let mut vector = with_capacity(values.len())?;
    vector.extend(values);
    Ok(vector)
}

/// The values as a vector, or the first error among them.
pub(crate) fn try_collected<T>(values: impl ExactSizeIterator<Item = Result<T, Error>>) -> Result<Vec<T>, Error> {
    let mut vector = with_capacity(values.len())?;
    for value in values {
        vector.push(value?);
    }
    Ok(vector)
}

/// `n` zeros.
pub(crate) fn zeros(n: usize) -> Result<Vec<f64>, Error> {
    collected(repeat_n(0.0, n))
}

/// A copy of the values.
pub(crate) fn copied(values: &[f64]) -> Result<Vec<f64>, Error> {
    collected(values.iter().copied())
}

/// Puts a value at the end of a vector that grows.
#[inline]
pub(crate) fn push<T>(vector: &mut Vec<T>, value: T) -> Result<(), Error> {
    vector.try_reserve(1).map_err(|_| no_memory::<T>(vector.len() + 1))?;
    vector.push(value);
    Ok(())
}

/// Memory that is held for arrays of a later step, so that an earlier one does not write its result in vain.
pub(crate) struct Room {
    _bytes: Vec<u8>,
}

impl Room {
    pub(crate) fn new(bytes: usize) -> Result<Self, Error> {
        // Memory that nobody looks at may be optimized away.
        Ok(Self { _bytes: std::hint::black_box(with_capacity(bytes)?) })
    }

    /// Gives the memory to the step that it is held for.
    pub(crate) fn free(self) {}
}

fn no_memory<T>(n: usize) -> Error {
    Error::NoMemory { bytes: n.saturating_mul(size_of::<T>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_long_an_array_is_an_error() {
        let bytes = isize::MAX as usize / 8 * 8;
        assert_eq!(zeros(bytes / 8), Err(Error::NoMemory { bytes }));
        assert!(matches!(Room::new(bytes), Err(Error::NoMemory { .. })));
        assert_eq!(with_capacity::<f64>(usize::MAX), Err(Error::NoMemory { bytes: usize::MAX }));
        assert_eq!(try_collected([Ok(1), Err(Error::NoChannels)].into_iter()), Err(Error::NoChannels));
    }
}
