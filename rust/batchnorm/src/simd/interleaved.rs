//! Kernels over whole rows, in which every column is a channel.
//!
//! Columns are independent of each other, so it does not matter for the bits how a row is cut into vectors or strips.
//! Rows are taken four at a time, and the four added as ((r0 + r1) + (r2 + r3)): sums per column stay in cache, and are
//! loaded and stored once for four rows.

use super::{Apply, Kernel, affine, step_barrier};
use crate::element::Element;
use crate::view::{Row, RowMut, Tile, TileMut};

/// Columns in a step.
const STEP: usize = 8;
/// Rows in a step.
const ROWS: usize = 4;

/// A slice in whole steps of `N`; the rest is left out.
#[inline(always)]
fn steps<V, const N: usize>(values: &[V]) -> &[[V; N]] {
    values.as_chunks().0
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

/// Applies an operation lane by lane. Sums of rows are written so, and not as loops over lanes around sums of rows, since
/// the compiler would else gather the four rows of one lane into a register.
#[inline(always)]
fn zip<const N: usize>(a: [f64; N], b: [f64; N], f: impl Fn(f64, f64) -> f64) -> [f64; N] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

/// Adds up to four rows in a fixed tree.
#[inline(always)]
fn pairwise<const N: usize, const R: usize>(d: [[f64; N]; R]) -> [f64; N] {
    let add = |a, b| zip(a, b, |a, b| a + b);
    if R == ROWS { add(add(d[0], d[1]), add(d[2], d[R - 1])) } else { d[0] }
}

#[inline(always)]
fn wide<T: Element, const N: usize>(values: [T; N]) -> [f64; N] {
    values.map(T::to_f64)
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
    let rows = std::array::from_fn(|i| x.row(r + i));
    let whole = x.cols() - x.cols() % STEP;
    for k in 0..whole / STEP {
        step_barrier();
        add_step::<T, STEP, R>(rows, k, pivot, sum, squares);
    }
    for j in whole..x.cols() {
        add_step::<T, 1, R>(rows, j, pivot, sum, squares);
    }
}

/// Columns `k·N .. (k+1)·N` of `R` rows.
#[inline(always)]
fn add_step<T: Element, const N: usize, const R: usize>(
    rows: [Row<'_, T>; R],
    k: usize,
    pivot: &[f64],
    sum: &mut [f64],
    squares: &mut [f64],
) {
    let pivot = steps::<_, N>(pivot)[k];
    let (sum, squares) = (&mut sum.as_chunks_mut().0[k], &mut squares.as_chunks_mut().0[k]);
    let d: [[f64; N]; R] = std::array::from_fn(|i| zip(wide(rows[i].chunk(k)), pivot, |v, p| v - p));
    *sum = zip(*sum, pairwise(d), |a, b| a + b);
    *squares = zip(*squares, pairwise(d.map(|d| zip(d, d, |a, b| a * b))), |a, b| a + b);
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
        let whole = self.y.cols() - self.y.cols() % STEP;
        for r in 0..self.x.rows() {
            let (x, y) = (self.x.row(r), self.y.row(r));
            for k in 0..whole / STEP {
                step_barrier();
                affine_step::<T, STEP>(x, &y, k, self.coefficients);
            }
            for j in whole..y.len() {
                affine_step::<T, 1>(x, &y, j, self.coefficients);
            }
        }
    }
}

#[inline(always)]
fn affine_step<T: Element, const N: usize>(x: Row<'_, T>, y: &RowMut<'_, T>, k: usize, columns: [&[T::Wide]; 4]) {
    let values: [T; N] = x.chunk(k);
    let [high, low, s, beta] = columns.map(|column| &steps::<_, N>(column)[k]);
    y.set_chunk::<N>(k, std::array::from_fn(|i| affine(values[i], [high[i], low[i], s[i], beta[i]])));
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
    let dys = std::array::from_fn(|i| dy.row(r + i));
    let xs = std::array::from_fn(|i| x.row(r + i));
    let whole = x.cols() - x.cols() % STEP;
    for k in 0..whole / STEP {
        step_barrier();
        add_products_step::<T, STEP, R>(dys, xs, k, mean, dbeta, products);
    }
    for j in whole..x.cols() {
        add_products_step::<T, 1, R>(dys, xs, j, mean, dbeta, products);
    }
}

/// Columns `k·N .. (k+1)·N` of `R` rows.
#[inline(always)]
fn add_products_step<T: Element, const N: usize, const R: usize>(
    dys: [Row<'_, T>; R],
    xs: [Row<'_, T>; R],
    k: usize,
    mean: &[f64],
    dbeta: &mut [f64],
    products: &mut [f64],
) {
    let mean = steps::<_, N>(mean)[k];
    let (dbeta, products) = (&mut dbeta.as_chunks_mut().0[k], &mut products.as_chunks_mut().0[k]);
    let dy: [[f64; N]; R] = std::array::from_fn(|i| wide(dys[i].chunk(k)));
    let product = |i: usize| {
        let deviation = zip(wide(xs[i].chunk(k)), mean, |v, mean| v - mean);
        zip(dy[i], deviation, |a, b| a * b)
    };
    *dbeta = zip(*dbeta, pairwise(dy), |a, b| a + b);
    *products = zip(*products, pairwise::<N, R>(std::array::from_fn(product)), |a, b| a + b);
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
        let whole = self.dx.cols() - self.dx.cols() % STEP;
        for r in 0..self.dy.rows() {
            let (dy, x, dx) = (self.dy.row(r), self.x.row(r), self.dx.row(r));
            for k in 0..whole / STEP {
                step_barrier();
                apply_step::<T, STEP>(dy, x, &dx, k, self.coefficients);
            }
            for j in whole..dx.len() {
                apply_step::<T, 1>(dy, x, &dx, j, self.coefficients);
            }
        }
    }
}

#[inline(always)]
fn apply_step<T: Element, const N: usize>(
    dy: Row<'_, T>,
    x: Row<'_, T>,
    dx: &RowMut<'_, T>,
    k: usize,
    columns: [&[f64]; 4],
) {
    let (dys, xs): ([T; N], [T; N]) = (dy.chunk(k), x.chunk(k));
    let [mean, offset, slope, scale] = columns.map(|column| &steps::<_, N>(column)[k]);
    let dx_of = |i: usize| {
        let c = Apply { mean: mean[i], offset: offset[i], slope: slope[i], scale: scale[i] };
        c.dx(dys[i], xs[i])
    };
    dx.set_chunk::<N>(k, std::array::from_fn(dx_of));
}
