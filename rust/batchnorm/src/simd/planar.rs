//! Kernels over runs of adjacent values of one channel.

use super::{Kernel, LANES, step_barrier, total};
use crate::element::Element;
use crate::view::{Row, Tile, TileMut};

/// Folds every element of a row into lanes: element i goes to lane i mod [`LANES`], in body and tail alike.
#[inline(always)]
fn for_each_lane<T: Element>(row: Row<'_, T>, mut f: impl FnMut(usize, T)) {
    let chunks = row.len() / LANES;
    for k in 0..chunks {
        step_barrier();
        let values: [T; LANES] = row.chunk(k);
        for (lane, value) in values.into_iter().enumerate() {
            f(lane, value);
        }
    }
    for i in chunks * LANES..row.len() {
        f(i % LANES, row.at(i));
    }
}

/// Count, mean and M2 of a block.
pub(crate) struct MomentRuns<'a, T: Element> {
    pub(crate) x: Tile<'a, T>,
}

impl<T: Element> Kernel for MomentRuns<'_, T> {
    type Output = (f64, f64, f64);

    /// One pass over deviations from a pivot p near the mean: with d = x − p, mean = p + Σd/n and
    /// M2 = Σd² − (Σd)²/n. Where the pivot turns out to be far off, so that the difference would cancel, a second pass
    /// takes the mean for pivot. Of equal values the pivot is that value exactly, so M2 is 0.
    #[inline(always)]
    fn run(self) -> (f64, f64, f64) {
        let n = (self.x.rows() * self.x.cols()) as f64;
        let (mean, m2, cancelled) = about(self.x, pivot(self.x.row(0)), n);
        if cancelled {
            let (mean, m2, _) = about(self.x, mean, n);
            return (n, mean, m2);
        }
        (n, mean, m2)
    }
}

/// The mean of the first values; a power of two of them and scaled before they are added, so that equal values give
/// themselves and nothing overflows.
#[inline(always)]
fn pivot<T: Element>(row: Row<'_, T>) -> f64 {
    if row.len() < LANES {
        return row.at(0).to_f64();
    }
    let values: [T; LANES] = row.chunk(0);
    total(values.map(|v| v.to_f64() * (1.0 / LANES as f64)))
}

/// Mean and M2 from deviations about `pivot`, and whether M2 lost more than a factor of 3 in accuracy to cancellation.
#[inline(always)]
fn about<T: Element>(x: Tile<'_, T>, pivot: f64, n: f64) -> (f64, f64, bool) {
    let (mut sum, mut squares) = ([0.0; LANES], [0.0; LANES]);
    for r in 0..x.rows() {
        for_each_lane(x.row(r), |lane, v| {
            let d = v.to_f64() - pivot;
            sum[lane] += d;
            squares[lane] += d * d;
        });
    }
    super::close(pivot, total(sum), total(squares), n)
}

/// y = (x − mean)·s + β.
pub(crate) struct AffineRuns<'a, 'b, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) y: &'a TileMut<'b, T>,
    /// Mean (high and low part), s and β.
    pub(crate) coefficients: [T::Wide; 4],
}

impl<T: Element> Kernel for AffineRuns<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let c = self.coefficients;
        // Last row first: after the pass for the statistics it is still in cache.
        for r in (0..self.x.rows()).rev() {
            let (x, y) = (self.x.row(r), self.y.row(r));
            let chunks = y.len() / LANES;
            for k in 0..chunks {
                step_barrier();
                let values: [T; LANES] = x.chunk(k);
                y.set_chunk(k, values.map(|v| super::affine(v, c)));
            }
            for i in chunks * LANES..y.len() {
                y.set(i, super::affine(x.at(i), c));
            }
        }
    }
}

/// Σdy and Σdy·(x − mean) of a block.
pub(crate) struct SumRuns<'a, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) mean: f64,
}

impl<T: Element> Kernel for SumRuns<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run(self) -> (f64, f64) {
        let (mut dbeta, mut products) = ([0.0; LANES], [0.0; LANES]);
        for r in 0..self.dy.rows() {
            let (dy, x) = (self.dy.row(r), self.x.row(r));
            let chunks = dy.len() / LANES;
            for k in 0..chunks {
                step_barrier();
                let (dys, xs): ([T; LANES], [T; LANES]) = (dy.chunk(k), x.chunk(k));
                for lane in 0..LANES {
                    let d = dys[lane].to_f64();
                    dbeta[lane] += d;
                    products[lane] += d * (xs[lane].to_f64() - self.mean);
                }
            }
            for i in chunks * LANES..dy.len() {
                let d = dy.at(i).to_f64();
                dbeta[i % LANES] += d;
                products[i % LANES] += d * (x.at(i).to_f64() - self.mean);
            }
        }
        (total(dbeta), total(products))
    }
}

/// dx from dy, x and the sums of a channel.
pub(crate) struct ApplyRuns<'a, 'b, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) dx: &'a TileMut<'b, T>,
    pub(crate) coefficients: super::Apply,
}

impl<T: Element> Kernel for ApplyRuns<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let c = self.coefficients;
        for r in (0..self.dy.rows()).rev() {
            let (dy, x, dx) = (self.dy.row(r), self.x.row(r), self.dx.row(r));
            let chunks = dx.len() / LANES;
            for k in 0..chunks {
                step_barrier();
                let (dys, xs): ([T; LANES], [T; LANES]) = (dy.chunk(k), x.chunk(k));
                dx.set_chunk::<LANES>(k, std::array::from_fn(|lane| c.dx(dys[lane], xs[lane])));
            }
            for i in chunks * LANES..dx.len() {
                dx.set(i, c.dx(dy.at(i), x.at(i)));
            }
        }
    }
}
