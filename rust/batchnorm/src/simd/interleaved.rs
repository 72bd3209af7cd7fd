//! Kernels over whole rows, in which every column is a channel.
//!
//! Columns are independent of each other, so it does not matter for the bits how a row is cut into vectors or strips.
//! Rows are taken four at a time, and the four added as ((r0 + r1) + (r2 + r3)): sums per column stay in cache, and are
//! loaded and stored once for four rows.

use super::{Apply, Kernel, affine};
use crate::element::Element;
use crate::view::{Tile, TileMut};

/// Columns in a step.
const STEP: usize = 8;
/// Rows in a step.
const ROWS: usize = 4;

/// The first `chunks` whole steps of a slice.
#[inline(always)]
fn steps<V>(values: &[V], chunks: usize) -> &[[V; STEP]] {
    &values.as_chunks::<STEP>().0[..chunks]
}

/// Mean and M2 of each column of a block.
pub(crate) struct MomentRows<'a, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) mean: &'a mut [f64],
    pub(crate) m2: &'a mut [f64],
    /// Room for a sum a column.
    pub(crate) sum: &'a mut [f64],
}

impl<T: Element> Kernel for MomentRows<'_, T> {
    type Output = ();

    /// As for runs: deviations from a pivot, and a second pass for columns where it was far off.
    #[inline(always)]
    fn run(self) {
        let Self { x, mean, m2, sum } = self;
        let n = x.rows() as f64;
        pivots(x, mean);
        sum.fill(0.0);
        m2.fill(0.0);
        add_deviations(x, mean, sum, m2);
        for j in 0..x.cols() {
            let (m, s, cancelled) = super::close(mean[j], sum[j], m2[j], n);
            (mean[j], m2[j]) = (m, s);
            if cancelled {
                let (mut sum, mut squares) = ([0.0], [0.0]);
                add_deviations(x.part(0..x.rows(), j..j + 1), &[m], &mut sum, &mut squares);
                (mean[j], m2[j], _) = super::close(m, sum[0], squares[0], n);
            }
        }
    }
}

/// The mean of each column's first rows: a power of two of them, scaled before they are added.
#[inline(always)]
fn pivots<T: Element>(x: Tile<'_, T>, pivot: &mut [f64]) {
    let rows = 1usize << x.rows().min(2 * ROWS).ilog2();
    let part = 1.0 / rows as f64;
    // Pairwise for eight rows: ((r0+r1)+(r2+r3)) + ((r4+r5)+(r6+r7)); equal values then add up without rounding.
    let at = |r: usize, j: usize| x.row(r).at(j).to_f64() * part;
    let four = |r: usize, j: usize| (at(r, j) + at(r + 1, j)) + (at(r + 2, j) + at(r + 3, j));
    for (j, p) in pivot.iter_mut().enumerate() {
        *p = match rows {
            1 => at(0, j),
            2 => at(0, j) + at(1, j),
            4 => four(0, j),
            _ => four(0, j) + four(4, j),
        };
    }
}

/// Adds up to four values in a fixed tree.
#[inline(always)]
fn pairwise<const R: usize>(d: [f64; R]) -> f64 {
    if R == ROWS { (d[0] + d[1]) + (d[2] + d[R - 1]) } else { d[0] }
}

#[inline(always)]
fn add_deviations<T: Element>(x: Tile<'_, T>, pivot: &[f64], sum: &mut [f64], squares: &mut [f64]) {
    let whole = x.rows() - x.rows() % ROWS;
    for r in (0..whole).step_by(ROWS) {
        add_deviations_of::<T, ROWS>(x, r, pivot, sum, squares);
    }
    for r in whole..x.rows() {
        add_deviations_of::<T, 1>(x, r, pivot, sum, squares);
    }
}

#[inline(always)]
fn add_deviations_of<T: Element, const R: usize>(
    x: Tile<'_, T>,
    r: usize,
    pivot: &[f64],
    sum: &mut [f64],
    squares: &mut [f64],
) {
    let rows: [_; R] = std::array::from_fn(|i| x.row(r + i));
    let chunks = x.cols() / STEP;
    let (pivots, _) = pivot.as_chunks::<STEP>();
    let (sums, _) = sum.as_chunks_mut::<STEP>();
    let (squared, _) = squares.as_chunks_mut::<STEP>();
    for (k, ((pivot, sum), squares)) in pivots.iter().zip(sums).zip(squared).enumerate() {
        let values: [[T; STEP]; R] = std::array::from_fn(|i| rows[i].chunk(k));
        for lane in 0..STEP {
            let d: [f64; R] = std::array::from_fn(|i| values[i][lane].to_f64() - pivot[lane]);
            sum[lane] += pairwise(d);
            squares[lane] += pairwise(d.map(|d| d * d));
        }
    }
    for j in chunks * STEP..x.cols() {
        let d: [f64; R] = std::array::from_fn(|i| rows[i].at(j).to_f64() - pivot[j]);
        sum[j] += pairwise(d);
        squares[j] += pairwise(d.map(|d| d * d));
    }
}

/// y = (x − mean)·s + β, with coefficients a column.
pub(crate) struct AffineRows<'a, 'b, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) y: &'a TileMut<'b, T>,
    /// Mean (high and low part), s and β of each column.
    pub(crate) coefficients: [&'a [T::Wide]; 4],
}

impl<T: Element> Kernel for AffineRows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let [high, low, s, beta] = self.coefficients;
        let chunks = self.y.cols() / STEP;
        let (highs, lows) = (steps(high, chunks), steps(low, chunks));
        let (scales, betas) = (steps(s, chunks), steps(beta, chunks));
        for r in (0..self.x.rows()).rev() {
            let (x, y) = (self.x.row(r), self.y.row(r));
            for k in 0..chunks {
                let values: [T; STEP] = x.chunk(k);
                let (high, low, s, beta) = (&highs[k], &lows[k], &scales[k], &betas[k]);
                y.set_chunk::<STEP>(k, std::array::from_fn(|i| affine(values[i], [high[i], low[i], s[i], beta[i]])));
            }
            for j in chunks * STEP..y.len() {
                y.set(j, affine(x.at(j), [high[j], low[j], s[j], beta[j]]));
            }
        }
    }
}

/// Adds Σdy and Σdy·(x − mean) of each column of a block.
pub(crate) struct SumRows<'a, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) mean: &'a [f64],
    pub(crate) dbeta: &'a mut [f64],
    pub(crate) products: &'a mut [f64],
}

impl<T: Element> Kernel for SumRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { dy, x, mean, dbeta, products } = self;
        let whole = x.rows() - x.rows() % ROWS;
        for r in (0..whole).step_by(ROWS) {
            add_products_of::<T, ROWS>(dy, x, r, mean, dbeta, products);
        }
        for r in whole..x.rows() {
            add_products_of::<T, 1>(dy, x, r, mean, dbeta, products);
        }
    }
}

#[inline(always)]
fn add_products_of<T: Element, const R: usize>(
    dy: Tile<'_, T>,
    x: Tile<'_, T>,
    r: usize,
    mean: &[f64],
    dbeta: &mut [f64],
    products: &mut [f64],
) {
    let dys: [_; R] = std::array::from_fn(|i| dy.row(r + i));
    let xs: [_; R] = std::array::from_fn(|i| x.row(r + i));
    let chunks = x.cols() / STEP;
    let (means, _) = mean.as_chunks::<STEP>();
    let (dbetas, _) = dbeta.as_chunks_mut::<STEP>();
    let (sums, _) = products.as_chunks_mut::<STEP>();
    for (k, ((mean, dbeta), products)) in means.iter().zip(dbetas).zip(sums).enumerate() {
        let d: [[T; STEP]; R] = std::array::from_fn(|i| dys[i].chunk(k));
        let v: [[T; STEP]; R] = std::array::from_fn(|i| xs[i].chunk(k));
        for lane in 0..STEP {
            dbeta[lane] += pairwise::<R>(std::array::from_fn(|i| d[i][lane].to_f64()));
            products[lane] +=
                pairwise::<R>(std::array::from_fn(|i| d[i][lane].to_f64() * (v[i][lane].to_f64() - mean[lane])));
        }
    }
    for j in chunks * STEP..x.cols() {
        dbeta[j] += pairwise::<R>(std::array::from_fn(|i| dys[i].at(j).to_f64()));
        products[j] += pairwise::<R>(std::array::from_fn(|i| dys[i].at(j).to_f64() * (xs[i].at(j).to_f64() - mean[j])));
    }
}

/// dx from dy, x and the sums of each column.
pub(crate) struct ApplyRows<'a, 'b, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) dx: &'a TileMut<'b, T>,
    pub(crate) coefficients: [&'a [f64]; 4],
}

impl<T: Element> Kernel for ApplyRows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let [mean, offset, slope, scale] = self.coefficients;
        let chunks = self.dx.cols() / STEP;
        let (means, offsets) = (steps(mean, chunks), steps(offset, chunks));
        let (slopes, scales) = (steps(slope, chunks), steps(scale, chunks));
        for r in (0..self.dy.rows()).rev() {
            let (dy, x, dx) = (self.dy.row(r), self.x.row(r), self.dx.row(r));
            for k in 0..chunks {
                let (dys, xs): ([T; STEP], [T; STEP]) = (dy.chunk(k), x.chunk(k));
                let (mean, offset, slope, scale) = (&means[k], &offsets[k], &slopes[k], &scales[k]);
                dx.set_chunk::<STEP>(
                    k,
                    std::array::from_fn(|i| {
                        Apply { mean: mean[i], offset: offset[i], slope: slope[i], scale: scale[i] }.dx(dys[i], xs[i])
                    }),
                );
            }
            for j in chunks * STEP..dx.len() {
                let c = Apply { mean: mean[j], offset: offset[j], slope: slope[j], scale: scale[j] };
                dx.set(j, c.dx(dy.at(j), x.at(j)));
            }
        }
    }
}
