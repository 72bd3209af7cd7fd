//! Kernels over runs of adjacent values of one channel.

use super::elements::WIDTH;
use super::lanes::Lanes;
use super::map::{Apply, Map, affine, write};
use super::{Kernel, LANES, Sum, close, total};
use crate::element::Element;
use crate::view::{Row, RowMut, Tile, TileMut};
use std::array::from_fn;

/// Elements `i .. i + 16` in float64, as the lanes that they are summed in.
#[inline(always)]
fn sixteen<L: Lanes, T: Element>(row: &Row<'_, T>, i: usize) -> Sum<L> {
    let ([a, b], [c, d]) = (T::load_wide::<L>(row, i), T::load_wide::<L>(row, i + WIDTH));
    [a, b, c, d]
}

#[inline(always)]
fn value<T: Element>(row: &Row<'_, T>, i: usize) -> f64 {
    let [value] = row.load(i);
    value.to_f64()
}

/// What is left of a row after whole sixteens, as lanes: `f` of each element, then zeros, which change no sum.
#[inline(always)]
fn rest<L: Lanes>(start: usize, end: usize, f: impl Fn(usize) -> f64) -> Sum<L> {
    let mut lanes = [[0.0; 4]; LANES / 4];
    for i in start..end {
        lanes[(i - start) / 4][(i - start) % 4] = f(i);
    }
    lanes.map(L::get)
}

/// Two sums in the making.
struct Sums<L: Lanes> {
    first: Sum<L>,
    second: Sum<L>,
}

impl<L: Lanes> Sums<L> {
    #[inline(always)]
    fn new() -> Self {
        Self { first: [L::splat(0.0); LANES / 4], second: [L::splat(0.0); LANES / 4] }
    }

    /// Adds a to the first sum and a·b to the second.
    #[inline(always)]
    fn add(&mut self, a: Sum<L>, b: Sum<L>) {
        self.first = from_fn(|k| L::add(self.first[k], a[k]));
        self.second = from_fn(|k| L::add(self.second[k], L::mul(a[k], b[k])));
    }

    #[inline(always)]
    fn totals(self) -> (f64, f64) {
        (total::<L>(self.first), total::<L>(self.second))
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
    fn run<L: Lanes>(self) -> (f64, f64, f64) {
        let n = (self.x.rows() * self.x.cols()) as f64;
        let (mean, m2, cancelled) = about::<L, T>(self.x, pivot::<L, T>(&self.x.row(0)), n);
        if cancelled {
            let (mean, m2, _) = about::<L, T>(self.x, mean, n);
            return (n, mean, m2);
        }
        (n, mean, m2)
    }
}

/// The mean of the first values; a power of two of them and scaled before they are added, so that equal values give
/// themselves and nothing overflows.
#[inline(always)]
fn pivot<L: Lanes, T: Element>(row: &Row<'_, T>) -> f64 {
    if row.len() < LANES {
        return value(row, 0);
    }
    let part = L::splat(1.0 / LANES as f64);
    total::<L>(sixteen::<L, T>(row, 0).map(|v| L::mul(v, part)))
}

/// Mean and M2 from deviations about `pivot`, and whether M2 cancelled.
#[inline(always)]
fn about<L: Lanes, T: Element>(x: Tile<'_, T>, pivot: f64, n: f64) -> (f64, f64, bool) {
    let mut sums = Sums::<L>::new();
    let about = L::splat(pivot);
    for r in 0..x.rows() {
        let row = x.row(r);
        let whole = row.len() - row.len() % LANES;
        let mut i = 0;
        while i < whole {
            let d = sixteen::<L, T>(&row, i).map(|v| L::sub(v, about));
            sums.add(d, d);
            i += LANES;
        }
        if whole < row.len() {
            let d = rest::<L>(whole, row.len(), |i| value(&row, i) - pivot);
            sums.add(d, d);
        }
    }
    let (sum, squares) = sums.totals();
    close(pivot, sum, squares, n)
}

/// y = (x − mean)·s + β, with coefficients a row.
pub(crate) struct AffineRuns<'a, 'b, T: Element, F> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) y: &'a TileMut<'b, T>,
    /// Mean (high and low part), s and β of a row.
    pub(crate) coefficients: F,
}

impl<T: Element, F: Fn(usize) -> [T::Wide; 4]> Kernel for AffineRuns<'_, '_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        write::<L, T, _>(self.y, usize::MAX, self.y.streaming(), &self);
    }
}

impl<'a, T: Element, F: Fn(usize) -> [T::Wide; 4]> Map<T> for AffineRuns<'a, '_, T, F> {
    type Inputs = (Row<'a, T>, [T::Wide; 4]);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.x.row(r), (self.coefficients)(r))
    }
    #[inline(always)]
    fn eight<L: Lanes>(&self, (x, c): Self::Inputs, y: &RowMut<'_, T>, i: usize, _: usize, streaming: bool) {
        T::store::<L>(y, i, T::affine::<L>(T::load::<L>(&x, i), c.map(T::splat::<L>)), streaming);
    }
    #[inline(always)]
    fn one(&self, (x, c): Self::Inputs, i: usize, _: usize) -> T {
        let [x] = x.load(i);
        affine(x, c)
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
    fn run<L: Lanes>(self) -> (f64, f64) {
        let mut sums = Sums::<L>::new();
        let about = L::splat(self.mean);
        for r in 0..self.dy.rows() {
            let (dy, x) = (self.dy.row(r), self.x.row(r));
            let whole = dy.len() - dy.len() % LANES;
            let mut i = 0;
            while i < whole {
                let deviation = sixteen::<L, T>(&x, i).map(|v| L::sub(v, about));
                sums.add(sixteen::<L, T>(&dy, i), deviation);
                i += LANES;
            }
            if whole < dy.len() {
                let deviation = rest::<L>(whole, x.len(), |i| value(&x, i) - self.mean);
                sums.add(rest::<L>(whole, dy.len(), |i| value(&dy, i)), deviation);
            }
        }
        sums.totals()
    }
}

/// dx from dy, x and the sums of the channel of each row.
pub(crate) struct ApplyRuns<'a, 'b, T: Element, F> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) dx: &'a TileMut<'b, T>,
    pub(crate) coefficients: F,
}

impl<T: Element, F: Fn(usize) -> Apply<f64>> Kernel for ApplyRuns<'_, '_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        write::<L, T, _>(self.dx, usize::MAX, self.dx.streaming(), &self);
    }
}

impl<'a, T: Element, F: Fn(usize) -> Apply<f64>> Map<T> for ApplyRuns<'a, '_, T, F> {
    type Inputs = (Row<'a, T>, Row<'a, T>, Apply<f64>);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.dy.row(r), self.x.row(r), (self.coefficients)(r))
    }
    #[inline(always)]
    fn eight<L: Lanes>(&self, (dy, x, c): Self::Inputs, dx: &RowMut<'_, T>, i: usize, _: usize, streaming: bool) {
        let c = c.map(|v| [L::splat(v); 2]);
        T::store_wide::<L>(dx, i, c.lanes::<L>(T::load_wide::<L>(&dy, i), T::load_wide::<L>(&x, i)), streaming);
    }
    #[inline(always)]
    fn one(&self, (dy, x, c): Self::Inputs, i: usize, _: usize) -> T {
        let ([dy], [x]) = (dy.load(i), x.load(i));
        c.one(dy, x)
    }
}
