//! Per-channel numbers in a caller's memory: computed in float64, rounded to the precision that they are kept in.

use crate::error::Error;
use crate::float_mode::FloatMode;

/// Numbers that are written where a caller keeps them, one for each channel.
#[derive(Debug)]
pub enum Numbers<'a> {
    /// In float32.
    F32(&'a mut [f32]),
    /// In float64.
    F64(&'a mut [f64]),
}

impl Numbers<'_> {
    /// Number of channels.
    pub fn channels(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.len(),
            Self::F64(numbers) => numbers.len(),
        }
    }

    /// Writes the values, rounded to nearest.
    ///
    /// # Errors
    /// [`Error::Channels`], with the name given.
    pub fn fill(&mut self, argument: &'static str, values: &[f64]) -> Result<(), Error> {
        Error::check_channels(argument, self.channels(), values.len())?;
        self.replace(values.iter().map(|&value| move |_| value));
        Ok(())
    }

    /// Replaces each number r by f(r), rounded to nearest.
    pub(crate) fn replace<F: FnOnce(f64) -> f64>(&mut self, f: impl Iterator<Item = F>) {
        let _mode = FloatMode::standard();
        match self {
            Self::F32(numbers) => numbers.iter_mut().zip(f).for_each(|(r, f)| *r = f((*r).into()) as f32),
            Self::F64(numbers) => numbers.iter_mut().zip(f).for_each(|(r, f)| *r = f(*r)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;

    #[test]
    fn values_are_rounded_to_the_precision_of_their_place() {
        let values = [1.0 + 2f64.powi(-24), 1.0 + 3.0 * 2f64.powi(-24), 2f64.powi(-149), f64::NEG_INFINITY];
        let (mut narrow, mut wide) = ([7f32; 4], [7.0; 4]);
        Numbers::F32(&mut narrow).fill("dweight", &values).unwrap();
        Numbers::F64(&mut wide).fill("dweight", &values).unwrap();
        assert_eq!(narrow, [1.0, 1.0 + 2f32.powi(-22), f32::from_bits(1), f32::NEG_INFINITY]);
        assert_eq!(wide, values);
        let error = Numbers::F32(&mut narrow).fill("dweight", &values[1..]);
        assert_eq!(error, Err(Error::Channels { argument: "dweight", got: 4, wanted: 3 }));
    }
}
