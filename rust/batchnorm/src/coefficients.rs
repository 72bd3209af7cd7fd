//! The numbers that normalization takes per channel: mean, s = γ/√(var + ε) and β.

use crate::element::{Element, Wide};
use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::memory::{copied, zeros};
use crate::moments::Moments;
use crate::parameters::Parameters;
use crate::partition::Interleaved;
use crate::per_channel::PerChannel;
use std::borrow::Cow;
use std::ops::Range;

/// The coefficients of y = (x − mean)·s + β per channel, in float64: of frozen statistics or of those of a batch.
///
/// γ = √(Var\[x\] + ε), β = E\[x\] restores the identity (section 3). Note the square root: γ = Var\[x\] does not.
#[derive(Debug, Clone, PartialEq)]
pub struct Coefficients {
    mean: PerChannel,
    invstd: Vec<f64>,
    scale: PerChannel,
    beta: PerChannel,
    /// In training: how many values per channel the statistics are of.
    count: Option<Vec<f64>>,
}

impl Coefficients {
    /// The coefficients of frozen statistics.
    ///
    /// # Errors
    /// [`Error::NoChannels`], [`Error::Channels`], [`Error::NotFinite`], [`Error::Negative`], [`Error::Eps`], and
    /// [`Error::EpsZeroForZeroVariance`]; [`Error::NoMemory`].
    pub fn new(mean: &[f64], var: &[f64], parameters: Parameters<'_>) -> Result<Self, Error> {
        if mean.is_empty() {
            return Err(Error::NoChannels);
        }
        Error::check_channels("var", var.len(), mean.len())?;
        Error::check_finite("mean", mean)?;
        Error::check_finite("var", var)?;
        Error::check_not_negative("var", var)?;
        parameters.check(mean.len())?;
        if let (true, Some(channel)) = (parameters.eps == 0.0, var.iter().position(|&v| v == 0.0)) {
            return Err(Error::EpsZeroForZeroVariance { channel });
        }
        let mut coefficients = Self::zeros(mean.len())?;
        coefficients.fill(mean.iter().copied().zip(var.iter().copied()), parameters);
        Ok(coefficients)
    }

    /// The coefficients of a batch (Algorithm 1), from its biased variance, since it is this batch that is to get
    /// variance one. Statistics that are not finite propagate.
    ///
    /// # Errors
    /// [`Error::TooFewValues`] where a channel has fewer than 2 values, [`Error::EpsZeroInTraining`],
    /// [`Error::Channels`], [`Error::NotFinite`], [`Error::Eps`]; [`Error::NoMemory`].
    pub fn of_moments(moments: &Moments, parameters: Parameters<'_>) -> Result<Self, Error> {
        parameters.check_training(moments.channels())?;
        moments.check_count(2)?;
        let mut coefficients = Self::zeros_of_training(moments.count())?;
        coefficients.fill(moments.mean_and_var(), parameters);
        Ok(coefficients)
    }

    /// Zeros in place of coefficients of frozen statistics, to be [filled](Self::fill).
    fn zeros(channels: usize) -> Result<Self, Error> {
        let per_channel = || PerChannel::zeros(channels);
        let (mean, scale, beta) = (per_channel()?, per_channel()?, per_channel()?);
        Ok(Self { mean, invstd: zeros(channels)?, scale, beta, count: None })
    }

    /// Zeros in place of coefficients of a batch with so many values per channel, to be [filled](Self::fill).
    pub(crate) fn zeros_of_training(count: &[f64]) -> Result<Self, Error> {
        Ok(Self { count: Some(copied(count)?), ..Self::zeros(count.len())? })
    }

    /// Computes the coefficients of mean and variance of every channel, which takes no memory.
    pub(crate) fn fill(&mut self, mean_and_var: impl Iterator<Item = (f64, f64)>, parameters: Parameters<'_>) {
        let _mode = FloatMode::standard();
        let of_channels = self.invstd.iter_mut().zip(mean_and_var).enumerate().map(|(c, (invstd, (mean, var)))| {
            *invstd = 1.0 / parameters.root(var);
            [mean, parameters.scale(c, var), parameters.shift(c)]
        });
        PerChannel::fill_together([&mut self.mean, &mut self.scale, &mut self.beta], of_channels);
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.invstd.len()
    }

    /// Mean per channel.
    pub fn mean(&self) -> &[f64] {
        self.mean.as_slice()
    }

    /// Mean per channel, for kernels.
    pub(crate) fn mean_per_channel(&self) -> &PerChannel {
        &self.mean
    }

    /// s per channel, for kernels.
    pub(crate) fn scale_per_channel(&self) -> &PerChannel {
        &self.scale
    }

    /// 1/√(var + ε) per channel.
    pub fn invstd(&self) -> &[f64] {
        &self.invstd
    }

    /// s = γ/√(var + ε) per channel.
    pub fn scale(&self) -> &[f64] {
        self.scale.as_slice()
    }

    /// The coefficients of x·s alone, without mean and β: what frozen statistics do to a gradient.
    pub(crate) fn scale_only(&self) -> Result<Self, Error> {
        let mut scale_only = Self::zeros(self.channels())?;
        scale_only.invstd.copy_from_slice(&self.invstd);
        scale_only.scale.fill(self.scale().iter().copied());
        Ok(scale_only)
    }

    /// Checks that gradient sums are over as many values per channel as the moments. Frozen statistics take any number.
    pub(crate) fn check_count(&self, count: impl ExactSizeIterator<Item = f64>) -> Result<(), Error> {
        Error::check_channels("sums", count.len(), self.channels())?;
        let wanted = self.count.iter().flatten();
        match count.zip(wanted).enumerate().find(|(_, (got, wanted))| got != *wanted) {
            Some((channel, (got, &wanted))) => Err(Error::Counts { channel, got, wanted }),
            None => Ok(()),
        }
    }

    /// Checks that the precision in which x is normalized can hold the coefficients; else finite x could give NaN. Coefficients
    /// that are not finite propagate.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub(crate) fn check_range<T: Element>(&self) -> Result<(), Error> {
        let fields = [("mean", &self.mean), ("gamma/sqrt(var + eps)", &self.scale), ("beta", &self.beta)];
        for (what, values) in fields.map(|(what, field)| (what, field.as_slice())) {
            if let Some(channel) = values.iter().position(|&value| !fits::<T>(value)) {
                return Err(Error::Range { what, channel, value: values[channel] });
            }
        }
        Ok(())
    }

    /// Whether all are finite in the precision in which x is normalized.
    pub(crate) fn are_finite<T: Element>(&self) -> bool {
        (0..self.channels()).all(|c| self.of_channel::<T>(c).iter().all(|number| number.to_f64().is_finite()))
    }

    /// The coefficients of channel `c` for the kernels.
    pub(crate) fn of_channel<T: Element>(&self, c: usize) -> [T::Wide; 4] {
        for_kernel::<T>(self.mean()[c], self.scale()[c], self.beta.as_slice()[c])
    }

    /// The coefficients of some columns for the kernels.
    pub(crate) fn of_columns<T: Element>(
        &self,
        rows: &Interleaved,
        columns: Range<usize>,
    ) -> Result<OfColumns<'_, T>, Error> {
        let part = |numbers| rows.columns(numbers, columns.clone());
        let low = match T::SPLIT_MEAN {
            true => {
                let mean = self.mean().iter();
                let low = PerChannel::of(mean.map(|&mean| low_part::<T>(mean).to_f64()))?;
                rows.columns(&low, columns.clone())?.into_owned()
            }
            false => Vec::new(), // nothing reads it
        };
        Ok(OfColumns { high: part(&self.mean)?, low, scale: part(&self.scale)?, beta: part(&self.beta)? })
    }
}

/// Coefficients of some columns, as [`crate::kernels::NormalizeRows`] takes them.
pub(crate) struct OfColumns<'a, T: Element> {
    high: Cow<'a, [T::Wide]>,
    /// The low part of the mean, where it has one.
    low: Vec<T::Wide>,
    scale: Cow<'a, [T::Wide]>,
    beta: Cow<'a, [T::Wide]>,
}

impl<T: Element> OfColumns<'_, T> {
    pub(crate) fn slices(&self) -> [&[T::Wide]; 4] {
        [&self.high, &self.low, &self.scale, &self.beta]
    }
}

/// Whether a number stays finite in the precision in which x is normalized.
fn fits<T: Element>(value: f64) -> bool {
    T::Wide::from_f64(value).to_f64().is_finite() || !value.is_finite()
}

/// Whether the coefficients of any batch are in the range of the precision in which x is normalized, as
/// [`Coefficients::check_range`] asks: |s| ≤ |γ|/√ε, and no mean is larger than x.
pub(crate) fn always_fit<T: Element>(parameters: Parameters<'_>, channels: usize) -> bool {
    let of_channel = |c| fits::<T>(parameters.scale(c, 0.0)) && fits::<T>(parameters.shift(c));
    !T::SPLIT_MEAN || (0..channels).all(of_channel)
}

/// Mean (high and low part), s and β in the precision in which x is normalized.
pub(crate) fn for_kernel<T: Element>(mean: f64, scale: f64, beta: f64) -> [T::Wide; 4] {
    [T::Wide::from_f64(mean), low_part::<T>(mean), T::Wide::from_f64(scale), T::Wide::from_f64(beta)]
}

/// What the precision in which x is normalized leaves of a mean, rounded to that precision.
fn low_part<T: Element>(mean: f64) -> T::Wide {
    T::Wide::from_f64(mean - T::Wide::from_f64(mean).to_f64())
}
