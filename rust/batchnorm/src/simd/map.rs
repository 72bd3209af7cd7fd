//! Kernels that compute each element of a row from elements at the same place: the loop around them, what is mapped, and
//! a copy.

use super::elements::WIDTH;
use super::lanes::Lanes;
use super::{Kernel, LANES};
use crate::element::Element;
use crate::view::{Row, RowMut, Tile, TileMut};

/// What is written to a row.
pub(super) trait Map<T: Element> {
    /// Computes and writes elements `i .. i + 8`.
    fn eight<L: Lanes>(&self, y: &RowMut<'_, T>, i: usize, streaming: bool);
    /// Computes element `i`.
    fn one(&self, i: usize) -> T;
}

/// Writes a row; past the caches, in whole cache lines, where asked to.
#[inline(always)]
pub(super) fn write<L: Lanes, T: Element>(y: &RowMut<'_, T>, streaming: bool, map: &impl Map<T>) {
    let mut i = 0;
    if streaming {
        let first = y.before_line();
        while i < first {
            y.store(i, [map.one(i)]);
            i += 1;
        }
        while i + LANES <= y.len() {
            map.eight::<L>(y, i, true);
            map.eight::<L>(y, i + WIDTH, true);
            i += LANES;
        }
    }
    while i + LANES <= y.len() {
        map.eight::<L>(y, i, false);
        map.eight::<L>(y, i + WIDTH, false);
        i += LANES;
    }
    while i < y.len() {
        y.store(i, [map.one(i)]);
        i += 1;
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
        std::array::from_fn(|h| {
            let through_statistics = L::mul(L::sub(x[h], self.mean[h]), self.slope[h]);
            L::mul(L::sub(L::sub(dy[h], self.offset[h]), through_statistics), self.scale[h])
        })
    }
}

/// A row as it is.
struct Same<'a, T: Element>(Row<'a, T>);

impl<T: Element> Map<T> for Same<'_, T> {
    #[inline(always)]
    fn eight<L: Lanes>(&self, y: &RowMut<'_, T>, i: usize, streaming: bool) {
        if streaming {
            y.stream::<WIDTH>(i, self.0.load(i));
        } else {
            y.store::<WIDTH>(i, self.0.load(i));
        }
    }
    #[inline(always)]
    fn one(&self, i: usize) -> T {
        let [x] = self.0.load(i);
        x
    }
}

/// The sum of two rows, rounded.
struct Plus<'a, T: Element>(Row<'a, T>, Row<'a, T>);

impl<T: Element> Map<T> for Plus<'_, T> {
    #[inline(always)]
    fn eight<L: Lanes>(&self, y: &RowMut<'_, T>, i: usize, streaming: bool) {
        let (a, b) = (T::load_wide::<L>(&self.0, i), T::load_wide::<L>(&self.1, i));
        T::store_wide::<L>(y, i, std::array::from_fn(|h| L::add(a[h], b[h])), streaming);
    }
    #[inline(always)]
    fn one(&self, i: usize) -> T {
        let ([a], [b]) = (self.0.load(i), self.1.load(i));
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
        for r in 0..self.y.rows() {
            let y = self.y.row(r);
            match self.z {
                None => write::<L, T>(&y, self.streaming, &Same(self.x.row(r))),
                Some(z) => write::<L, T>(&y, self.streaming, &Plus(self.x.row(r), z.row(r))),
            }
        }
    }
}
