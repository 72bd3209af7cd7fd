//! Count, mean and scatter matrix: what moments are to batch normalization, these are to whitening.
//!
//! The scatter matrix is Σ(x − mean)(x − mean)ᵀ over all positions, for each group of adjacent channels. Two values combine as
//! moments do (Chan, Golub and LeVeque 1979), with δ = mean_b − mean_a and n = n_a + n_b:
//!
//! ```text
//! mean = mean_a + δ·n_b/n          S = S_a + S_b + δδᵀ·n_a·n_b/n
//! ```

use crate::bytes;
use crate::element::Element;
use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::memory::{collected, copied, zeros};
use crate::moments::{Moments, moments};
use crate::patch::Patches;
use crate::products::{Centred, products};
use crate::verb::begin;
use crate::view::View;
use std::iter::repeat_n;

/// Count, mean of each channel and scatter matrix of each group of channels, in float64; a value that merges.
#[derive(Debug, Clone, PartialEq)]
pub struct CoMoments {
    count: f64,
    mean: Vec<f64>,
    /// (groups, D, D), each symmetric.
    scatter: Vec<f64>,
}

const FORMAT: bytes::Format = bytes::Format { what: "CoMoments", header: b"batchnorm-comoments/1\n" };

impl CoMoments {
    /// Comoments from their parts. Mean and scatter may be non-finite: statistics of non-finite values are.
    ///
    /// `scatter` holds a matrix of D × D numbers for each group of D channels, in row-major order; of each, the lower triangle
    /// counts.
    ///
    /// # Errors
    /// [`Error::NoChannels`]; [`Error::Groups`] and [`Error::Elements`] if `scatter` is not of that form; [`Error::NotFinite`]
    /// and [`Error::Negative`] for the count, and [`Error::Negative`] for a diagonal element of `scatter`.
    pub fn new(count: f64, mean: Vec<f64>, mut scatter: Vec<f64>, groups: usize) -> Result<Self, Error> {
        let channels = mean.len();
        if channels == 0 {
            return Err(Error::NoChannels);
        }
        let d = Error::check_groups(groups, channels)?;
        let wanted = channels.saturating_mul(d);
        if scatter.len() != wanted {
            return Err(Error::Elements { argument: "scatter", got: scatter.len(), wanted });
        }
        Error::check_counts(&[count])?;
        for (channel, row) in scatter.chunks_exact(d).enumerate() {
            let value = row[channel % d];
            if value < 0.0 {
                return Err(Error::Negative { argument: "scatter", channel, value });
            }
        }
        for matrix in scatter.chunks_exact_mut(d * d) {
            for i in 0..d {
                for j in 0..i {
                    matrix[j * d + i] = matrix[i * d + j];
                }
            }
        }
        Ok(Self { count, mean, scatter })
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Number of groups of channels.
    pub fn groups(&self) -> usize {
        self.channels() / self.channels_in_group()
    }

    /// Channels in a group: D.
    pub fn channels_in_group(&self) -> usize {
        self.scatter.len() / self.channels()
    }

    /// Positions: values of each channel.
    pub fn count(&self) -> f64 {
        self.count
    }

    /// Mean of each channel.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Σ(x − mean)(x − mean)ᵀ of each group: (groups, D, D), row-major.
    pub fn scatter(&self) -> &[f64] {
        &self.scatter
    }

    /// Covariance of each group, (groups, D, D): scatter/(count − `ddof`); 0 for the biased one, by which a batch is whitened,
    /// 1 for the unbiased one, an estimate of the population.
    ///
    /// # Errors
    /// [`Error::TooFewValues`] if the count is `ddof` or less; [`Error::NoMemory`].
    pub fn cov(&self, ddof: u32) -> Result<Vec<f64>, Error> {
        if self.count <= f64::from(ddof) {
            return Err(Error::TooFewValues { channel: 0, count: self.count, wanted: ddof + 1 });
        }
        let _mode = FloatMode::standard();
        let n = self.count - f64::from(ddof);
        collected(self.scatter.iter().map(|s| s / n))
    }

    /// Count, mean and M2 of each channel: the diagonal.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn moments(&self) -> Result<Moments, Error> {
        let d = self.channels_in_group();
        let m2 = collected((0..self.channels()).map(|c| self.scatter[c * d + c % d]))?;
        Moments::new(collected(repeat_n(self.count, self.channels()))?, copied(&self.mean)?, m2)
    }

    /// The comoments of the values of both. Those of no values are the neutral element, exactly.
    ///
    /// # Errors
    /// [`Error::Channels`], [`Error::Groups`] for another number of groups, [`Error::NoMemory`].
    pub fn merge(&self, other: &Self) -> Result<Self, Error> {
        Error::check_channels("other", other.channels(), self.channels())?;
        if other.groups() != self.groups() {
            return Err(Error::OtherGroups { got: other.groups(), wanted: self.groups() });
        }
        let _mode = FloatMode::standard();
        let mut merged = Self { count: self.count, mean: copied(&self.mean)?, scatter: copied(&self.scatter)? };
        if self.count == 0.0 {
            merged.mean.copy_from_slice(&other.mean);
            merged.scatter.copy_from_slice(&other.scatter);
        } else if other.count != 0.0 {
            merged.add(other);
        }
        merged.count = self.count + other.count;
        Ok(merged)
    }

    fn add(&mut self, other: &Self) {
        let share = other.count / (self.count + other.count);
        let (weight, d) = (self.count * share, self.channels_in_group());
        let delta = |mean: &[f64], c: usize| other.mean[c] - mean[c];
        for (c, row) in self.scatter.chunks_exact_mut(d).enumerate() {
            let (group, own) = (c / d * d, delta(&self.mean, c));
            for (i, value) in row.iter_mut().enumerate() {
                // δᵢδⱼ first, so that the sum stays symmetric to the bit.
                let product = own * delta(&self.mean, group + i);
                *value = (*value + other.scatter[c * d + i]) + product * weight;
            }
        }
        for (mean, other) in self.mean.iter_mut().zip(&other.mean) {
            *mean += (other - *mean) * share;
        }
    }

    /// A portable form: a header with the version, the numbers of channels and of groups, then count, mean and scatter,
    /// little-endian.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        FORMAT.write([self.channels(), self.groups()], [&[self.count], &self.mean, &self.scatter])
    }

    /// Reads what [`CoMoments::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Bytes`], [`Error::NoMemory`], and those of [`CoMoments::new`].
    pub fn from_bytes(data: &[u8]) -> Result<Self, Error> {
        let lengths = |[channels, groups]: [usize; 2]| {
            let matrices = channels.checked_mul(channels.checked_div(groups)?)?;
            Some([1, channels, matrices])
        };
        let ([_, groups], [count, mean, scatter]) = FORMAT.read(data, lengths)?;
        Self::new(count[0], mean, scatter, groups)
    }
}

/// Comoments of a tensor, over m = outer·inner positions. Those of no values are the neutral element.
///
/// Their bits are the same for any number of threads, on processors of one type at one level.
///
/// # Errors
/// [`Error::Groups`] if `groups` does not divide the channels; [`Error::NoMemory`]; [`Error::Threads`], [`Error::Level`] for
/// a wrong value of an environment variable.
pub fn comoments<T: Element>(x: View<'_, T>, groups: usize) -> Result<CoMoments, Error> {
    let _mode = begin()?;
    let layout = x.layout();
    let patches = Patches::of(layout, groups)?;
    let mean = copied(moments(x)?.mean())?;
    let count = layout.count() as f64;
    let scatter = match layout.is_empty() {
        true => zeros(layout.channels() * patches.group)?,
        false => products(&patches, Centred { x, mean: &mean }, None)?.products,
    };
    Ok(CoMoments { count, mean, scatter })
}
