//! Kernels that compute each element from elements at the same place: the loop around them, what they compute, a copy.

use super::elements::{WIDTH, put};
use super::lanes::Lanes;
use super::{Kernel, LANES, ROWS};
use crate::element::Element;
use crate::view::{Row, RowMut, Tile, TileMut};
use std::array::from_fn;
use std::ops::Range;

/// What is written to the rows of a tile.
pub(super) trait Map<T: Element> {
    /// The rows that a row is computed from.
    type Inputs: std::marker::Copy;
    /// What eight columns are computed with.
    type Coefficients<L: Lanes>: std::marker::Copy;
    /// Rows that are walked together, so that coefficients are loaded once for all of them.
    const TOGETHER: bool;

    fn inputs(&self, r: usize) -> Self::Inputs;
    /// For columns `i .. i + 8`.
    fn coefficients<L: Lanes>(&self, i: usize) -> Self::Coefficients<L>;
    /// Computes and writes elements `i .. i + 8`.
    fn eight<L: Lanes>(inputs: Self::Inputs, c: Self::Coefficients<L>, y: &RowMut<'_, T>, i: usize, streaming: bool);
    /// Computes element `i`.
    fn one(&self, inputs: Self::Inputs, i: usize) -> T;
}

/// Writes a tile, last row first: after a pass for statistics it is still in cache.
#[inline(always)]
pub(super) fn write<L: Lanes, T: Element, M: Map<T>>(y: &TileMut<'_, T>, streaming: bool, map: &M) {
    let mut rows = y.rows();
    if M::TOGETHER && (!streaming || y.rows_share_alignment()) {
        while rows >= ROWS {
            rows -= ROWS;
            write_rows::<L, T, M, ROWS>(y, rows, streaming, map);
        }
    }
    while rows > 0 {
        rows -= 1;
        write_rows::<L, T, M, 1>(y, rows, streaming, map);
    }
}

/// Writes rows `r .. r + R`; past the caches, in whole cache lines, where asked to.
#[inline(always)]
fn write_rows<L: Lanes, T: Element, M: Map<T>, const R: usize>(y: &TileMut<'_, T>, r: usize, streaming: bool, map: &M) {
    let inputs: [M::Inputs; R] = from_fn(|k| map.inputs(r + k));
    let outputs: [RowMut<'_, T>; R] = from_fn(|k| y.row(r + k));
    let ones = |columns: Range<usize>| {
        for i in columns {
            for k in 0..R {
                outputs[k].store(i, [map.one(inputs[k], i)]);
            }
        }
    };
    let first = if streaming { outputs[0].before_line() } else { 0 };
    ones(0..first);
    let mut i = first;
    while i + LANES <= y.cols() {
        for i in [i, i + WIDTH] {
            let c = map.coefficients::<L>(i);
            for k in 0..R {
                M::eight::<L>(inputs[k], c, &outputs[k], i, streaming);
            }
        }
        i += LANES;
    }
    ones(i..y.cols());
}

/// The expression that defines inference (contract 1), each operation rounded: (x − mean)·s + β.
#[inline(always)]
pub(super) fn affine<T: Element>(x: T, [high, low, s, beta]: [T::Wide; 4]) -> T {
    let d = x.widen() - high;
    let d = if T::SPLIT_MEAN { d - low } else { d };
    T::narrow(d * s + beta)
}

/// What dx needs of a channel: dx = ((dy − dβ/m) − (x − mean)·(dγ/(m·√(σ²+ε)))) · γ/√(σ²+ε), in float64. A number a
/// channel, or a slice over the columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Apply<V> {
    pub(crate) mean: V,
    /// dβ/m
    pub(crate) offset: V,
    /// dγ/(m·√(σ²+ε))
    pub(crate) slope: V,
    /// γ/√(σ²+ε)
    pub(crate) scale: V,
}

impl Apply<f64> {
    #[inline(always)]
    pub(super) fn one<T: Element>(self, dy: T, x: T) -> T {
        T::from_f64(((dy.to_f64() - self.offset) - (x.to_f64() - self.mean) * self.slope) * self.scale)
    }
}

impl<V: Copy> Apply<V> {
    /// The same with every part mapped.
    #[inline(always)]
    pub(crate) fn map<W>(self, f: impl Fn(V) -> W) -> Apply<W> {
        Apply { mean: f(self.mean), offset: f(self.offset), slope: f(self.slope), scale: f(self.scale) }
    }
}

impl<D: Copy> Apply<[D; 2]> {
    #[inline(always)]
    pub(super) fn lanes<L: Lanes<D = D>>(self, dy: [D; 2], x: [D; 2]) -> [D; 2] {
        from_fn(|h| {
            let through_statistics = L::mul(L::sub(x[h], self.mean[h]), self.slope[h]);
            L::mul(L::sub(L::sub(dy[h], self.offset[h]), through_statistics), self.scale[h])
        })
    }
}

/// A tile as it is.
struct Same<'a, T: Element>(Tile<'a, T>);

impl<'a, T: Element> Map<T> for Same<'a, T> {
    type Inputs = Row<'a, T>;
    type Coefficients<L: Lanes> = ();
    const TOGETHER: bool = false;

    #[inline(always)]
    fn inputs(&self, r: usize) -> Row<'a, T> {
        self.0.row(r)
    }
    #[inline(always)]
    fn coefficients<L: Lanes>(&self, _: usize) {}
    #[inline(always)]
    fn eight<L: Lanes>(x: Row<'a, T>, (): (), y: &RowMut<'_, T>, i: usize, streaming: bool) {
        put::<T, WIDTH>(y, i, x.load(i), streaming);
    }
    #[inline(always)]
    fn one(&self, x: Row<'a, T>, i: usize) -> T {
        let [x] = x.load(i);
        x
    }
}

/// The sum of two tiles, rounded.
struct Plus<'a, T: Element>(Tile<'a, T>, Tile<'a, T>);

impl<'a, T: Element> Map<T> for Plus<'a, T> {
    type Inputs = (Row<'a, T>, Row<'a, T>);
    type Coefficients<L: Lanes> = ();
    const TOGETHER: bool = false;

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.0.row(r), self.1.row(r))
    }
    #[inline(always)]
    fn coefficients<L: Lanes>(&self, _: usize) {}
    #[inline(always)]
    fn eight<L: Lanes>((a, b): Self::Inputs, (): (), y: &RowMut<'_, T>, i: usize, streaming: bool) {
        let (a, b) = (T::load_wide::<L>(&a, i), T::load_wide::<L>(&b, i));
        T::store_wide::<L>(y, i, from_fn(|h| L::add(a[h], b[h])), streaming);
    }
    #[inline(always)]
    fn one(&self, (a, b): Self::Inputs, i: usize) -> T {
        let ([a], [b]) = (a.load(i), b.load(i));
        T::from_f64(a.to_f64() + b.to_f64())
    }
}

/// The least that a pass over memory costs: y = x, or y = x + z.
pub(crate) struct Transfer<'a, 'b, T: Element> {
    pub(crate) x: Tile<'a, T>,
    pub(crate) z: Option<Tile<'a, T>>,
    pub(crate) y: &'a TileMut<'b, T>,
    pub(crate) streaming: bool,
}

impl<T: Element> Kernel for Transfer<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let streaming = self.streaming && self.y.is_aligned();
        match self.z {
            None => write::<L, T, _>(self.y, streaming, &Same(self.x)),
            Some(z) => write::<L, T, _>(self.y, streaming, &Plus(self.x, z)),
        }
    }
}
