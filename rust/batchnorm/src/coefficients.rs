//! The coefficients that normalization takes: y = (x − mean)·s + β with s = γ/√(var + ε), per channel, in float64.

use crate::blocks::Interleaved;
use crate::element::{Element, Wide};
use crate::error::Error;
use crate::moments::Moments;
use crate::simd::{FloatMode, LANES};
use std::ops::Range;

/// Coefficients of a channel-wise map, from frozen statistics or from those of a batch.
///
/// γ = √(Var\[x\] + ε), β = E\[x\] restores the identity (section 3). Note the square root: γ = Var\[x\] does not.
#[derive(Debug, Clone, PartialEq)]
pub struct Coefficients {
    mean: Vec<f64>,
    invstd: Vec<f64>,
    scale: Vec<f64>,
    beta: Vec<f64>,
    /// Of the moments, in training.
    count: Option<Vec<f64>>,
}

impl Coefficients {
    /// From frozen statistics; absent γ are ones, absent β zeros.
    ///
    /// # Errors
    /// [`Error::NoChannels`], [`Error::Channels`], [`Error::NotFinite`], [`Error::Negative`], [`Error::Eps`], and
    /// [`Error::EpsZeroForZeroVariance`].
    pub fn new(
        mean: &[f64],
        var: &[f64],
        gamma: Option<&[f64]>,
        beta: Option<&[f64]>,
        eps: f64,
    ) -> Result<Self, Error> {
        if mean.is_empty() {
            return Err(Error::NoChannels);
        }
        Error::check_channels("var", var.len(), mean.len())?;
        Error::check_finite("mean", mean)?;
        Error::check_finite("var", var)?;
        Error::check_not_negative("var", var)?;
        check_eps(eps)?;
        if let (true, Some(channel)) = (eps == 0.0, var.iter().position(|&v| v == 0.0)) {
            return Err(Error::EpsZeroForZeroVariance { channel });
        }
        Self::of(mean.to_vec(), var, gamma, beta, eps)
    }

    /// From the statistics of a batch (Algorithm 1): the biased variance, since it is this batch that is to get
    /// variance one. Statistics that are not finite propagate.
    ///
    /// # Errors
    /// [`Error::TooFewValues`] where a channel has fewer than 2 values, [`Error::EpsZeroInTraining`],
    /// [`Error::Channels`], [`Error::NotFinite`], [`Error::Eps`].
    pub fn of_moments(moments: &Moments, gamma: Option<&[f64]>, beta: Option<&[f64]>, eps: f64) -> Result<Self, Error> {
        check_training_eps(eps)?;
        moments.require(2)?;
        let coefficients = Self::of(moments.mean().to_vec(), &moments.var()?, gamma, beta, eps)?;
        Ok(Self { count: Some(moments.count().to_vec()), ..coefficients })
    }

    fn of(mean: Vec<f64>, var: &[f64], gamma: Option<&[f64]>, beta: Option<&[f64]>, eps: f64) -> Result<Self, Error> {
        check_parameters(mean.len(), gamma, beta)?;
        let _mode = FloatMode::standard();
        let root: Vec<f64> = var.iter().map(|&v| root(v, eps)).collect();
        let scale = match gamma {
            Some(gamma) => gamma.iter().zip(&root).map(|(gamma, root)| gamma / root).collect(),
            None => root.iter().map(|root| 1.0 / root).collect(),
        };
        let invstd = root.iter().map(|root| 1.0 / root).collect();
        let beta = beta.map_or_else(|| vec![0.0; mean.len()], <[f64]>::to_vec);
        Ok(Self { mean, invstd, scale, beta, count: None })
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Mean per channel.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// 1/√(var + ε) per channel.
    pub fn invstd(&self) -> &[f64] {
        &self.invstd
    }

    /// s = γ/√(var + ε) per channel.
    pub fn scale(&self) -> &[f64] {
        &self.scale
    }

    /// The same map without its constant: x·s, which is what it does to a gradient.
    pub(crate) fn scale_only(&self) -> Self {
        let zeros = vec![0.0; self.channels()];
        Self { mean: zeros.clone(), beta: zeros, ..self.clone() }
    }

    /// Refuses sums over another number of values per channel than the moments were of, as every backward pass does before
    /// it writes.
    ///
    /// # Errors
    /// [`Error::Channels`], [`Error::Counts`].
    pub fn check_counts(&self, count: impl ExactSizeIterator<Item = f64>) -> Result<(), Error> {
        Error::check_channels("sums", count.len(), self.channels())?;
        let wanted = self.count.iter().flatten();
        match count.zip(wanted).enumerate().find(|(_, (got, wanted))| got != *wanted) {
            Some((channel, (got, &wanted))) => Err(Error::Counts { channel, got, wanted }),
            None => Ok(()),
        }
    }

    /// Refuses coefficients that the precision in which x is normalized cannot hold, where they would make NaN of finite
    /// numbers. Those that are not finite propagate.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub(crate) fn check_range<T: Element>(&self) -> Result<(), Error> {
        for (what, values) in [("mean", &self.mean), ("gamma/sqrt(var + eps)", &self.scale), ("beta", &self.beta)] {
            if let Some(channel) = values.iter().position(|&value| !fits::<T>(value)) {
                return Err(Error::Range { what, channel, value: values[channel] });
            }
        }
        Ok(())
    }

    pub(crate) fn of_channel<T: Element>(&self, c: usize) -> [T::Wide; 4] {
        for_kernel::<T>(self.mean[c], self.scale[c], self.beta[c])
    }

    /// The four coefficients of some columns, and of the first of them again.
    pub(crate) fn of_columns<T: Element>(&self, rows: &Interleaved, columns: Range<usize>) -> [Vec<T::Wide>; 4] {
        let part = |values: &[f64]| rows.spread(columns.clone(), LANES, |c| T::Wide::from_f64(values[c]));
        let high = part(&self.mean);
        // Where the mean is in one part, nothing reads the other; any numbers will do.
        let low = match T::SPLIT_MEAN {
            true => rows.spread(columns.clone(), LANES, |c| self.of_channel::<T>(c)[1]),
            false => high.clone(),
        };
        [high, low, part(&self.scale), part(&self.beta)]
    }
}

/// √(var + ε): s = γ/√(var + ε), as contract 1 writes it.
fn root(var: f64, eps: f64) -> f64 {
    (var + eps).sqrt()
}

/// s = γ/√(var + ε).
pub(crate) fn scale(gamma: f64, var: f64, eps: f64) -> f64 {
    gamma / root(var, eps)
}

/// Whether a number stays finite in the precision in which x is normalized.
fn fits<T: Element>(value: f64) -> bool {
    T::Wide::from_f64(value).to_f64().is_finite() || !value.is_finite()
}

/// Whether the coefficients of every batch are in the range of the precision in which x is normalized: s ≤ γ/√ε, and the
/// mean is no larger than x.
pub(crate) fn always_fit<T: Element>(gamma: Option<&[f64]>, beta: Option<&[f64]>, eps: f64) -> bool {
    let all = |values: Option<&[f64]>, fits: &dyn Fn(f64) -> bool| values.is_none_or(|v| v.iter().all(|&v| fits(v)));
    fits::<T>(scale(1.0, 0.0, eps)) && all(gamma, &|g| fits::<T>(scale(g, 0.0, eps))) && all(beta, &|b| fits::<T>(b))
}

/// Mean (high and low part), s and β in the precision in which x is normalized.
pub(crate) fn for_kernel<T: Element>(mean: f64, scale: f64, beta: f64) -> [T::Wide; 4] {
    let high = T::Wide::from_f64(mean);
    [high, T::Wide::from_f64(mean - high.to_f64()), T::Wide::from_f64(scale), T::Wide::from_f64(beta)]
}

fn check_eps(eps: f64) -> Result<(), Error> {
    if eps.is_finite() && eps >= 0.0 { Ok(()) } else { Err(Error::Eps { value: eps }) }
}

pub(crate) fn check_training_eps(eps: f64) -> Result<(), Error> {
    check_eps(eps)?;
    if eps == 0.0 { Err(Error::EpsZeroInTraining) } else { Ok(()) }
}

pub(crate) fn check_parameters(channels: usize, gamma: Option<&[f64]>, beta: Option<&[f64]>) -> Result<(), Error> {
    for (argument, values) in [("gamma", gamma), ("beta", beta)] {
        if let Some(values) = values {
            Error::check_channels(argument, values.len(), channels)?;
            Error::check_finite(argument, values)?;
        }
    }
    Ok(())
}
