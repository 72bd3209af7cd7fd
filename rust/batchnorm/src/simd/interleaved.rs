//! Kernels over whole rows, in which every column is a channel.
//!
//! Columns are independent of each other, so it does not matter for the bits how a row is cut into vectors or strips.
//! Rows are taken four at a time, and the four added as ((r0 + r1) + (r2 + r3)): sums per column stay in cache, and are
//! loaded and stored once for four rows.

use super::elements::{Vectors, WIDTH};
use super::lanes::Lanes;
use super::map::{Apply, Map, affine, write};
use super::{Kernel, close};
use crate::element::Element;
use crate::view::{Row, RowMut, Tile, TileMut};
use std::array::from_fn;

/// Rows in a step of a sum: its columns are loaded and stored once for all of them.
const ROWS: usize = 4;

/// Adds up to four rows in a fixed tree.
#[inline(always)]
fn pairwise<V: Copy, const R: usize>(d: [V; R], add: impl Fn(V, V) -> V) -> V {
    if R == ROWS { add(add(d[0], d[1]), add(d[2], d[R - 1])) } else { d[0] }
}

/// Eight values of a column array, from `j` on.
#[inline(always)]
fn get<L: Lanes>(values: &[f64], j: usize) -> [L::D; 2] {
    f64::column::<L>(&values[j..j + WIDTH])
}

/// Adds to eight sums, from `j` on.
#[inline(always)]
fn add_to<L: Lanes>(sums: &mut [f64], j: usize, terms: [L::D; 2]) {
    let (eight, _) = sums[j..j + WIDTH].as_chunks_mut::<4>();
    for (sum, term) in eight.iter_mut().zip(terms) {
        *sum = L::put(L::add(L::get(*sum), term));
    }
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
    fn run<L: Lanes>(self) {
        let Self { x, mean, m2, sum } = self;
        let n = x.rows() as f64;
        pivots(x, mean);
        sum.fill(0.0);
        m2.fill(0.0);
        add_deviations::<L, T>(x, mean, sum, m2);
        for j in 0..x.cols() {
            let (m, s, cancelled) = close(mean[j], sum[j], m2[j], n);
            (mean[j], m2[j]) = (m, s);
            if cancelled {
                let (mut sum, mut squares) = ([0.0], [0.0]);
                add_deviations::<L, T>(x.part(0..x.rows(), j..j + 1), &[m], &mut sum, &mut squares);
                (mean[j], m2[j], _) = close(m, sum[0], squares[0], n);
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
    let at = |r: usize, j: usize| {
        let [value] = x.row(r).load(j);
        value.to_f64() * part
    };
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

#[inline(always)]
fn add_deviations<L: Lanes, T: Element>(x: Tile<'_, T>, pivot: &[f64], sum: &mut [f64], squares: &mut [f64]) {
    let whole = x.rows() - x.rows() % ROWS;
    for r in (0..whole).step_by(ROWS) {
        add_deviations_of::<L, T, ROWS>(from_fn(|i| x.row(r + i)), pivot, sum, squares);
    }
    for r in whole..x.rows() {
        add_deviations_of::<L, T, 1>([x.row(r)], pivot, sum, squares);
    }
}

#[inline(always)]
fn add_deviations_of<L: Lanes, T: Element, const R: usize>(
    rows: [Row<'_, T>; R],
    pivot: &[f64],
    sum: &mut [f64],
    squares: &mut [f64],
) {
    let add = |a: [L::D; 2], b: [L::D; 2]| from_fn(|h| L::add(a[h], b[h]));
    let mut j = 0;
    while j + WIDTH <= pivot.len() {
        let about = get::<L>(pivot, j);
        let d: [[L::D; 2]; R] = from_fn(|i| {
            let x = T::load_wide::<L>(&rows[i], j);
            from_fn(|h| L::sub(x[h], about[h]))
        });
        add_to::<L>(sum, j, pairwise(d, add));
        add_to::<L>(squares, j, pairwise(d.map(|d| d.map(|d| L::mul(d, d))), add));
        j += WIDTH;
    }
    for j in j..pivot.len() {
        let d: [f64; R] = from_fn(|i| {
            let [x] = rows[i].load(j);
            x.to_f64() - pivot[j]
        });
        sum[j] += pairwise(d, |a, b| a + b);
        squares[j] += pairwise(d.map(|d| d * d), |a, b| a + b);
    }
}

/// y = (x − mean)·s + β, with coefficients a column.
pub(crate) struct AffineRows<'a, 'b, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) y: &'a TileMut<'b, T>,
    /// Mean (high and low part), s and β of each column; the first [`super::LANES`] columns stand again after the last,
    /// so that a step may cross from one row to the next.
    pub(crate) coefficients: [&'a [T::Wide]; 4],
}

impl<T: Element> Kernel for AffineRows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let period = self.y.cols();
        let flat = AffineRows { x: self.x.flat(), ..self };
        write::<L, T, _>(&self.y.flat(), period, self.y.streaming(), &flat);
    }
}

impl<'a, T: Element> Map<T> for AffineRows<'a, '_, T> {
    type Inputs = Row<'a, T>;

    #[inline(always)]
    fn inputs(&self, r: usize) -> Row<'a, T> {
        self.x.row(r)
    }
    #[inline(always)]
    fn eight<L: Lanes>(&self, x: Row<'a, T>, y: &RowMut<'_, T>, i: usize, j: usize, streaming: bool) {
        let c = self.coefficients.map(|column| T::column::<L>(&column[j..j + WIDTH]));
        T::store::<L>(y, i, T::affine::<L>(T::load::<L>(&x, i), c), streaming);
    }
    #[inline(always)]
    fn one(&self, x: Row<'a, T>, i: usize, j: usize) -> T {
        let [x] = x.load(i);
        affine(x, self.coefficients.map(|column| column[j]))
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
    fn run<L: Lanes>(self) {
        let Self { dy, x, mean, dbeta, products } = self;
        let whole = x.rows() - x.rows() % ROWS;
        for r in (0..whole).step_by(ROWS) {
            let (dys, xs) = (from_fn(|i| dy.row(r + i)), from_fn(|i| x.row(r + i)));
            add_products_of::<L, T, ROWS>(dys, xs, mean, dbeta, products);
        }
        for r in whole..x.rows() {
            add_products_of::<L, T, 1>([dy.row(r)], [x.row(r)], mean, dbeta, products);
        }
    }
}

#[inline(always)]
fn add_products_of<L: Lanes, T: Element, const R: usize>(
    dys: [Row<'_, T>; R],
    xs: [Row<'_, T>; R],
    mean: &[f64],
    dbeta: &mut [f64],
    products: &mut [f64],
) {
    let add = |a: [L::D; 2], b: [L::D; 2]| from_fn(|h| L::add(a[h], b[h]));
    let mut j = 0;
    while j + WIDTH <= mean.len() {
        let about = get::<L>(mean, j);
        let dy: [[L::D; 2]; R] = from_fn(|i| T::load_wide::<L>(&dys[i], j));
        let product = |i: usize| {
            let x = T::load_wide::<L>(&xs[i], j);
            from_fn(|h| L::mul(dy[i][h], L::sub(x[h], about[h])))
        };
        add_to::<L>(dbeta, j, pairwise(dy, add));
        add_to::<L>(products, j, pairwise::<_, R>(from_fn(product), add));
        j += WIDTH;
    }
    for j in j..mean.len() {
        let value = |row: &Row<'_, T>| {
            let [v] = row.load(j);
            v.to_f64()
        };
        dbeta[j] += pairwise::<_, R>(from_fn(|i| value(&dys[i])), |a, b| a + b);
        products[j] += pairwise::<_, R>(from_fn(|i| value(&dys[i]) * (value(&xs[i]) - mean[j])), |a, b| a + b);
    }
}

/// dx from dy, x and the sums of each column.
pub(crate) struct ApplyRows<'a, 'b, T: Element> {
    pub(crate) dy: Tile<'a, T>,
    pub(crate) x: Tile<'a, T>,
    pub(crate) dx: &'a TileMut<'b, T>,
    /// Of each column; the first [`super::LANES`] columns stand again after the last.
    pub(crate) coefficients: Apply<&'a [f64]>,
}

impl<T: Element> Kernel for ApplyRows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let period = self.dx.cols();
        let flat = ApplyRows { dy: self.dy.flat(), x: self.x.flat(), ..self };
        write::<L, T, _>(&self.dx.flat(), period, self.dx.streaming(), &flat);
    }
}

impl<'a, T: Element> Map<T> for ApplyRows<'a, '_, T> {
    type Inputs = (Row<'a, T>, Row<'a, T>);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.dy.row(r), self.x.row(r))
    }
    #[inline(always)]
    fn eight<L: Lanes>(&self, (dy, x): Self::Inputs, dx: &RowMut<'_, T>, i: usize, j: usize, streaming: bool) {
        let c = self.coefficients.map(|column| get::<L>(column, j));
        T::store_wide::<L>(dx, i, c.lanes::<L>(T::load_wide::<L>(&dy, i), T::load_wide::<L>(&x, i)), streaming);
    }
    #[inline(always)]
    fn one(&self, (dy, x): Self::Inputs, i: usize, j: usize) -> T {
        let ([dy], [x]) = (dy.load(i), x.load(i));
        self.coefficients.map(|column| column[j]).one(dy, x)
    }
}
