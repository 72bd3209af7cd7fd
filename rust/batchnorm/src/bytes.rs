//! The portable form of per-channel float64 values: a header, the number of channels, then the values, little-endian.

use crate::error::Error;

/// What stands before the values.
pub(crate) struct Format {
    /// What errors call the values.
    pub(crate) what: &'static str,
    pub(crate) header: &'static [u8],
}

impl Format {
    pub(crate) fn write<const N: usize>(&self, parts: [&[f64]; N]) -> Vec<u8> {
        let mut data = self.header.to_vec();
        data.extend((parts[0].len() as u64).to_le_bytes());
        data.extend(parts.iter().flat_map(|part| part.iter()).flat_map(|value| value.to_le_bytes()));
        data
    }

    pub(crate) fn read<const N: usize>(&self, data: &[u8]) -> Result<[Vec<f64>; N], Error> {
        let wrong = |reason| Error::Bytes { what: self.what, reason };
        let rest = data.strip_prefix(self.header).ok_or_else(|| wrong("another header, or another version"))?;
        let (channels, values) = rest.split_first_chunk().ok_or_else(|| wrong("they end in the header"))?;
        let (values, left) = values.as_chunks::<8>();
        let wanted = usize::try_from(u64::from_le_bytes(*channels)).ok().and_then(|n| n.checked_mul(N));
        if wanted != Some(values.len()) || !left.is_empty() {
            return Err(wrong("their length is not that of the number of channels in the header"));
        }
        let part = values.len() / N;
        Ok(std::array::from_fn(|i| {
            values[i * part..(i + 1) * part].iter().map(|&value| f64::from_le_bytes(value)).collect()
        }))
    }
}
