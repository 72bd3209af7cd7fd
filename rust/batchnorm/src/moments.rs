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

use crate::blocks::{Family, Interleaved, Merge, Planar, Tree};
use crate::bytes;
use crate::element::Element;
use crate::error::Error;
use crate::simd::{FloatMode, MomentRows, MomentRuns, dispatch};
use crate::view::{Rect, Tile, View};
use std::ops::Range;

/// Statistics of channels in float64.
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

    pub(crate) fn of_equal_count(count: usize, mean: Vec<f64>, m2: Vec<f64>) -> Self {
        Self { count: vec![count as f64; mean.len()], mean, m2 }
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
    /// [`Error::TooFewValues`] where a channel has no value.
    pub fn var(&self) -> Result<Vec<f64>, Error> {
        self.require(1)?;
        Ok(self.divided(0.0))
    }

    /// Unbiased variance M2/(count − 1) per channel (section 3.1: Var\[x\] = m/(m−1)·E\[σ²_B\]).
    ///
    /// # Errors
    /// [`Error::TooFewValues`] where a channel has count 1 or less.
    pub fn var_unbiased(&self) -> Result<Vec<f64>, Error> {
        self.require(2)?;
        Ok(self.divided(1.0))
    }

    fn divided(&self, less: f64) -> Vec<f64> {
        let _mode = FloatMode::standard();
        self.m2.iter().zip(&self.count).map(|(m2, n)| m2 / (n - less)).collect()
    }

    /// # Errors
    /// [`Error::TooFewValues`] where a channel has `wanted` − 1 values or fewer. (Weights may make a count fractional.)
    pub(crate) fn require(&self, wanted: u32) -> Result<(), Error> {
        match self.count.iter().position(|&n| n <= f64::from(wanted - 1)) {
            Some(channel) => Err(Error::TooFewValues { channel, count: self.count[channel], wanted }),
            None => Ok(()),
        }
    }

    /// The moments of the values of both. Moments of no values are the neutral element, exactly.
    ///
    /// # Errors
    /// [`Error::Channels`].
    pub fn merge(&self, other: &Self) -> Result<Self, Error> {
        Error::check_channels("other", other.channels(), self.channels())?;
        let _mode = FloatMode::standard();
        let mut merged = self.clone();
        for c in 0..merged.channels() {
            let (mine, theirs) = (self.count[c], other.count[c]);
            if mine == 0.0 {
                (merged.mean[c], merged.m2[c]) = (other.mean[c], other.m2[c]);
            } else if theirs != 0.0 {
                let weights = Weights::new(mine, theirs);
                weights.combine(&mut merged.mean[c], &mut merged.m2[c], other.mean[c], other.m2[c]);
            }
            merged.count[c] = mine + theirs;
        }
        Ok(merged)
    }

    /// A portable form: a header with the version, the number of channels, then count, mean and M2, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        FORMAT.write([&self.count, &self.mean, &self.m2])
    }

    /// Reads what [`Moments::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Bytes`], and those of [`Moments::new`].
    pub fn from_bytes(data: &[u8]) -> Result<Self, Error> {
        let [count, mean, m2] = FORMAT.read(data)?;
        Self::new(count, mean, m2)
    }
}

/// What Chan's update needs of the two counts.
#[derive(Clone, Copy)]
struct Weights {
    /// n_b/n
    right: f64,
    /// n_a·n_b/n
    product: f64,
}

impl Weights {
    fn new(left: f64, right: f64) -> Self {
        let share = right / (left + right);
        Self { right: share, product: left * share }
    }

    #[inline(always)]
    fn combine(self, mean: &mut f64, m2: &mut f64, right_mean: f64, right_m2: f64) {
        let delta = right_mean - *mean;
        *mean += delta * self.right;
        *m2 = (*m2 + right_m2) + delta * delta * self.product;
    }
}

/// Moments of some blocks of columns with one count: a leaf or node of the tree.
struct Partial {
    count: f64,
    mean: Vec<f64>,
    m2: Vec<f64>,
}

impl Merge for Partial {
    fn merge(&mut self, right: &Self) {
        let weights = Weights::new(self.count, right.count);
        for (c, (mean, m2)) in self.mean.iter_mut().zip(&mut self.m2).enumerate() {
            weights.combine(mean, m2, right.mean[c], right.m2[c]);
        }
        self.count += right.count;
    }
}

/// The same of one channel, without a heap.
struct Scalar(f64, f64, f64);

impl Merge for Scalar {
    fn merge(&mut self, right: &Self) {
        Weights::new(self.0, right.0).combine(&mut self.1, &mut self.2, right.1, right.2);
        self.0 += right.0;
    }
}

/// Moments of a tensor, per channel over m = outer·inner values. Of no values: the neutral element.
///
/// # Errors
/// [`Error::Threads`], [`Error::Level`] for what the environment names wrongly.
pub fn moments<T: Element>(x: View<'_, T>) -> Result<Moments, Error> {
    let _mode = crate::begin()?;
    let layout = x.layout();
    let (mean, m2) = if layout.is_empty() {
        (vec![0.0; layout.channels()], vec![0.0; layout.channels()])
    } else {
        match Family::of(layout) {
            Family::Planar(planar) => moments_planar(x, planar),
            Family::Interleaved(rows) => moments_interleaved(x, rows),
        }
    };
    Ok(Moments::of_equal_count(layout.count(), mean, m2))
}

fn moments_planar<T: Element>(x: View<'_, T>, planar: Planar) -> (Vec<f64>, Vec<f64>) {
    let channels = planar.map_channels(x.bytes(), |channels, block| {
        moments_of_block(x.tile(planar.width(), &planar.rect(&channels, block)), channels.len())
    });
    channels.into_iter().map(|Scalar(_, mean, m2)| (mean, m2)).unzip()
}

fn moments_of_block<T: Element>(x: Tile<'_, T>, channels: usize) -> Vec<Scalar> {
    dispatch(MomentRuns { x, channels }).into_iter().map(|(count, mean, m2)| Scalar(count, mean, m2)).collect()
}

/// Mean and M2 of each channel of a group that has at least one value, given as a tile of all its runs.
pub(crate) fn moments_of_group<T: Element>(planar: &Planar, group: Tile<'_, T>) -> Vec<(f64, f64)> {
    let sums = planar.fold(0..group.cols() / planar.inner, 0..planar.blocks(), |channels, block| {
        moments_of_block(group.part(&planar.rect(&channels, block)), channels.len())
    });
    sums.into_iter().map(|Scalar(_, mean, m2)| (mean, m2)).collect()
}

fn moments_interleaved<T: Element>(x: View<'_, T>, rows: Interleaved) -> (Vec<f64>, Vec<f64>) {
    let of_blocks = |columns: Range<usize>, blocks: Range<usize>| {
        let mut sum = vec![0.0; columns.len()];
        Tree::of(blocks.map(|b| {
            let block = rows.block(b);
            let (mut mean, mut m2) = (vec![0.0; columns.len()], vec![0.0; columns.len()]);
            let x = x.tile(rows.width, &Rect { rows: block.clone(), cols: columns.clone() });
            dispatch(MomentRows { x, mean: &mut mean, m2: &mut m2, sum: &mut sum });
            Partial { count: block.len() as f64, mean, m2 }
        }))
    };
    let close = |strip: Partial| {
        let columns: Vec<(f64, f64)> = strip.mean.into_iter().zip(strip.m2).collect();
        let channel = |columns: &[(f64, f64)]| {
            let leaves = columns.iter().map(|&(mean, m2)| Scalar(strip.count, mean, m2));
            Tree::of(leaves).map_or((0.0, 0.0), |Scalar(_, mean, m2)| (mean, m2))
        };
        columns.chunks(rows.inner).map(channel).collect()
    };
    rows.map_strips(x.bytes(), of_blocks, close).into_iter().unzip()
}
