//! The portable form of float64 values: a header, the sizes that say how many follow, then the values, little-endian.

use crate::error::Error;
use crate::memory;

/// What stands before the sizes.
pub(crate) struct Format {
    /// What errors call the values.
    pub(crate) what: &'static str,
    pub(crate) header: &'static [u8],
}

impl Format {
    pub(crate) fn write<const S: usize, const N: usize>(
        &self,
        sizes: [usize; S],
        parts: [&[f64]; N],
    ) -> Result<Vec<u8>, Error> {
        let values: usize = parts.iter().map(|part| part.len()).sum();
        let mut data = memory::with_capacity(self.header.len() + 8 * S + 8 * values)?;
        data.extend(self.header);
        data.extend(sizes.iter().flat_map(|&size| (size as u64).to_le_bytes()));
        data.extend(parts.iter().flat_map(|part| part.iter()).flat_map(|value| value.to_le_bytes()));
        Ok(data)
    }

    /// The sizes, and the parts, whose lengths `lengths` tells from the sizes; `None` if there are no such values.
    pub(crate) fn read<const S: usize, const N: usize>(
        &self,
        data: &[u8],
        lengths: impl Fn([usize; S]) -> Option<[usize; N]>,
    ) -> Result<([usize; S], [Vec<f64>; N]), Error> {
        let wrong = |reason| Error::Bytes { what: self.what, reason };
        let mut rest = data.strip_prefix(self.header).ok_or_else(|| wrong("another header, or another version"))?;
        let mut sizes = [0; S];
        for size in &mut sizes {
            let (bytes, after) = rest.split_first_chunk().ok_or_else(|| wrong("they end in the header"))?;
            (*size, rest) = (usize::try_from(u64::from_le_bytes(*bytes)).unwrap_or(usize::MAX), after);
        }
        let (mut values, left) = rest.as_chunks::<8>();
        let lengths = lengths(sizes).filter(|lengths| {
            let wanted = lengths.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
            wanted == Some(values.len()) && left.is_empty()
        });
        let lengths = lengths.ok_or_else(|| wrong("their length is not that of the sizes in the header"))?;
        let mut parts = [const { Vec::new() }; N];
        for (part, n) in parts.iter_mut().zip(lengths) {
            let (own, after) = values.split_at(n);
            *part = memory::collected(own.iter().map(|&value| f64::from_le_bytes(value)))?;
            values = after;
        }
        Ok((sizes, parts))
    }
}
