//! Kernels that compute each element from elements at the same place: the loop around them, what they compute, a copy.

use super::elements::{WIDTH, put};
use super::lanes::Lanes;
use super::{Kernel, LANES};
use crate::element::Element;
use crate::view::{Row, RowMut, Tile, TileMut};
use std::array::from_fn;

/// What is written to the rows of a tile.
pub(super) trait Map<T: Element> {
    /// What a row is computed from.
    type Inputs: std::marker::Copy;

    fn inputs(&self, r: usize) -> Self::Inputs;
    /// Computes and writes elements `i .. i + 8`, of columns `j .. j + 8`.
    fn eight<L: Lanes>(&self, inputs: Self::Inputs, y: &RowMut<'_, T>, i: usize, j: usize, streaming: bool);
    /// Computes element `i`, of column `j`.
    fn one(&self, inputs: Self::Inputs, i: usize, j: usize) -> T;
}

/// Writes a tile, last row first: after a pass for statistics it is still in cache. Past the caches, in whole cache
/// lines, where asked to. Columns start again after `period` elements.
#[inline(always)]
pub(super) fn write<L: Lanes, T: Element, M: Map<T>>(y: &TileMut<'_, T>, period: usize, streaming: bool, map: &M) {
    for r in (0..y.rows()).rev() {
        let (inputs, y) = (map.inputs(r), y.row(r));
        let first = if streaming { y.before_line() } else { 0 };
        for i in 0..first {
            y.store(i, [map.one(inputs, i, i % period)]);
        }
        let (mut i, mut j) = (first, first % period);
        while i + LANES <= y.len() {
            map.eight::<L>(inputs, &y, i, j, streaming);
            map.eight::<L>(inputs, &y, i + WIDTH, j + WIDTH, streaming);
            i += LANES;
            j += LANES;
            while j >= period {
                j -= period;
            }
        }
        for i in i..y.len() {
            y.store(i, [map.one(inputs, i, i % period)]);
        }
    }
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

    #[inline(always)]
    fn inputs(&self, r: usize) -> Row<'a, T> {
        self.0.row(r)
    }
    #[inline(always)]
    fn eight<L: Lanes>(&self, x: Row<'a, T>, y: &RowMut<'_, T>, i: usize, _: usize, streaming: bool) {
        put::<T, WIDTH>(y, i, x.load(i), streaming);
    }
    #[inline(always)]
    fn one(&self, x: Row<'a, T>, i: usize, _: usize) -> T {
        let [x] = x.load(i);
        x
    }
}

/// The sum of two tiles, rounded.
struct Plus<'a, T: Element>(Tile<'a, T>, Tile<'a, T>);

impl<'a, T: Element> Map<T> for Plus<'a, T> {
    type Inputs = (Row<'a, T>, Row<'a, T>);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.0.row(r), self.1.row(r))
    }
    #[inline(always)]
    fn eight<L: Lanes>(&self, (a, b): Self::Inputs, y: &RowMut<'_, T>, i: usize, _: usize, streaming: bool) {
        let (a, b) = (T::load_wide::<L>(&a, i), T::load_wide::<L>(&b, i));
        T::store_wide::<L>(y, i, from_fn(|h| L::add(a[h], b[h])), streaming);
    }
    #[inline(always)]
    fn one(&self, (a, b): Self::Inputs, i: usize, _: usize) -> T {
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
            None => write::<L, T, _>(self.y, usize::MAX, streaming, &Same(self.x)),
            Some(z) => write::<L, T, _>(self.y, usize::MAX, streaming, &Plus(self.x, z)),
        }
    }
}
