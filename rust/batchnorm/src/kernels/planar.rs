//! Planar kernels: over runs of adjacent values of one channel.

use super::map::{DxCoefficients, FromNormalized, Kind, Map, normalize_eight, normalize_one, write};
use super::passing::{Known, Passing, Run, no_bounds, passing_eight, passing_one, splat};
use super::{LANES, Sum, close, total};
use crate::element::Element;
use crate::simd::{Kernel, Lanes, WIDTH};
use crate::view::{Chunk, Row, Tile, TileMut};
use std::array::from_fn;

/// Elements `i .. i + 16` in float64, as the sixteen lanes of a sum.
#[inline(always)]
fn sixteen<L: Lanes, T: Element>(run: &impl Run<L, T>, i: usize) -> Sum<L> {
    let [low, high] = run.halves(i);
    let ([a, b], [c, d]) = (T::load_wide::<L>(low), T::load_wide::<L>(high));
    [a, b, c, d]
}

/// The last 16 elements of a run as lanes. A shorter run stands in the last lanes, with 0 in the others.
#[inline(always)]
fn ending<L: Lanes, T: Element>(run: &impl Run<L, T>) -> Sum<L> {
    let len = run.len();
    if len >= LANES {
        return sixteen::<L, T>(run, len - LANES);
    }
    let mut lanes = [0.0; LANES];
    for i in 0..len {
        lanes[LANES - len + i] = run.one(i).to_f64();
    }
    let (lanes, _) = lanes.as_chunks::<4>();
    from_fn(|k| L::get(lanes[k]))
}

/// The last `count` lanes, with zeros in the others, which leave a sum unchanged.
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

/// Two running sums: of a, and of a·b.
#[derive(Clone, Copy)]
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

    /// Adds the deviations of a run from `pivot`, and their squares.
    #[inline(always)]
    fn add_deviations<T: Element>(&mut self, x: &Row<'_, T>, pivot: f64) {
        let (mut sums, about) = (*self, L::splat(pivot));
        let deviations = |x: Sum<L>| x.map(|v| L::sub(v, about));
        let over = x.len() % LANES;
        for i in (0..x.len() - over).step_by(LANES) {
            let d = deviations(sixteen::<L, T>(x, i));
            sums.add(d, d);
        }
        if over > 0 {
            let d = last::<L>(deviations(ending::<L, T>(x)), over);
            sums.add(d, d);
        }
        *self = sums;
    }

    /// Mean and M2 of the values whose deviations from `pivot` were added, and whether a second pass is needed.
    #[inline(always)]
    fn close(self, pivot: f64, n: f64) -> (f64, f64, bool) {
        let (sum, squares) = self.totals();
        close(pivot, sum, squares, n)
    }

    /// Adds dy, and dy·(x − mean), of each element of a run.
    #[inline(always)]
    fn add_products<T: Element>(&mut self, dy: &impl Run<L, T>, x: &Row<'_, T>, mean: f64) {
        let (mut sums, about) = (*self, L::splat(mean));
        let deviations = |x: Sum<L>| x.map(|v| L::sub(v, about));
        let over = dy.len() % LANES;
        for i in (0..dy.len() - over).step_by(LANES) {
            sums.add(sixteen::<L, T>(dy, i), deviations(sixteen::<L, T>(x, i)));
        }
        if over > 0 {
            let deviations = deviations(ending::<L, T>(x));
            sums.add(last::<L>(ending::<L, T>(dy), over), last::<L>(deviations, over));
        }
        *self = sums;
    }
}

/// Largest number of adjacent channels whose runs are summed together, so that memory is read in order. Their sums still
/// fit in the first-level cache.
pub(crate) const TOGETHER: usize = 32;

/// Count, mean and M2 of one block in each of several adjacent channels.
pub(crate) struct MomentRuns<'a, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) channels: usize,
}

impl<T: Element> Kernel for MomentRuns<'_, T> {
    type Output = Vec<(f64, f64, f64)>;

    /// Sums deviations from a pivot p near the mean, in one pass: with d = x − p, mean = p + Σd/n and M2 = Σd² − (Σd)²/n.
    ///
    /// If the pivot turns out to be far from the mean, that difference would cancel, and a second pass takes the mean as
    /// pivot. If all values are equal, the pivot is that value exactly, so M2 is 0.
    #[inline(always)]
    fn run<L: Lanes>(self) -> Self::Output {
        match self.channels {
            1 => self.moments::<L, 1>(),
            _ => self.moments::<L, TOGETHER>(),
        }
    }
}

impl<T: Element> MomentRuns<'_, T> {
    /// The moments of at most `MOST` channels.
    #[inline(always)]
    fn moments<L: Lanes, const MOST: usize>(self) -> Vec<(f64, f64, f64)> {
        let Self { x, channels } = self;
        let run = x.cols() / channels;
        let n = (x.rows() * run) as f64;
        let (mut pivots, mut sums) = ([0.0; MOST], [Sums::<L>::new(); MOST]);
        for (c, pivot) in pivots[..channels].iter_mut().enumerate() {
            *pivot = pivot_of::<L, T>(&x.row(0).part(c * run, run));
        }
        for r in 0..x.rows() {
            let row = x.row(r);
            for (c, (sums, pivot)) in sums[..channels].iter_mut().zip(pivots).enumerate() {
                sums.add_deviations(&row.part(c * run, run), pivot);
            }
        }
        let mut moments = Vec::with_capacity(channels);
        for c in 0..channels {
            let (mut mean, mut m2, cancelled) = sums[c].close(pivots[c], n);
            if cancelled {
                let mut sums = Sums::<L>::new();
                for r in 0..x.rows() {
                    sums.add_deviations(&x.row(r).part(c * run, run), mean);
                }
                (mean, m2, _) = sums.close(mean, n);
            }
            moments.push((n, mean, m2));
        }
        moments
    }
}

/// The pivot of a run: the mean of its first 16 values, or its first value if it is shorter.
///
/// The number of values is a power of two, and they are scaled before they are added: so the mean of equal values is
/// exact, and nothing overflows.
#[inline(always)]
fn pivot_of<L: Lanes, T: Element>(run: &Row<'_, T>) -> f64 {
    if run.len() < LANES {
        return run.one(0).to_f64();
    }
    let part = L::splat(1.0 / LANES as f64);
    total::<L>(sixteen::<L, T>(run, 0).map(|v| L::mul(v, part)))
}

/// Normalizes rows of one channel each: `then` computes the result from v = (x − mean)·s + β.
pub(crate) struct NormalizeRuns<'a, 'b, T: Element, F, E> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) y: &'a TileMut<'b, T>,
    /// Mean (high and low part), s and β of row `r`.
    pub(crate) coefficients: F,
    pub(crate) then: E,
}

impl<T: Element, F: Fn(usize) -> [T::Wide; 4], E: FromNormalized<T>> Kernel for NormalizeRuns<'_, '_, T, F, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        write::<L, T, _>(self.y, usize::MAX, E::STREAMS && self.y.streaming(), &self);
    }
}

impl<'a, T: Element, F: Fn(usize) -> [T::Wide; 4], E: FromNormalized<T>> Map<T> for NormalizeRuns<'a, '_, T, F, E> {
    type Inputs = (Row<'a, T>, [T::Wide; 4], E::Inputs);
    type Chunk = (Chunk<'a, T, LANES>, E::Chunk);
    type Columns<L: Lanes> = [T::Vector<L>; 4];

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.x.row(r), (self.coefficients)(r), self.then.inputs(r))
    }
    #[inline(always)]
    fn kind((_, _, rest): Self::Inputs) -> Kind {
        E::kind(rest)
    }
    #[inline(always)]
    fn of_kind<const KIND: u8>((x, c, rest): Self::Inputs) -> Self::Inputs {
        (x, c, E::of_kind::<KIND>(rest))
    }
    #[inline(always)]
    fn chunk((x, _, rest): Self::Inputs, i: usize) -> Self::Chunk {
        (x.chunk(i), E::chunk(rest, i))
    }
    #[inline(always)]
    fn columns<L: Lanes>(&self, (_, c, _): Self::Inputs, _: usize) -> Self::Columns<L> {
        c.map(T::splat::<L>)
    }
    #[inline(always)]
    fn eight<L: Lanes>((x, rest): Self::Chunk, half: usize, c: Self::Columns<L>) -> [T; WIDTH] {
        E::eight::<L>(rest, half, normalize_eight::<L, T>(x.part(half), c))
    }
    #[inline(always)]
    fn one(&self, (x, c, rest): Self::Inputs, i: usize, _: usize) -> T {
        E::one(rest, i, normalize_one(x.one(i), c))
    }
}

/// Σdy and Σdy·(x − mean) of one block in each of several adjacent channels.
pub(crate) struct GradientSumRuns<'a, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    /// Mean of each channel.
    pub(crate) mean: &'a [f64],
    /// The least and the largest x of each channel at which dy counts; without them all of it does.
    pub(crate) bounds: Option<[&'a [T]; 2]>,
}

impl<T: Element> Kernel for GradientSumRuns<'_, T> {
    type Output = Vec<(f64, f64)>;

    #[inline(always)]
    fn run<L: Lanes>(self) -> Self::Output {
        match (self.mean.len(), self.bounds) {
            (1, None) => self.sums::<L, 1, false>(|_| no_bounds()),
            (1, Some([least, most])) => self.sums::<L, 1, true>(|c| [least[c], most[c]]),
            (_, None) => self.sums::<L, TOGETHER, false>(|_| no_bounds()),
            (_, Some([least, most])) => self.sums::<L, TOGETHER, true>(|c| [least[c], most[c]]),
        }
    }
}

impl<T: Element> GradientSumRuns<'_, T> {
    /// The sums of at most `MOST` channels.
    #[inline(always)]
    fn sums<L: Lanes, const MOST: usize, const BOUNDED: bool>(
        self,
        bounds: impl Fn(usize) -> [T; 2],
    ) -> Vec<(f64, f64)> {
        let Self { dy, x, mean, .. } = self;
        let run = x.cols() / mean.len();
        let mut sums = [Sums::<L>::new(); MOST];
        let sums = &mut sums[..mean.len()];
        for r in 0..x.rows() {
            let (dy, x) = (dy.row(r), x.row(r));
            for (c, (sums, &mean)) in sums.iter_mut().zip(mean).enumerate() {
                let (dy, x) = (dy.part(c * run, run), x.part(c * run, run));
                sums.add_products(&Passing::<L, T, BOUNDED>::new(dy, x, bounds(c)), &x, mean);
            }
        }
        let mut totals = Vec::with_capacity(mean.len());
        for sums in sums {
            totals.push(sums.totals());
        }
        totals
    }
}

/// Computes dx from dy and x in rows of one channel each.
pub(crate) struct DxRuns<'a, 'b, T: Element, F, B> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) dx: &'a TileMut<'b, T>,
    /// Coefficients of row `r`.
    pub(crate) coefficients: F,
    /// The least and the largest x of row `r` at which dy counts; without them all of it does.
    pub(crate) bounds: Option<B>,
}

impl<T, F, B> Kernel for DxRuns<'_, '_, T, F, B>
where
    T: Element,
    F: Fn(usize) -> DxCoefficients<f64>,
    B: Fn(usize) -> [T; 2],
{
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.bounds {
            None => write::<L, T, _>(self.dx, usize::MAX, self.dx.streaming(), &Known::<_, false>(&self)),
            Some(_) => write::<L, T, _>(self.dx, usize::MAX, self.dx.streaming(), &Known::<_, true>(&self)),
        }
    }
}

impl<'a, T, F, B, const BOUNDED: bool> Map<T> for Known<'_, DxRuns<'a, '_, T, F, B>, BOUNDED>
where
    T: Element,
    F: Fn(usize) -> DxCoefficients<f64>,
    B: Fn(usize) -> [T; 2],
{
    type Inputs = (Row<'a, T>, Row<'a, T>, DxCoefficients<f64>, [T; 2]);
    type Chunk = (Chunk<'a, T, LANES>, Chunk<'a, T, LANES>);
    type Columns<L: Lanes> = (DxCoefficients<[L::D; 2]>, [T::Compared<L>; 2]);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        let Self(DxRuns { dy, x, coefficients, bounds, .. }) = self;
        (dy.row(r), x.row(r), coefficients(r), bounds.as_ref().map_or(no_bounds(), |bounds| bounds(r)))
    }
    #[inline(always)]
    fn chunk((dy, x, ..): Self::Inputs, i: usize) -> Self::Chunk {
        (dy.chunk(i), x.chunk(i))
    }
    #[inline(always)]
    fn columns<L: Lanes>(&self, (_, _, coefficients, bounds): Self::Inputs, _: usize) -> Self::Columns<L> {
        (coefficients.map(|v| [L::splat(v); 2]), splat::<L, T>(bounds))
    }
    #[inline(always)]
    fn eight<L: Lanes>((dy, x): Self::Chunk, half: usize, (coefficients, bounds): Self::Columns<L>) -> [T; WIDTH] {
        let x = x.part(half);
        coefficients.eight::<L, T>(passing_eight::<L, T, BOUNDED>(dy.part(half), x, bounds), x)
    }
    #[inline(always)]
    fn one(&self, (dy, x, coefficients, bounds): Self::Inputs, i: usize, _: usize) -> T {
        let x = x.one(i);
        coefficients.one(passing_one::<T, BOUNDED>(dy.one(i), x, bounds), x)
    }
}
