//! A number for each channel, as kernels over whole rows load it.

use crate::error::Error;
use crate::kernels::LANES;
use crate::memory::collected;
use std::iter::repeat_n;
use std::ops::Range;

/// A number for each channel, with those of the first [`LANES`] channels once more after the last, since a kernel may go
/// on from the end of one row to the start of the next.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PerChannel<V = f64> {
    numbers: Vec<V>,
}

impl PerChannel {
    pub(crate) fn zeros(channels: usize) -> Result<Self, Error> {
        Self::filled(channels, 0.0)
    }

    /// The number of each channel.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn of(numbers: impl ExactSizeIterator<Item = f64>) -> Result<Self, Error> {
        let mut of_channels = Self::zeros(numbers.len())?;
        of_channels.fill(numbers);
        Ok(of_channels)
    }

    /// Replaces all numbers.
    pub(crate) fn fill(&mut self, numbers: impl Iterator<Item = f64>) {
        Self::fill_together([self], numbers.map(|number| [number]));
    }
}

impl<V: Copy> PerChannel<V> {
    /// The same number for every channel.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn filled(channels: usize, number: V) -> Result<Self, Error> {
        Ok(Self { numbers: collected(repeat_n(number, channels + LANES))? })
    }

    /// Replaces all numbers of several, channel by channel.
    pub(crate) fn fill_together<const N: usize>(mut all: [&mut Self; N], numbers: impl Iterator<Item = [V; N]>) {
        for (c, of_channel) in numbers.enumerate() {
            for (one, number) in all.iter_mut().zip(of_channel) {
                one.numbers[c] = number;
            }
        }
        for one in all {
            let channels = one.channels();
            for i in 0..LANES {
                one.numbers[channels + i] = one.numbers[i]; // of fewer channels, those that stand again do so once more
            }
        }
    }

    pub(crate) fn channels(&self) -> usize {
        self.numbers.len() - LANES
    }

    /// The numbers, once.
    pub(crate) fn as_slice(&self) -> &[V] {
        &self.numbers[..self.channels()]
    }

    /// The numbers of some channels, and [`LANES`] more.
    pub(crate) fn and_more(&self, channels: Range<usize>) -> &[V] {
        &self.numbers[channels.start..channels.end + LANES]
    }
}
