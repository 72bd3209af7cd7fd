//! The portable form of per-channel float64 values: a header, the number of channels, then the values, little-endian.

use crate::error::Error;
use crate::memory;

/// What stands before the values.
pub(crate) struct Format {
    /// What errors call the values.
    pub(crate) what: &'static str,
    pub(crate) header: &'static [u8],
}

impl Format {
    pub(crate) fn write<const N: usize>(&self, parts: [&[f64]; N]) -> Result<Vec<u8>, Error> {
        let mut data = memory::with_capacity(self.header.len() + 8 + 8 * N * parts[0].len())?;
        data.extend(self.header);
        data.extend((parts[0].len() as u64).to_le_bytes());
        data.extend(parts.iter().flat_map(|part| part.iter()).flat_map(|value| value.to_le_bytes()));
        Ok(data)
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
        let (channels, mut parts) = (values.len() / N, [const { Vec::new() }; N]);
        for (i, part) in parts.iter_mut().enumerate() {
            let values = &values[i * channels..(i + 1) * channels];
            *part = memory::collected(values.iter().map(|&value| f64::from_le_bytes(value)))?;
        }
        Ok(parts)
    }
}
