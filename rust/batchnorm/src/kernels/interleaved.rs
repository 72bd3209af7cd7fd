//! Interleaved kernels: over whole rows, in which every column is a channel.
//!
//! Columns are independent of each other, so the bits do not depend on how a row is cut into vectors or strips. Rows are
//! taken four at a time and added as ((r0 + r1) + (r2 + r3)): the sum of each column stays in cache, and is loaded and
//! stored once for four rows.

use super::map::{DxCoefficients, FromNormalized, Kind, Map, normalize_eight, normalize_one, write};
use super::passing::{Known, no_bounds, passing_eight, passing_one};
use super::{LANES, close};
use crate::element::Element;
use crate::simd::{Kernel, Lanes, Vectors, WIDTH};
use crate::view::{Chunk, LINE, Rect, Row, Tile, TileMut};
use std::array::from_fn;

/// Number of rows that are added in one step: the sums are loaded and stored once for all of them. Rows that are given in
/// parts are summed in the same order as if given at once, provided that each part is a multiple of this number.
pub(crate) const ROWS: usize = 4;
/// Smallest distance, in bytes, by which memory is prefetched ahead of its use.
const AHEAD: usize = 4096;

/// Adds four rows in a fixed tree, or returns the one that is given.
#[inline(always)]
fn pairwise<V: Copy, const R: usize>(d: [V; R], add: impl Fn(V, V) -> V) -> V {
    if R == ROWS { add(add(d[0], d[1]), add(d[2], d[R - 1])) } else { d[0] }
}

#[inline(always)]
fn add_eight<L: Lanes>(a: [L::D; 2], b: [L::D; 2]) -> [L::D; 2] {
    from_fn(|h| L::add(a[h], b[h]))
}

/// Columns `j .. j + 8` of a row in float64.
#[inline(always)]
fn eight<L: Lanes, T: Element>(row: &Row<'_, T>, j: usize) -> [L::D; 2] {
    T::load_wide::<L>(row.chunk::<WIDTH>(j).part(0))
}

/// Adds eight terms to eight sums.
#[inline(always)]
fn add_to<L: Lanes>(sums: &mut [f64; WIDTH], terms: [L::D; 2]) {
    *sums = f64::store_wide::<L>(add_eight::<L>(f64::load_wide::<L>(*sums), terms));
}

/// How memory is prefetched. The prefetchers of processors do not recognize that four rows are read at a time. Adjacent
/// rows are prefetched in memory order, which is three times faster than column by column.
#[derive(Clone, Copy)]
struct Ahead {
    elements: usize,
    adjacent: bool,
}

impl Ahead {
    #[inline(always)]
    fn of<T: Element>(x: &Tile<'_, T>) -> Self {
        let step = ROWS * x.stride();
        Self { elements: step.max(AHEAD / size_of::<T>()), adjacent: x.stride() == x.cols() }
    }

    /// Prefetches as much memory as one step over columns `j .. j + 8` loads.
    #[inline(always)]
    fn prefetch<T: Element, const R: usize>(self, rows: &[Row<'_, T>; R], j: usize) {
        if R < ROWS {
            return;
        }
        let line = LINE / size_of::<T>();
        if self.adjacent {
            (0..ROWS * WIDTH).step_by(line).for_each(|i| rows[0].prefetch(self.elements + ROWS * j + i));
        } else if j.is_multiple_of(line) {
            rows.iter().for_each(|row| row.prefetch(self.elements + j));
        }
    }
}

/// Mean and M2 of each column of a block.
pub(crate) struct MomentRows<'a, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) mean: &'a mut [f64],
    pub(crate) m2: &'a mut [f64],
    /// Scratch memory: one sum per column.
    pub(crate) sum: &'a mut [f64],
}

impl<T: Element> Kernel for MomentRows<'_, T> {
    type Output = ();

    /// Sums deviations from a pivot, as in [`super::MomentRuns`], with a second pass for columns whose pivot was far off.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { x, mean, m2, sum } = self;
        let n = x.rows() as f64;
        pivots::<L, T>(x, mean);
        sum.fill(0.0);
        m2.fill(0.0);
        add_deviations::<L, T>(x, mean, sum, m2);
        let mut any = false;
        for ((mean, m2), sum) in mean.iter_mut().zip(m2.iter_mut()).zip(sum.iter_mut()) {
            let cancelled;
            (*mean, *m2, cancelled) = close(*mean, *sum, *m2, n);
            *sum = f64::from(u8::from(cancelled));
            any |= cancelled;
        }
        if !any {
            return;
        }
        for j in (0..x.cols()).filter(|&j| sum[j] != 0.0) {
            let (mut sum, mut squares) = ([0.0], [0.0]);
            add_deviations::<L, T>(
                x.part(&Rect { rows: 0..x.rows(), cols: j..j + 1 }),
                &mean[j..=j],
                &mut sum,
                &mut squares,
            );
            (mean[j], m2[j], _) = close(mean[j], sum[0], squares[0], n);
        }
    }
}

/// The pivot of each column: the mean of its first 1, 2, 4 or 8 values, scaled before they are added.
#[inline(always)]
fn pivots<L: Lanes, T: Element>(x: Tile<'_, T>, pivot: &mut [f64]) {
    match x.rows() {
        0 | 1 => pivots_of::<L, T, 1>(x, pivot),
        2 | 3 => pivots_of::<L, T, 2>(x, pivot),
        4..8 => pivots_of::<L, T, 4>(x, pivot),
        _ => pivots_of::<L, T, 8>(x, pivot),
    }
}

#[inline(always)]
fn pivots_of<L: Lanes, T: Element, const R: usize>(x: Tile<'_, T>, pivot: &mut [f64]) {
    let rows: [Row<'_, T>; R] = from_fn(|r| x.row(r));
    let part = 1.0 / R as f64;
    let (eights, rest) = pivot.as_chunks_mut::<WIDTH>();
    let start = eights.len() * WIDTH;
    for (k, pivot) in eights.iter_mut().enumerate() {
        let scaled: [_; R] = from_fn(|r| eight::<L, T>(&rows[r], k * WIDTH).map(|v| L::mul(v, L::splat(part))));
        *pivot = f64::store_wide::<L>(halves(scaled, add_eight::<L>));
    }
    for (k, pivot) in rest.iter_mut().enumerate() {
        *pivot = halves::<_, R>(from_fn(|r| rows[r].one(start + k).to_f64() * part), |a, b| a + b);
    }
}

/// Adds R = 2^k values in pairs, ((0+1)+(2+3)) + ((4+5)+(6+7)), so that equal values add up without rounding.
#[inline(always)]
fn halves<V: Copy, const R: usize>(mut values: [V; R], add: impl Fn(V, V) -> V) -> V {
    let mut n = R;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            values[i] = add(values[2 * i], values[2 * i + 1]);
        }
    }
    values[0]
}

#[inline(always)]
fn add_deviations<L: Lanes, T: Element>(x: Tile<'_, T>, pivot: &[f64], sum: &mut [f64], squares: &mut [f64]) {
    let (whole, ahead) = (x.rows() - x.rows() % ROWS, Ahead::of(&x));
    for r in (0..whole).step_by(ROWS) {
        add_deviations_of::<L, T, ROWS>(from_fn(|i| x.row(r + i)), ahead, pivot, sum, squares);
    }
    for r in whole..x.rows() {
        add_deviations_of::<L, T, 1>([x.row(r)], ahead, pivot, sum, squares);
    }
}

#[inline(always)]
fn add_deviations_of<L: Lanes, T: Element, const R: usize>(
    rows: [Row<'_, T>; R],
    ahead: Ahead,
    pivot: &[f64],
    sum: &mut [f64],
    squares: &mut [f64],
) {
    let start = pivot.len() / WIDTH * WIDTH;
    let eights = pivot.as_chunks().0.iter().zip(sum.as_chunks_mut().0).zip(squares.as_chunks_mut().0);
    for (k, ((pivot, sum), squares)) in eights.enumerate() {
        ahead.prefetch(&rows, k * WIDTH);
        let about = f64::load_wide::<L>(*pivot);
        let d: [[L::D; 2]; R] = from_fn(|i| {
            let x = eight::<L, T>(&rows[i], k * WIDTH);
            from_fn(|h| L::sub(x[h], about[h]))
        });
        add_to::<L>(sum, pairwise(d, add_eight::<L>));
        add_to::<L>(squares, pairwise(d.map(|d| d.map(|d| L::mul(d, d))), add_eight::<L>));
    }
    for j in start..pivot.len() {
        let d: [f64; R] = from_fn(|i| rows[i].one(j).to_f64() - pivot[j]);
        sum[j] += pairwise(d, |a, b| a + b);
        squares[j] += pairwise(d.map(|d| d * d), |a, b| a + b);
    }
}

/// The numbers of columns `j .. j + 8`.
#[inline(always)]
fn columns<W: Copy>(numbers: &[W], j: usize) -> [W; WIDTH] {
    numbers[j..j + WIDTH].as_chunks().0[0]
}

/// Normalizes rows whose columns are channels: `then` computes the result from v = (x − mean)·s + β.
pub(crate) struct NormalizeRows<'a, 'b, T: Element, E> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) y: &'a TileMut<'b, T>,
    /// Mean (high and low part, which may be missing where it is not used), s and β of each column. The first
    /// [`super::LANES`] are repeated after the last, so that a step may cross from one row to the next.
    pub(crate) coefficients: [&'a [T::Wide]; 4],
    pub(crate) then: E,
}

impl<T: Element, E: FromNormalized<T>> Kernel for NormalizeRows<'_, '_, T, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let period = self.y.cols();
        let flat = NormalizeRows { x: self.x.flat(), then: self.then.flat(), ..self };
        write::<L, T, _>(&self.y.flat_with(&self.x), period, E::STREAMS && self.y.streaming(), &flat);
    }
}

impl<'a, T: Element, E: FromNormalized<T>> Map<T> for NormalizeRows<'a, '_, T, E> {
    type Inputs = (Row<'a, T>, E::Inputs);
    type Chunk = (Chunk<'a, T, LANES>, E::Chunk);
    type Columns<L: Lanes> = [T::Vector<L>; 4];

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.x.row(r), self.then.inputs(r))
    }
    #[inline(always)]
    fn kind((_, rest): Self::Inputs) -> Kind {
        E::kind(rest)
    }
    #[inline(always)]
    fn of_kind<const KIND: u8>((x, rest): Self::Inputs) -> Self::Inputs {
        (x, E::of_kind::<KIND>(rest))
    }
    #[inline(always)]
    fn chunk((x, rest): Self::Inputs, i: usize) -> Self::Chunk {
        (x.chunk(i), E::chunk(rest, i))
    }
    #[inline(always)]
    fn prefetch((x, rest): Self::Inputs, i: usize) {
        x.prefetch(i);
        E::prefetch(rest, i);
    }
    #[inline(always)]
    fn columns<L: Lanes>(&self, _: Self::Inputs, j: usize) -> Self::Columns<L> {
        let [high, low, scale, beta] = self.coefficients;
        let high = T::column::<L>(columns(high, j));
        let low = if T::SPLIT_MEAN { T::column::<L>(columns(low, j)) } else { high };
        [high, low, T::column::<L>(columns(scale, j)), T::column::<L>(columns(beta, j))]
    }
    #[inline(always)]
    fn eight<L: Lanes>((x, rest): Self::Chunk, half: usize, c: Self::Columns<L>) -> [T; WIDTH] {
        E::eight::<L>(rest, half, normalize_eight::<L, T>(x.part(half), c))
    }
    #[inline(always)]
    fn one(&self, (x, rest): Self::Inputs, i: usize, j: usize) -> T {
        let [high, low, scale, beta] = self.coefficients;
        let low = if T::SPLIT_MEAN { low[j] } else { high[j] };
        E::one(rest, i, normalize_one(x.one(i), [high[j], low, scale[j], beta[j]]))
    }
}

/// Adds Σdy and Σdy·(x − mean) of each column of a block.
pub(crate) struct GradientSumRows<'a, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) mean: &'a [f64],
    /// The least and the largest x of each column at which dy counts; without them all of it does.
    pub(crate) bounds: Option<[&'a [T]; 2]>,
    pub(crate) dbeta: &'a mut [f64],
    pub(crate) products: &'a mut [f64],
}

impl<T: Element> Kernel for GradientSumRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.bounds {
            None => self.sums::<L, false>([&[], &[]]),
            Some(bounds) => self.sums::<L, true>(bounds),
        }
    }
}

impl<T: Element> GradientSumRows<'_, T> {
    #[inline(always)]
    fn sums<L: Lanes, const BOUNDED: bool>(self, bounds: [&[T]; 2]) {
        let Self { dy, x, mean, dbeta, products, .. } = self;
        let (whole, ahead) = (x.rows() - x.rows() % ROWS, Ahead::of(&x));
        for r in (0..whole).step_by(ROWS) {
            let (dys, xs) = (from_fn(|i| dy.row(r + i)), from_fn(|i| x.row(r + i)));
            add_products_of::<L, T, ROWS, BOUNDED>(dys, xs, ahead, mean, bounds, dbeta, products);
        }
        for r in whole..x.rows() {
            add_products_of::<L, T, 1, BOUNDED>([dy.row(r)], [x.row(r)], ahead, mean, bounds, dbeta, products);
        }
    }
}

/// The bounds of columns `j .. j + 8`.
#[inline(always)]
fn bounds_of<L: Lanes, T: Element, const BOUNDED: bool>([least, most]: [&[T]; 2], j: usize) -> [T::Compared<L>; 2] {
    let of = |bounds| if BOUNDED { columns(bounds, j) } else { [T::from_f64(0.0); WIDTH] };
    [T::compared::<L>(of(least)), T::compared::<L>(of(most))]
}

#[inline(always)]
fn add_products_of<L: Lanes, T: Element, const R: usize, const BOUNDED: bool>(
    dys: [Row<'_, T>; R],
    xs: [Row<'_, T>; R],
    ahead: Ahead,
    mean: &[f64],
    bounds: [&[T]; 2],
    dbeta: &mut [f64],
    products: &mut [f64],
) {
    let start = mean.len() / WIDTH * WIDTH;
    let eights = mean.as_chunks().0.iter().zip(dbeta.as_chunks_mut().0).zip(products.as_chunks_mut().0);
    for (k, ((mean, dbeta), products)) in eights.enumerate() {
        let j = k * WIDTH;
        ahead.prefetch(&dys, j);
        ahead.prefetch(&xs, j);
        let (about, bounds) = (f64::load_wide::<L>(*mean), bounds_of::<L, T, BOUNDED>(bounds, j));
        let (mut dy, mut product) = ([[L::splat(0.0); 2]; R], [[L::splat(0.0); 2]; R]);
        for i in 0..R {
            let x = xs[i].chunk::<WIDTH>(j).part(0);
            dy[i] = T::load_wide::<L>(passing_eight::<L, T, BOUNDED>(dys[i].chunk::<WIDTH>(j).part(0), x, bounds));
            let x = T::load_wide::<L>(x);
            product[i] = from_fn(|h| L::mul(dy[i][h], L::sub(x[h], about[h])));
        }
        add_to::<L>(dbeta, pairwise(dy, add_eight::<L>));
        add_to::<L>(products, pairwise(product, add_eight::<L>));
    }
    for j in start..mean.len() {
        let bounds = if BOUNDED { bounds.map(|bounds| bounds[j]) } else { no_bounds() };
        let dy: [f64; R] = from_fn(|i| passing_one::<T, BOUNDED>(dys[i].one(j), xs[i].one(j), bounds).to_f64());
        dbeta[j] += pairwise(dy, |a, b| a + b);
        products[j] += pairwise::<_, R>(from_fn(|i| dy[i] * (xs[i].one(j).to_f64() - mean[j])), |a, b| a + b);
    }
}

/// Computes dx from dy and x in rows whose columns are channels.
pub(crate) struct DxRows<'a, 'b, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) dx: &'a TileMut<'b, T>,
    /// Coefficients of each column. The first [`super::LANES`] are repeated after the last.
    pub(crate) coefficients: DxCoefficients<&'a [f64]>,
    /// The least and the largest x of each column at which dy counts, with the first repeated; without them all of it does.
    pub(crate) bounds: Option<[&'a [T]; 2]>,
}

impl<T: Element> Kernel for DxRows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let period = self.dx.cols();
        let flat = DxRows { dy: self.dy.flat(), x: self.x.flat(), ..self };
        match self.bounds {
            None => write::<L, T, _>(&self.dx.flat(), period, self.dx.streaming(), &Known::<_, false>(&flat)),
            Some(_) => write::<L, T, _>(&self.dx.flat(), period, self.dx.streaming(), &Known::<_, true>(&flat)),
        }
    }
}

impl<'a, T: Element, const BOUNDED: bool> Map<T> for Known<'_, DxRows<'a, '_, T>, BOUNDED> {
    type Inputs = (Row<'a, T>, Row<'a, T>);
    type Chunk = (Chunk<'a, T, LANES>, Chunk<'a, T, LANES>);
    type Columns<L: Lanes> = (DxCoefficients<[L::D; 2]>, [T::Compared<L>; 2]);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.0.dy.row(r), self.0.x.row(r))
    }
    #[inline(always)]
    fn chunk((dy, x): Self::Inputs, i: usize) -> Self::Chunk {
        (dy.chunk(i), x.chunk(i))
    }
    #[inline(always)]
    fn prefetch((dy, x): Self::Inputs, i: usize) {
        dy.prefetch(i);
        x.prefetch(i);
    }
    #[inline(always)]
    fn columns<L: Lanes>(&self, _: Self::Inputs, j: usize) -> Self::Columns<L> {
        let DxRows { coefficients, bounds, .. } = self.0;
        let bounds = bounds_of::<L, T, BOUNDED>(bounds.unwrap_or([&[], &[]]), j);
        (coefficients.map(|numbers| f64::load_wide::<L>(columns(numbers, j))), bounds)
    }
    #[inline(always)]
    fn eight<L: Lanes>((dy, x): Self::Chunk, half: usize, (coefficients, bounds): Self::Columns<L>) -> [T; WIDTH] {
        let x = x.part(half);
        coefficients.eight::<L, T>(passing_eight::<L, T, BOUNDED>(dy.part(half), x, bounds), x)
    }
    #[inline(always)]
    fn one(&self, (dy, x): Self::Inputs, i: usize, j: usize) -> T {
        let bounds = self.0.bounds.map_or(no_bounds(), |bounds| bounds.map(|bounds| bounds[j]));
        let x = x.one(i);
        let coefficients = self.0.coefficients.map(|numbers| numbers[j]);
        coefficients.one(passing_one::<T, BOUNDED>(dy.one(i), x, bounds), x)
    }
}
