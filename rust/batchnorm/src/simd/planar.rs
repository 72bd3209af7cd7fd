//! Kernels over runs of adjacent values of one channel.

use super::elements::WIDTH;
use super::lanes::Lanes;
use super::map::{Apply, Finish, Map, affine, affine_eight, write};
use super::{Kernel, LANES, Sum, close, total};
use crate::element::Element;
use crate::view::{ChunkMut, Row, Tile, TileMut};
use std::array::from_fn;

/// Elements `i .. i + 16` in float64, as the lanes that they are summed in.
#[inline(always)]
fn sixteen<L: Lanes, T: Element>(row: &Row<'_, T>, i: usize) -> Sum<L> {
    let x = row.chunk::<LANES>(i);
    let ([a, b], [c, d]) = (T::load_wide::<L>(x.part(0)), T::load_wide::<L>(x.part(1)));
    [a, b, c, d]
}

/// The last elements of a row, fewer than 16, in the last lanes; the others are as `sixteen` gives them where the row is
/// long enough, and else 0: [`last`] clears them.
#[inline(always)]
fn ending<L: Lanes, T: Element>(row: &Row<'_, T>) -> Sum<L> {
    if row.len() >= LANES {
        return sixteen::<L, T>(row, row.len() - LANES);
    }
    let mut lanes = [0.0; LANES];
    for i in 0..row.len() {
        lanes[LANES - row.len() + i] = row.one(i).to_f64();
    }
    let (lanes, _) = lanes.as_chunks::<4>();
    from_fn(|k| L::get(lanes[k]))
}

/// The last `count` lanes; zeros, which change no sum, in the others.
#[inline(always)]
fn last<L: Lanes>(lanes: Sum<L>, count: usize) -> Sum<L> {
    const MASKS: [u64; 2 * LANES] = {
        let mut masks = [0; 2 * LANES];
        let mut lane = LANES;
        while lane < 2 * LANES {
            masks[lane] = u64::MAX;
            lane += 1;
        }
        masks
    };
    let (masks, _) = MASKS[count..count + LANES].as_chunks::<4>();
    from_fn(|k| L::keep(lanes[k], masks[k]))
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
        return row.one(0).to_f64();
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
        let deviations = |x: Sum<L>| x.map(|v| L::sub(v, about));
        let over = row.len() % LANES;
        for i in (0..row.len() - over).step_by(LANES) {
            let d = deviations(sixteen::<L, T>(&row, i));
            sums.add(d, d);
        }
        if over > 0 {
            let d = last::<L>(deviations(ending::<L, T>(&row)), over);
            sums.add(d, d);
        }
    }
    let (sum, squares) = sums.totals();
    close(pivot, sum, squares, n)
}

/// y = (x − mean)·s + β, finished, with coefficients a row.
pub(crate) struct AffineRuns<'a, 'b, T: Element, F, E> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) y: &'a TileMut<'b, T>,
    /// Mean (high and low part), s and β of a row.
    pub(crate) coefficients: F,
    pub(crate) finish: E,
}

impl<T: Element, F: Fn(usize) -> [T::Wide; 4], E: Finish<T>> Kernel for AffineRuns<'_, '_, T, F, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        write::<L, T, _>(self.y, usize::MAX, self.y.streaming(), &self);
    }
}

impl<'a, T: Element, F: Fn(usize) -> [T::Wide; 4], E: Finish<T>> Map<T> for AffineRuns<'a, '_, T, F, E> {
    type Inputs = (Row<'a, T>, [T::Wide; 4], E::Inputs);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.x.row(r), (self.coefficients)(r), self.finish.inputs(r))
    }
    #[inline(always)]
    fn sixteen<L: Lanes, const S: bool>(
        &self,
        (x, c, rest): Self::Inputs,
        i: usize,
        _: usize,
        y: ChunkMut<'_, T, LANES, S>,
    ) {
        let (x, c) = (x.chunk::<LANES>(i), c.map(T::splat::<L>));
        y.put(0, E::eight::<L>(rest, i, affine_eight::<L, T>(x.part(0), c)));
        y.put(1, E::eight::<L>(rest, i + WIDTH, affine_eight::<L, T>(x.part(1), c)));
    }
    #[inline(always)]
    fn one(&self, (x, c, rest): Self::Inputs, i: usize, _: usize) -> T {
        E::one(rest, i, affine(x.one(i), c))
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
            let deviations = |x: Sum<L>| x.map(|v| L::sub(v, about));
            let over = dy.len() % LANES;
            for i in (0..dy.len() - over).step_by(LANES) {
                sums.add(sixteen::<L, T>(&dy, i), deviations(sixteen::<L, T>(&x, i)));
            }
            if over > 0 {
                let deviations = deviations(ending::<L, T>(&x));
                sums.add(last::<L>(ending::<L, T>(&dy), over), last::<L>(deviations, over));
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
    fn sixteen<L: Lanes, const S: bool>(
        &self,
        (dy, x, c): Self::Inputs,
        i: usize,
        _: usize,
        dx: ChunkMut<'_, T, LANES, S>,
    ) {
        let (dy, x, c) = (dy.chunk::<LANES>(i), x.chunk::<LANES>(i), c.map(|v| [L::splat(v); 2]));
        dx.put(0, c.eight::<L, T>(dy.part(0), x.part(0)));
        dx.put(1, c.eight::<L, T>(dy.part(1), x.part(1)));
    }
    #[inline(always)]
    fn one(&self, (dy, x, c): Self::Inputs, i: usize, _: usize) -> T {
        c.one(dy.one(i), x.one(i))
    }
}
