//! Shrinkage of a covariance towards a multiple of the identity, with the weight of Ledoit and Wolf (2004).
//!
//! Λ' = (1 − δ)Λ + δμI with μ = tr(Λ)/D. With q = Σ‖x − mean‖⁴ over the m positions, and F the sum of squares of Λ,
//!
//! ```text
//! δ = min(b, d)/d,   b = (q/m² − F/m)/D,   d = F/D − μ²
//! ```
//!
//! which minimizes the expected squared distance from the covariance of the population. Its derivative is part of the backward
//! pass, since δ depends on x too.

use crate::element::Element;
use crate::error::Error;
use crate::memory::zeros;
use crate::parallel;
use crate::partition::span_of;
use crate::patch::{Patch, Patches};
use crate::products::Centred;
use crate::tree::{Merge, Tree};
use faer::{Mat, MatRef};

/// The number of tasks that the sums are divided into if the layout allows it.
const TASKS: usize = 16;

/// Sums over all positions, with n = ‖x − mean‖² of the position in its group.
pub(crate) struct PowerSums {
    /// Σn², of each group.
    pub(crate) fourth: Vec<f64>,
    /// Σn·(x − mean), of each channel.
    pub(crate) third: Vec<f64>,
}

impl Merge for PowerSums {
    fn merge(&mut self, right: &Self) {
        self.fourth.iter_mut().zip(&right.fourth).for_each(|(to, from)| *to += from);
        self.third.iter_mut().zip(&right.third).for_each(|(to, from)| *to += from);
    }
}

impl PowerSums {
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn of<T: Element>(patches: &Patches, x: Centred<'_, T>) -> Result<Self, Error> {
        let span = span_of(patches.len(), TASKS / patches.strips());
        let spans = patches.len().div_ceil(span);
        let partial = parallel::map(patches.strips() * spans, x.x.bytes(), |task| {
            let (channels, s) = (patches.strip(task / spans), task % spans);
            let groups = channels.len() / patches.group;
            let mut sums = Self { fourth: zeros(groups)?, third: zeros(channels.len())? };
            let (mut patch, mut norms) = (patches.room(None)?, Vec::new());
            for p in s * span..patches.len().min((s + 1) * span) {
                let tile = x.x.tile(patches.width(), &patches.rect(&channels, p));
                patch.gather(tile, &x.mean[channels.clone()]);
                squared_norms(&patch, patches.group, &mut norms);
                for (norm, fourth) in norms.chunks_exact(patch.positions()).zip(&mut sums.fourth) {
                    *fourth += norm.iter().map(|n| n * n).sum::<f64>();
                }
                patch.each(|c, p, v| sums.third[c] += norms[c / patches.group * patch.positions() + p] * v);
            }
            Ok(sums)
        })?;
        let (mut partial, mut result) = (partial.into_iter(), Self { fourth: Vec::new(), third: Vec::new() });
        for _ in 0..patches.strips() {
            let sums = Tree::of(partial.by_ref().take(spans).map(Ok))?;
            result.fourth.extend(sums.fourth);
            result.third.extend(sums.third);
        }
        Ok(result)
    }
}

/// ‖x‖² of each position, group after group.
pub(crate) fn squared_norms(patch: &Patch, group: usize, norms: &mut Vec<f64>) {
    norms.clear();
    norms.resize(patch.channels() / group * patch.positions(), 0.0);
    patch.each(|c, p, v| norms[c / group * patch.positions() + p] += v * v);
}

/// Shrinkage of the covariance of one group.
pub(crate) struct Shrinkage {
    /// δ
    pub(crate) weight: f64,
    /// μ
    mean_variance: f64,
    /// Numerator and denominator of δ before the minimum is taken.
    ratio: (f64, f64),
    count: f64,
}

impl Shrinkage {
    /// The weight for a covariance whose lower triangle is read, and the sum of fourth powers.
    pub(crate) fn of(cov: MatRef<'_, f64>, fourth: f64, count: f64) -> Self {
        let d = cov.nrows();
        let mean_variance = (0..d).map(|i| cov[(i, i)]).sum::<f64>() / d as f64;
        let squares = sum(d, |i, j| cov[(i.max(j), i.min(j))].powi(2));
        let numerator = (fourth / (count * count) - squares / count) / d as f64;
        let denominator = squares / d as f64 - mean_variance * mean_variance;
        // A covariance that is a multiple of the identity, as that of one channel is, stays as it is.
        let weight = if denominator > 0.0 { (numerator / denominator).clamp(0.0, 1.0) } else { 0.0 };
        Self { weight, mean_variance, ratio: (numerator, denominator), count }
    }

    /// Λ', of which the lower triangle is right.
    pub(crate) fn apply(&self, cov: MatRef<'_, f64>) -> Mat<f64> {
        Mat::from_fn(cov.nrows(), cov.ncols(), |i, j| {
            let towards = if i == j { self.weight * self.mean_variance } else { 0.0 };
            (1.0 - self.weight) * cov[(i, j)] + towards
        })
    }

    /// ∂ℓ/∂Λ and ∂ℓ/∂q from ∂ℓ/∂Λ', both symmetric.
    pub(crate) fn backward(&self, dshrunk: MatRef<'_, f64>, cov: MatRef<'_, f64>) -> (Mat<f64>, f64) {
        let d = cov.nrows();
        let cov = |i: usize, j: usize| cov[(i.max(j), i.min(j))];
        let trace = (0..d).map(|i| dshrunk[(i, i)]).sum::<f64>();
        let mut diagonal = self.weight * trace / d as f64;
        let (mut of_squares, mut dfourth) = (0.0, 0.0);
        if self.weight > 0.0 && self.weight < 1.0 {
            let dweight = self.mean_variance * trace - sum(d, |i, j| dshrunk[(i, j)] * cov(i, j));
            let (numerator, denominator) = self.ratio;
            let dnumerator = dweight / denominator;
            let ddenominator = -dweight * numerator / (denominator * denominator);
            dfourth = dnumerator / (d as f64 * self.count * self.count);
            of_squares = ddenominator / d as f64 - dnumerator / (d as f64 * self.count);
            diagonal += -2.0 * self.mean_variance * ddenominator / d as f64;
        }
        let dcov = Mat::from_fn(d, d, |i, j| {
            let on = if i == j { diagonal } else { 0.0 };
            (1.0 - self.weight) * dshrunk[(i, j)] + 2.0 * of_squares * cov(i, j) + on
        });
        (dcov, dfourth)
    }
}

/// Σ over all elements of a square matrix, column by column.
fn sum(d: usize, element: impl Fn(usize, usize) -> f64) -> f64 {
    (0..d).map(|j| (0..d).map(|i| element(i, j)).sum::<f64>()).sum()
}
