//! The parameters of a layer: γ, β and ε.

use crate::error::Error;

/// γ, β and ε of a layer. Without γ, it is 1 in every channel; without β, it is 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parameters<'a> {
    /// γ: the scale of each channel.
    pub gamma: Option<&'a [f64]>,
    /// β: the shift of each channel.
    pub beta: Option<&'a [f64]>,
    /// ε: the number that is added to the variance.
    pub eps: f64,
}

/// No γ, no β, ε = 1e-5.
impl Default for Parameters<'_> {
    fn default() -> Self {
        Self { gamma: None, beta: None, eps: 1e-5 }
    }
}

impl Parameters<'_> {
    /// Checks ε, and that γ and β are finite numbers, one per channel.
    pub(crate) fn check(&self, channels: usize) -> Result<(), Error> {
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return Err(Error::Eps { value: self.eps });
        }
        for (argument, values) in [("gamma", self.gamma), ("beta", self.beta)] {
            if let Some(values) = values {
                Error::check_channels(argument, values.len(), channels)?;
                Error::check_finite(argument, values)?;
            }
        }
        Ok(())
    }

    /// [`Parameters::check`], and that ε is more than 0, which training needs since the variance of a batch may be 0.
    pub(crate) fn check_training(&self, channels: usize) -> Result<(), Error> {
        if self.eps == 0.0 { Err(Error::EpsZeroInTraining) } else { self.check(channels) }
    }

    /// √(var + ε), as contract 1 writes it.
    pub(crate) fn root(&self, var: f64) -> f64 {
        (var + self.eps).sqrt()
    }

    /// s = γ/√(var + ε) of channel `c`.
    pub(crate) fn scale(&self, c: usize, var: f64) -> f64 {
        self.gamma.map_or(1.0, |gamma| gamma[c]) / self.root(var)
    }

    /// β of channel `c`.
    pub(crate) fn shift(&self, c: usize) -> f64 {
        self.beta.map_or(0.0, |beta| beta[c])
    }
}
