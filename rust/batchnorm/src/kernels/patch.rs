//! Kernels of whitening: parts of tensors as float64 matrices, and a product whose sums have a fixed order.

use crate::element::Element;
use crate::simd::{Kernel, Lanes, Vectors, WIDTH};
use crate::view::{Row, RowMut, Tile, TileMut};
use std::array::from_fn;

/// Writes x − mean; `mean` gives the vector of eight columns, and the number of one.
#[inline(always)]
fn centre<L: Lanes, T: Element>(
    x: Row<'_, T>,
    to: &mut [f64],
    mean: impl Fn(usize) -> [L::D; 2],
    mean_of_one: impl Fn(usize) -> f64,
) {
    let (eights, rest) = to.as_chunks_mut::<WIDTH>();
    for (k, to) in eights.iter_mut().enumerate() {
        let (x, mean) = (T::load_wide::<L>(x.chunk::<WIDTH>(k * WIDTH).part(0)), mean(k * WIDTH));
        *to = f64::store_wide::<L>(from_fn(|h| L::sub(x[h], mean[h])));
    }
    let start = x.len() / WIDTH * WIDTH;
    for (i, to) in rest.iter_mut().enumerate() {
        *to = x.one(start + i).to_f64() - mean_of_one(start + i);
    }
}

/// Writes scale·v + shift, rounded after each operation.
#[inline(always)]
fn put<L: Lanes, T: Element>(
    from: &[f64],
    y: &RowMut<'_, T>,
    coefficients: impl Fn(usize) -> [[L::D; 2]; 2],
    of_one: impl Fn(usize) -> [f64; 2],
) {
    let (eights, rest) = from.as_chunks::<WIDTH>();
    for (k, from) in eights.iter().enumerate() {
        let (v, [scale, shift]) = (f64::load_wide::<L>(*from), coefficients(k * WIDTH));
        let y = y.chunk::<WIDTH, false>(k * WIDTH);
        y.put(0, T::store_wide::<L>(from_fn(|h| L::add(L::mul(scale[h], v[h]), shift[h]))));
    }
    let start = y.len() / WIDTH * WIDTH;
    for (i, v) in rest.iter().enumerate() {
        let [scale, shift] = of_one(start + i);
        y.put_one(start + i, T::from_f64(scale * v + shift));
    }
}

#[inline(always)]
fn eight<L: Lanes>(values: &[f64], j: usize) -> [L::D; 2] {
    let (eights, _) = values[j..].as_chunks::<WIDTH>();
    f64::load_wide::<L>(eights[0])
}

/// Gathers rows in which every column is a channel: `to` gets row after row.
pub(crate) struct GatherRows<'a, T: Element> {
    pub(crate) x: Tile<'a, T>,
    /// Of each column.
    pub(crate) mean: &'a [f64],
    pub(crate) to: &'a mut [f64],
}

impl<T: Element> Kernel for GatherRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (r, to) in self.to.chunks_exact_mut(self.x.cols()).enumerate() {
            centre::<L, T>(self.x.row(r), to, |j| eight::<L>(self.mean, j), |j| self.mean[j]);
        }
    }
}

/// Gathers runs of `run` values, a run a channel, which begin `inner` elements after each other in every row: `to` gets
/// channel after channel, each with its runs of all rows.
pub(crate) struct GatherRuns<'a, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) inner: usize,
    pub(crate) run: usize,
    /// Of each channel.
    pub(crate) mean: &'a [f64],
    pub(crate) to: &'a mut [f64],
}

impl<T: Element> Kernel for GatherRuns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.x.rows();
        for (k, to) in self.to.chunks_exact_mut(self.run).enumerate() {
            let (c, r) = (k / rows, k % rows);
            let (x, mean) = (self.x.row(r).part(c * self.inner, self.run), self.mean[c]);
            centre::<L, T>(x, to, |_| [L::splat(mean); 2], |_| mean);
        }
    }
}

/// What a matrix is written to a tensor with: y = scale·v + shift, of each channel.
#[derive(Clone, Copy)]
pub(crate) struct ScaleAndShift<'a> {
    pub(crate) scale: &'a [f64],
    pub(crate) shift: &'a [f64],
}

/// Writes what [`GatherRows`] would read.
pub(crate) struct ScatterRows<'a, 'b, T: Element> {
    pub(crate) from: &'a [f64],
    pub(crate) with: ScaleAndShift<'a>,
    pub(crate) y: &'a TileMut<'b, T>,
}

impl<T: Element> Kernel for ScatterRows<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let ScaleAndShift { scale, shift } = self.with;
        for (r, from) in self.from.chunks_exact(self.y.cols()).enumerate() {
            let of_eight = |j| [eight::<L>(scale, j), eight::<L>(shift, j)];
            put::<L, T>(from, &self.y.row(r), of_eight, |j| [scale[j], shift[j]]);
        }
    }
}

/// Writes what [`GatherRuns`] would read.
pub(crate) struct ScatterRuns<'a, 'b, T: Element> {
    pub(crate) from: &'a [f64],
    pub(crate) inner: usize,
    pub(crate) run: usize,
    pub(crate) with: ScaleAndShift<'a>,
    pub(crate) y: &'a TileMut<'b, T>,
}

impl<T: Element> Kernel for ScatterRuns<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.y.rows();
        for (k, from) in self.from.chunks_exact(self.run).enumerate() {
            let (c, r) = (k / rows, k % rows);
            let (scale, shift) = (self.with.scale[c], self.with.shift[c]);
            let of_eight = |_| [[L::splat(scale); 2], [L::splat(shift); 2]];
            put::<L, T>(from, &self.y.row(r).part(c * self.inner, self.run), of_eight, |_| [scale, shift]);
        }
    }
}

/// A matrix in row-major order, as a part of a larger one.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) values: &'a [f64],
    /// Elements from the start of a row to the start of the next.
    pub(crate) stride: usize,
}

/// left·right, of `rows` × `inner` and `inner` × `cols` elements. Each sum begins at 0 and goes in the order of the inner
/// index, and each product and each addition is rounded: the bits of an element do not depend on what else is computed.
pub(crate) struct OrderedProduct<'a> {
    pub(crate) left: Rows<'a>,
    pub(crate) right: Rows<'a>,
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) cols: usize,
    /// Scratch memory of `inner` vectors.
    pub(crate) panel: &'a mut [[f64; WIDTH]],
    pub(crate) to: &'a mut [f64],
    pub(crate) to_stride: usize,
}

/// Rows of the left matrix that are multiplied together: eight sums hide the latency of an addition.
const TOGETHER: usize = 4;

impl Kernel for OrderedProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        for j in (0..self.cols).step_by(WIDTH) {
            let n = WIDTH.min(self.cols - j);
            for (k, eight) in self.panel.iter_mut().enumerate() {
                let right = &self.right.values[k * self.right.stride + j..][..n];
                eight[..n].copy_from_slice(right);
                eight[n..].fill(0.0);
            }
            let together = self.rows / TOGETHER * TOGETHER;
            for r in (0..together).step_by(TOGETHER) {
                self.some_rows::<L, TOGETHER>(r, j, n);
            }
            for r in together..self.rows {
                self.some_rows::<L, 1>(r, j, n);
            }
        }
    }
}

impl OrderedProduct<'_> {
    /// Columns `j .. j + n` of `R` rows.
    #[inline(always)]
    fn some_rows<L: Lanes, const R: usize>(&mut self, r: usize, j: usize, n: usize) {
        let left: [&[f64]; R] = from_fn(|k| &self.left.values[(r + k) * self.left.stride..][..self.inner]);
        let mut sums = [[L::splat(0.0); 2]; R];
        for (i, right) in self.panel.iter().enumerate() {
            let right = f64::load_wide::<L>(*right);
            for k in 0..R {
                let a = L::splat(left[k][i]);
                sums[k] = [L::add(sums[k][0], L::mul(a, right[0])), L::add(sums[k][1], L::mul(a, right[1]))];
            }
        }
        for (k, sum) in sums.into_iter().enumerate() {
            let to = &mut self.to[(r + k) * self.to_stride + j..][..n];
            to.copy_from_slice(&f64::store_wide::<L>(sum)[..n]);
        }
    }
}
