//! The numbers that normalization takes per channel: mean, s = γ/√(var + ε) and β.

use crate::element::{Element, Wide};
use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::kernels::LANES;
use crate::moments::Moments;
use crate::parameters::Parameters;
use crate::partition::Interleaved;
use std::ops::Range;

/// The coefficients of y = (x − mean)·s + β per channel, in float64: of frozen statistics or of those of a batch.
///
/// γ = √(Var\[x\] + ε), β = E\[x\] restores the identity (section 3). Note the square root: γ = Var\[x\] does not.
#[derive(Debug, Clone, PartialEq)]
pub struct Coefficients {
    mean: Vec<f64>,
    invstd: Vec<f64>,
    scale: Vec<f64>,
    beta: Vec<f64>,
    /// In training: how many values per channel the statistics are of.
    count: Option<Vec<f64>>,
}

impl Coefficients {
    /// The coefficients of frozen statistics.
    ///
    /// # Errors
    /// [`Error::NoChannels`], [`Error::Channels`], [`Error::NotFinite`], [`Error::Negative`], [`Error::Eps`], and
    /// [`Error::EpsZeroForZeroVariance`].
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
        Ok(Self::of(mean, var, parameters))
    }

    /// The coefficients of a batch (Algorithm 1), from its biased variance, since it is this batch that is to get
    /// variance one. Statistics that are not finite propagate.
    ///
    /// # Errors
    /// [`Error::TooFewValues`] where a channel has fewer than 2 values, [`Error::EpsZeroInTraining`],
    /// [`Error::Channels`], [`Error::NotFinite`], [`Error::Eps`].
    pub fn of_moments(moments: &Moments, parameters: Parameters<'_>) -> Result<Self, Error> {
        parameters.check_training(moments.channels())?;
        moments.check_count(2)?;
        let coefficients = Self::of(moments.mean(), &moments.var()?, parameters);
        Ok(Self { count: Some(moments.count().to_vec()), ..coefficients })
    }

    fn of(mean: &[f64], var: &[f64], parameters: Parameters<'_>) -> Self {
        let _mode = FloatMode::standard();
        let root: Vec<f64> = var.iter().map(|&var| parameters.root(var)).collect();
        let invstd: Vec<f64> = root.iter().map(|root| 1.0 / root).collect();
        let scale = match parameters.gamma {
            Some(gamma) => gamma.iter().zip(&root).map(|(gamma, root)| gamma / root).collect(),
            None => invstd.clone(),
        };
        let beta = parameters.beta.map_or_else(|| vec![0.0; mean.len()], <[f64]>::to_vec);
        Self { mean: mean.to_vec(), invstd, scale, beta, count: None }
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

    /// The coefficients of x·s alone, without mean and β: what frozen statistics do to a gradient.
    pub(crate) fn scale_only(&self) -> Self {
        let zeros = vec![0.0; self.channels()];
        Self { mean: zeros.clone(), beta: zeros, ..self.clone() }
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

    /// The coefficients of channel `c` for the kernels.
    pub(crate) fn of_channel<T: Element>(&self, c: usize) -> [T::Wide; 4] {
        for_kernel::<T>(self.mean[c], self.scale[c], self.beta[c])
    }

    /// The coefficients of some columns for the kernels.
    pub(crate) fn of_columns<T: Element>(&self, rows: &Interleaved, columns: Range<usize>) -> Columns<T> {
        let part = |values: &[f64]| rows.spread(columns.clone(), LANES, |c| T::Wide::from_f64(values[c]));
        let high = part(&self.mean);
        // Where the mean is in one part, nothing reads the other; any numbers will do.
        let low = match T::SPLIT_MEAN {
            true => rows.spread(columns.clone(), LANES, |c| self.of_channel::<T>(c)[1]),
            false => high.clone(),
        };
        Columns([high, low, part(&self.scale), part(&self.beta)])
    }
}

/// Coefficients per column: mean (high and low part), s and β. Those of the first [`LANES`] columns stand again after
/// the last, as [`crate::simd::NormalizeRows`] takes them.
pub(crate) struct Columns<T: Element>([Vec<T::Wide>; 4]);

impl<T: Element> Columns<T> {
    pub(crate) fn slices(&self) -> [&[T::Wide]; 4] {
        self.0.each_ref().map(Vec::as_slice)
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
    let high = T::Wide::from_f64(mean);
    [high, T::Wide::from_f64(mean - high.to_f64()), T::Wide::from_f64(scale), T::Wide::from_f64(beta)]
}
