//! Count, mean and M2 per channel: a value that merges.
//!
//! M2 = Σ(x − mean)². Two values combine by the update of Chan, Golub and LeVeque (1979), with δ = mean_b − mean_a and
//! n = n_a + n_b:
//!
//! ```text
//! mean = mean_a + δ·n_b/n          M2 = M2_a + M2_b + δ²·n_a·n_b/n
//! ```
//!
//! so the statistics of a batch never come from E[x²] − E[x]², which cancels where |mean| is large beside the spread.

use crate::bytes;
use crate::element::Element;
use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::kernels::{MomentRows, MomentRuns};
use crate::memory::{collected, copied, zeros};
use crate::numbers::Numbers;
use crate::pairs::{OfChannel, OfColumns, Pair};
use crate::partition::{Family, Interleaved, Planar};
use crate::simd::dispatch;
use crate::tree::Tree;
use crate::verb::begin;
use crate::view::{Rect, Tile, View};
use std::iter::repeat_n;
use std::ops::Range;

/// Count, mean and M2 of each channel, in float64; a value that merges.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    count: Vec<f64>,
    mean: Vec<f64>,
    m2: Vec<f64>,
}

const FORMAT: bytes::Format = bytes::Format { what: "Moments", header: b"batchnorm-moments/1\n" };

impl Moments {
    /// Moments from their parts. Mean and M2 may be non-finite: statistics of non-finite values are.
    ///
    /// # Errors
    /// [`Error::NoChannels`], [`Error::Channels`] for parts of different lengths, [`Error::NotFinite`] and
    /// [`Error::Negative`] for a count, [`Error::Negative`] for M2.
    pub fn new(count: Vec<f64>, mean: Vec<f64>, m2: Vec<f64>) -> Result<Self, Error> {
        let wanted = count.len();
        if wanted == 0 {
            return Err(Error::NoChannels);
        }
        for (argument, part) in [("mean", &mean), ("m2", &m2)] {
            Error::check_channels(argument, part.len(), wanted)?;
        }
        Error::check_counts(&count)?;
        Error::check_not_negative("m2", &m2)?;
        Ok(Self { count, mean, m2 })
    }

    /// Zeros in place of the moments of `count` values a channel.
    pub(crate) fn zeros(count: usize, channels: usize) -> Result<Self, Error> {
        Ok(Self { count: collected(repeat_n(count as f64, channels))?, mean: zeros(channels)?, m2: zeros(channels)? })
    }

    /// Mean and M2, to be written.
    pub(crate) fn mean_and_m2(&mut self) -> (&mut [f64], &mut [f64]) {
        (&mut self.mean, &mut self.m2)
    }

    /// Mean and biased variance of every channel.
    pub(crate) fn mean_and_var(&self) -> impl Iterator<Item = (f64, f64)> {
        self.mean.iter().copied().zip(self.divided(0.0))
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.count.len()
    }

    /// Values per channel: the paper's m.
    pub fn count(&self) -> &[f64] {
        &self.count
    }

    /// Mean per channel: the paper's μ_B.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Sum of squared deviations from the mean, per channel.
    pub fn m2(&self) -> &[f64] {
        &self.m2
    }

    /// Biased variance M2/count per channel: the paper's σ²_B (Algorithm 1).
    ///
    /// # Errors
    /// [`Error::TooFewValues`] where a channel has no value; [`Error::NoMemory`].
    pub fn var(&self) -> Result<Vec<f64>, Error> {
        self.check_count(1)?;
        let _mode = FloatMode::standard();
        collected(self.divided(0.0))
    }

    /// Unbiased variance M2/(count − 1) per channel (section 3.1: Var\[x\] = m/(m−1)·E\[σ²_B\]).
    ///
    /// # Errors
    /// [`Error::TooFewValues`] where a channel has count 1 or less; [`Error::NoMemory`].
    pub fn var_unbiased(&self) -> Result<Vec<f64>, Error> {
        self.check_count(2)?;
        let _mode = FloatMode::standard();
        collected(self.divided(1.0))
    }

    fn divided(&self, less: f64) -> impl ExactSizeIterator<Item = f64> {
        self.m2.iter().zip(&self.count).map(move |(m2, n)| m2 / (n - less))
    }

    /// Checks that each channel has more than `wanted` − 1 values. (Weights may make a count fractional.)
    pub(crate) fn check_count(&self, wanted: u32) -> Result<(), Error> {
        match self.count.iter().position(|&n| n <= f64::from(wanted - 1)) {
            Some(channel) => Err(Error::TooFewValues { channel, count: self.count[channel], wanted }),
            None => Ok(()),
        }
    }

    /// The moments of the values of both. Moments of no values are the neutral element, exactly.
    ///
    /// # Errors
    /// [`Error::Channels`], [`Error::NoMemory`].
    pub fn merge(&self, other: &Self) -> Result<Self, Error> {
        Error::check_channels("other", other.channels(), self.channels())?;
        let _mode = FloatMode::standard();
        let mut merged = Self { count: copied(&self.count)?, mean: copied(&self.mean)?, m2: copied(&self.m2)? };
        for c in 0..merged.channels() {
            let (mine, theirs) = (self.count[c], other.count[c]);
            if mine == 0.0 {
                (merged.mean[c], merged.m2[c]) = (other.mean[c], other.m2[c]);
            } else if theirs != 0.0 {
                let weights = MeanAndM2::weights(mine, theirs);
                MeanAndM2::merge(weights, &mut merged.mean[c], &mut merged.m2[c], (other.mean[c], other.m2[c]));
            }
            merged.count[c] = mine + theirs;
        }
        Ok(merged)
    }

    /// Moves running statistics towards these: r ← (1 − w)·r + w·new, where the new variance is the unbiased one. Statistics
    /// that are not finite enter.
    ///
    /// It is computed in float64 and rounded to the precision of r.
    ///
    /// # Errors
    /// [`Error::Channels`]; [`Error::TooFewValues`] where a channel has count 1 or less, if there is a running variance.
    /// Nothing is written then.
    pub fn update_running(
        &self,
        update_weight: f64,
        mut mean: Option<Numbers<'_>>,
        mut var: Option<Numbers<'_>>,
    ) -> Result<(), Error> {
        for (argument, running) in [("running_mean", &mean), ("running_var", &var)] {
            let channels = running.as_ref().map_or(self.channels(), Numbers::channels);
            Error::check_channels(argument, channels, self.channels())?;
        }
        let towards = |new: f64| move |r: f64| (1.0 - update_weight) * r + update_weight * new;
        if let Some(var) = &mut var {
            self.check_count(2)?;
            var.replace(self.divided(1.0).map(towards));
        }
        if let Some(mean) = &mut mean {
            mean.replace(self.mean.iter().copied().map(towards));
        }
        Ok(())
    }

    /// A portable form: a header with the version, the number of channels, then count, mean and M2, little-endian.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        FORMAT.write([self.channels()], [&self.count, &self.mean, &self.m2])
    }

    /// Reads what [`Moments::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Bytes`], [`Error::NoMemory`], and those of [`Moments::new`].
    pub fn from_bytes(data: &[u8]) -> Result<Self, Error> {
        let (_, [count, mean, m2]) = FORMAT.read(data, |[channels]| Some([channels; 3]))?;
        Self::new(count, mean, m2)
    }
}

/// What Chan's update takes of the two counts.
#[derive(Clone, Copy)]
struct Weights {
    /// n_b/n
    right: f64,
    /// n_a·n_b/n
    product: f64,
}

/// Mean and M2, which merge by Chan's update.
struct MeanAndM2;

impl Pair for MeanAndM2 {
    type Weights = Weights;

    #[inline(always)]
    fn weights(left: f64, right: f64) -> Weights {
        let share = right / (left + right);
        Weights { right: share, product: left * share }
    }

    #[inline(always)]
    fn merge(weights: Weights, mean: &mut f64, m2: &mut f64, (right_mean, right_m2): (f64, f64)) {
        let delta = right_mean - *mean;
        *mean += delta * weights.right;
        *m2 = (*m2 + right_m2) + delta * delta * weights.product;
    }
}

/// Moments of a tensor, per channel over m = outer·inner values. Those of no values are the neutral element.
///
/// # Errors
/// [`Error::NoMemory`]; [`Error::Threads`], [`Error::Level`] for a wrong value of an environment variable.
pub fn moments<T: Element>(x: View<'_, T>) -> Result<Moments, Error> {
    let _mode = begin()?;
    let layout = x.layout();
    let mut moments = Moments::zeros(layout.count(), layout.channels())?;
    if layout.is_empty() {
        return Ok(moments);
    }
    let pairs = match Family::of(layout) {
        Family::Planar(planar) => planar_moments(x, planar),
        Family::Interleaved(rows) => interleaved_moments(x, rows),
    }?;
    for ((mean, m2), pair) in moments.mean.iter_mut().zip(&mut moments.m2).zip(pairs) {
        (*mean, *m2) = pair;
    }
    Ok(moments)
}

fn planar_moments<T: Element>(x: View<'_, T>, planar: Planar) -> Result<Vec<(f64, f64)>, Error> {
    let channels = planar.map_channels(x.bytes(), |channels, block| {
        moments_of_block(x.tile(planar.width(), &planar.rect(&channels, block)), channels.len())
    })?;
    collected(channels.into_iter().map(OfChannel::into_pair))
}

fn moments_of_block<T: Element>(x: Tile<'_, T>, channels: usize) -> Result<Vec<OfChannel<MeanAndM2>>, Error> {
    let moments = dispatch(MomentRuns { x, channels });
    collected(moments.into_iter().map(|(count, mean, m2)| OfChannel::new(count, (mean, m2))))
}

/// Mean and M2 of each channel of a group that has at least one value, given as a tile of all its runs.
pub(crate) fn moments_of_group<T: Element>(planar: &Planar, group: Tile<'_, T>) -> Result<Vec<(f64, f64)>, Error> {
    let channels = planar.fold(0..group.cols() / planar.inner, 0..planar.blocks(), |channels, block| {
        moments_of_block(group.part(&planar.rect(&channels, block)), channels.len())
    })?;
    collected(channels.into_iter().map(OfChannel::into_pair))
}

fn interleaved_moments<T: Element>(x: View<'_, T>, rows: Interleaved) -> Result<Vec<(f64, f64)>, Error> {
    let of_blocks = |columns: Range<usize>, blocks: Range<usize>| {
        let mut sum = zeros(columns.len())?;
        Tree::of(blocks.map(|b| {
            let block = rows.block(b);
            let mut moments = OfColumns::<MeanAndM2>::zeros(block.len(), columns.len())?;
            let x = x.tile(rows.width, &Rect { rows: block, cols: columns.clone() });
            dispatch(MomentRows { x, mean: &mut moments.first, m2: &mut moments.second, sum: &mut sum });
            Ok(moments)
        }))
    };
    rows.map_strips(x.bytes(), of_blocks, |strip| strip.into_channels(rows.inner))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;

    #[test]
    fn running_statistics_move_towards_those_of_the_batch() {
        let moments = Moments::new(vec![4.0, 2.0], vec![8.0, f64::NAN], vec![6.0, f64::INFINITY]).unwrap();
        let (mut mean, mut var) = ([4.0, 1.0], [10f32, 1.0]);
        moments.update_running(0.25, Some(Numbers::F64(&mut mean)), Some(Numbers::F32(&mut var))).unwrap();
        // 6/3 = 2 is the unbiased variance of the first channel.
        assert_eq!((mean[0], var), (5.0, [8.0, f32::INFINITY]));
        assert!(mean[1].is_nan());
        // Rounded once, to nearest: 1 + 3·2⁻²⁵ lies above the middle between 1 and 1 + 2⁻²³.
        let moments = Moments::new(vec![2.0], vec![3.0 * 2f64.powi(-24)], vec![0.0]).unwrap();
        let mut mean = [2.0];
        moments.update_running(0.5, Some(Numbers::F32(&mut mean)), None).unwrap();
        assert_eq!(mean, [1.0 + 2f32.powi(-23)]);
    }

    #[test]
    fn refused_statistics_change_nothing() {
        let one = Moments::new(vec![1.0], vec![3.0], vec![0.0]).unwrap();
        let (mut mean, mut var) = ([1.0], [1.0]);
        let error = one.update_running(0.5, Some(Numbers::F64(&mut mean)), Some(Numbers::F64(&mut var)));
        assert_eq!(error, Err(Error::TooFewValues { channel: 0, count: 1.0, wanted: 2 }));
        let error = one.update_running(0.5, Some(Numbers::F64(&mut mean)), Some(Numbers::F64(&mut [1.0, 1.0])));
        assert_eq!(error, Err(Error::Channels { argument: "running_var", got: 2, wanted: 1 }));
        assert_eq!(mean, [1.0]);
        assert_eq!(one.update_running(0.5, Some(Numbers::F64(&mut mean)), None), Ok(()));
        assert_eq!(mean, [2.0]);
    }
}
