//! The sums of a backward pass, per channel: dγ = Σdy·x̂ and dβ = Σdy.

use crate::bounds::Bounds;
use crate::bytes;
use crate::element::Element;
use crate::error::Error;
use crate::float_mode::FloatMode;
use crate::forward_pass::ForwardPass;
use crate::input::check_layout;
use crate::kernels::{GradientSumRows, GradientSumRuns, ROWS};
use crate::layout::Layout;
use crate::memory::{collected, zeros};
use crate::pairs::{OfChannel, OfColumns, Pair};
use crate::partition::{Family, Interleaved, Planar};
use crate::simd::dispatch;
use crate::tree::Tree;
use crate::verb::begin;
use crate::view::{Rect, Tile, TileMut, View};
use std::iter::repeat_n;
use std::ops::Range;

/// dγ = Σdy·x̂ and dβ = Σdy per channel with the number of values summed, in float64; a value that merges.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientSums {
    count: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
}

const FORMAT: bytes::Format = bytes::Format { what: "GradientSums", header: b"batchnorm-gradient-sums/1\n" };

impl GradientSums {
    /// Sums from their parts.
    ///
    /// # Errors
    /// [`Error::NoChannels`], [`Error::Channels`] for parts of different lengths, [`Error::NotFinite`] and
    /// [`Error::Negative`] for a count.
    pub fn new(count: Vec<f64>, dgamma: Vec<f64>, dbeta: Vec<f64>) -> Result<Self, Error> {
        if count.is_empty() {
            return Err(Error::NoChannels);
        }
        Error::check_channels("dgamma", dgamma.len(), count.len())?;
        Error::check_channels("dbeta", dbeta.len(), count.len())?;
        Error::check_counts(&count)?;
        Ok(Self { count, dgamma, dbeta })
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.count.len()
    }

    /// Values per channel: m.
    pub fn count(&self) -> &[f64] {
        &self.count
    }

    /// ∂ℓ/∂γ per channel.
    pub fn dgamma(&self) -> &[f64] {
        &self.dgamma
    }

    /// ∂ℓ/∂β per channel.
    pub fn dbeta(&self) -> &[f64] {
        &self.dbeta
    }

    /// The sums over the values of both.
    ///
    /// # Errors
    /// [`Error::Channels`], [`Error::NoMemory`].
    pub fn merge(&self, other: &Self) -> Result<Self, Error> {
        Error::check_channels("other", other.channels(), self.channels())?;
        let _mode = FloatMode::standard();
        let sum = |a: &[f64], b: &[f64]| collected(a.iter().zip(b).map(|(a, b)| a + b));
        Ok(Self {
            count: sum(&self.count, &other.count)?,
            dgamma: sum(&self.dgamma, &other.dgamma)?,
            dbeta: sum(&self.dbeta, &other.dbeta)?,
        })
    }

    /// A portable form: a header with the version, the number of channels, then count, dγ and dβ, little-endian.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        FORMAT.write([self.channels()], [&self.count, &self.dgamma, &self.dbeta])
    }

    /// Reads what [`GradientSums::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Bytes`], [`Error::NoMemory`], and those of [`GradientSums::new`].
    pub fn from_bytes(data: &[u8]) -> Result<Self, Error> {
        let (_, [count, dgamma, dbeta]) = FORMAT.read(data, |[channels]| Some([channels; 3]))?;
        Self::new(count, dgamma, dbeta)
    }

    /// Zeros in place of the sums of a pass.
    pub(crate) fn zeros(layout: Layout) -> Result<Self, Error> {
        let channels = layout.channels();
        let count = collected(repeat_n(layout.count() as f64, channels))?;
        Ok(Self { count, dgamma: zeros(channels)?, dbeta: zeros(channels)? })
    }

    /// dγ and dβ, to be written.
    pub(crate) fn dgamma_and_dbeta(&mut self) -> (&mut [f64], &mut [f64]) {
        (&mut self.dgamma, &mut self.dbeta)
    }
}

/// Σdy and Σdy·(x − mean), which are added.
pub(crate) struct SumAndProducts;

impl Pair for SumAndProducts {
    type Weights = ();

    #[inline(always)]
    fn weights(_: f64, _: f64) {}

    #[inline(always)]
    fn merge((): (), sum: &mut f64, products: &mut f64, (right_sum, right_products): (f64, f64)) {
        *sum += right_sum;
        *products += right_products;
    }
}

/// The number of elements of the gradient that passes an activation that are computed at a time, if only sums are wanted.
const PART: usize = 4096;

/// dγ and dβ of a training pass.
///
/// # Errors
/// [`Error::Channels`], [`Error::LayoutMismatch`], [`Error::NoMemory`]; [`Error::Threads`], [`Error::Level`] for a wrong
/// value of an environment variable.
pub fn gradient_sums<T: Element>(dy: View<'_, T>, pass: ForwardPass<'_, T>) -> Result<GradientSums, Error> {
    let _mode = begin()?;
    check_layout("dy", dy.layout(), pass.layout())?;
    pass.check()?;
    let (pass, bounds) = pass.bounded()?;
    sums_of(dy, &pass, bounds.as_ref())
}

/// [`gradient_sums`] of tensors that have been checked; with bounds, dy counts only between them.
pub(crate) fn sums_of<T: Element>(
    dy: View<'_, T>,
    pass: &ForwardPass<'_, T>,
    bounds: Option<&Bounds<T>>,
) -> Result<GradientSums, Error> {
    let layout = pass.layout();
    let mut sums = GradientSums::zeros(layout)?;
    if layout.is_empty() {
        return Ok(sums);
    }
    let pairs = match Family::of(layout) {
        Family::Planar(planar) => planar_sums(dy, pass, bounds, planar),
        Family::Interleaved(rows) => interleaved_sums(dy, pass, bounds, rows),
    }?;
    for (c, pair) in pairs.into_iter().enumerate() {
        (sums.dgamma[c], sums.dbeta[c]) = dgamma_and_dbeta(pass, c, pair);
    }
    Ok(sums)
}

/// dγ and dβ of channel `c` from Σdy and Σdy·(x − mean).
pub(crate) fn dgamma_and_dbeta<T: Element>(
    pass: &ForwardPass<'_, T>,
    c: usize,
    (sum, products): (f64, f64),
) -> (f64, f64) {
    (products * pass.coefficients.invstd()[c], sum)
}

fn planar_sums<T: Element>(
    dy: View<'_, T>,
    pass: &ForwardPass<'_, T>,
    bounds: Option<&Bounds<T>>,
    planar: Planar,
) -> Result<Vec<(f64, f64)>, Error> {
    let width = planar.width();
    let sums = planar.map_channels(2 * dy.bytes(), |channels, block| {
        let rect = planar.rect(&channels, block);
        let (dy, x) = (dy.tile(width, &rect), pass.x.tile(width, &rect));
        let mean = &pass.coefficients.mean()[channels.clone()];
        let bounds = bounds.map(|bounds| bounds.of_channels(channels.clone()));
        if !pass.has_activation() {
            return sums_of_block(dy, x, mean, bounds);
        }
        let mut memory = collected(repeat_n(T::from_f64(0.0), dy.rows() * dy.cols()))?;
        let passing = TileMut::of(&mut memory, dy.rows(), dy.cols());
        sums_of_block(pass.through_runs(&planar, (&channels, &rect), dy, &passing), x, mean, None)
    })?;
    collected(sums.into_iter().map(OfChannel::into_pair))
}

/// The sums of a block of some adjacent channels, one after the other, of the given means. With bounds, dy counts only where x lies
/// between them.
pub(crate) fn sums_of_block<T: Element>(
    dy: Tile<'_, T>,
    x: Tile<'_, T>,
    mean: &[f64],
    bounds: Option<[&[T]; 2]>,
) -> Result<Vec<OfChannel<SumAndProducts>>, Error> {
    let count = (x.rows() * x.cols() / mean.len()) as f64;
    collected(dispatch(GradientSumRuns { dy, x, mean, bounds }).into_iter().map(|sums| OfChannel::new(count, sums)))
}

fn interleaved_sums<T: Element>(
    dy: View<'_, T>,
    pass: &ForwardPass<'_, T>,
    bounds: Option<&Bounds<T>>,
    rows: Interleaved,
) -> Result<Vec<(f64, f64)>, Error> {
    let of_blocks = |columns: Range<usize>, blocks: Range<usize>| {
        let mean = rows.spread(columns.clone(), 0, |c| pass.coefficients.mean()[c])?;
        let coefficients = pass.columns(&rows, columns.clone())?;
        let bounds = bounds.map(|bounds| bounds.of_columns(&rows, columns.clone())).transpose()?;
        let bounds = bounds.as_ref().map(|[least, most]| [&**least, &**most]);
        // The rows of a part are a multiple of those of a step of the sums; without an activation a block is one part.
        let step = if pass.has_activation() { (PART / columns.len()).max(ROWS) / ROWS * ROWS } else { rows.rows };
        let elements = if pass.has_activation() { step * columns.len() } else { 0 };
        let mut memory = collected(repeat_n(T::from_f64(0.0), elements))?;
        Tree::of(blocks.map(|b| {
            let block = rows.block(b);
            let mut sums = OfColumns::<SumAndProducts>::zeros(block.len(), columns.len())?;
            for start in block.clone().step_by(step) {
                let rect = Rect { rows: start..block.end.min(start + step), cols: columns.clone() };
                let (mut dy, x) = (dy.tile(rows.width, &rect), pass.x.tile(rows.width, &rect));
                let passing;
                if coefficients.is_some() {
                    passing = TileMut::of(&mut memory, x.rows(), x.cols());
                    dy = pass.through_rows(&rows, (coefficients.as_ref(), &rect), dy, &passing);
                }
                let (dbeta, products) = (&mut sums.first[..], &mut sums.second[..]);
                dispatch(GradientSumRows { dy, x, mean: &mean, bounds, dbeta, products });
            }
            Ok(sums)
        }))
    };
    rows.map_strips(2 * dy.bytes(), of_blocks, |strip| strip.into_channels(rows.inner))
}
