//! Elementwise kernels: the loop over rows, and the expressions that compute each element from inputs at the same place.

use super::LANES;
use crate::element::{Element, Wide};
use crate::epilogue::{Activation, Epilogue};
use crate::simd::{Kernel, Lanes, WIDTH};
use crate::view::{Buffer, ChunkMut, Row, RowMut, Tile, TileMut};
use std::array::from_fn;

/// An elementwise computation of the rows of a tile.
pub(super) trait Map<T: Element> {
    /// The inputs that one row is computed from.
    type Inputs: Copy;

    /// The inputs of row `r`.
    fn inputs(&self, r: usize) -> Self::Inputs;
    /// Computes elements `i .. i + 16`, which lie in columns `j .. j + 16`, and writes them to `y`.
    fn sixteen<L: Lanes, const S: bool>(&self, inputs: Self::Inputs, i: usize, j: usize, y: ChunkMut<'_, T, LANES, S>);
    /// Computes element `i`, which lies in column `j`.
    fn one(&self, inputs: Self::Inputs, i: usize, j: usize) -> T;
}

/// Bytes from which a row is written with non-temporal stores. (Cache lines that two rows share are written ordinarily.)
const STREAM_RUN: usize = 1024;

/// Computes a tile, and if `streaming` writes its whole cache lines with non-temporal stores.
///
/// The column of element `i` of a row is `i % period`.
#[inline(always)]
pub(super) fn write<L: Lanes, T: Element, M: Map<T>>(y: &TileMut<'_, T>, period: usize, streaming: bool, map: &M) {
    for r in 0..y.rows() {
        let (inputs, row) = (map.inputs(r), y.row(r));
        if streaming && row.len() * size_of::<T>() >= STREAM_RUN {
            write_row::<L, T, M, true>(&row, period, map, inputs);
        } else {
            write_row::<L, T, M, false>(&row, period, map, inputs);
        }
    }
}

#[inline(always)]
fn write_row<L: Lanes, T: Element, M: Map<T>, const STREAMING: bool>(
    y: &RowMut<'_, T>,
    period: usize,
    map: &M,
    inputs: M::Inputs,
) {
    let len = y.len();
    if len < LANES {
        for i in 0..len {
            y.put_one(i, map.one(inputs, i, i % period));
        }
        return;
    }
    let first = if STREAMING { y.before_line() } else { 0 };
    let whole = (len - first) / LANES * LANES;
    // Elements left over at either end are computed by steps that overlap the whole ones. These come first: if the kernel
    // works in place, the whole steps overwrite what the overlapping ones read.
    let (mut head, mut tail) = (Buffer::<T, LANES>::new(), Buffer::<T, LANES>::new());
    let start = first / LANES * LANES; // a line has up to 32 elements
    if start < first {
        map.sixteen::<L, false>(inputs, start, start % period, head.chunk());
    }
    if first + whole < len {
        map.sixteen::<L, false>(inputs, len - LANES, (len - LANES) % period, tail.chunk());
    }
    for i in (0..start).step_by(LANES) {
        map.sixteen::<L, false>(inputs, i, i % period, y.chunk(i));
    }
    head.copy_first(y, start, first - start);
    let mut j = first % period;
    for i in (first..first + whole).step_by(LANES) {
        map.sixteen::<L, STREAMING>(inputs, i, j, y.chunk(i));
        j += LANES;
        while j >= period {
            j -= period;
        }
    }
    // A cache line written by non-temporal stores must not be written again: it would have to come back from memory.
    match len - first - whole {
        0 => {}
        over if STREAMING => tail.copy_last(y, over),
        _ => tail.copy_last(y, LANES),
    }
}

/// The expression that defines inference (contract 1): v = (x − mean)·s + β, each operation rounded.
#[inline(always)]
pub(super) fn normalize_one<T: Element>(x: T, [high, low, s, beta]: [T::Wide; 4]) -> T::Wide {
    let d = x.widen() - high;
    let d = if T::SPLIT_MEAN { d - low } else { d };
    d * s + beta
}

/// [`normalize_one`] for eight elements.
#[inline(always)]
pub(super) fn normalize_eight<L: Lanes, T: Element>(x: [T; WIDTH], c: [T::Vector<L>; 4]) -> T::Vector<L> {
    T::normalize::<L>(T::load::<L>(x), c)
}

/// A result computed from the normalized value v: y, or the gradient that passes the activation.
pub(crate) trait FromNormalized<T: Element>: Copy {
    /// The inputs, besides v, that one row is computed from.
    type Inputs: Copy;

    /// The inputs of row `r`.
    fn inputs(&self, r: usize) -> Self::Inputs;
    /// This computation with inputs as one row if their rows are adjacent in memory, else unchanged.
    fn flat(&self) -> Self;
    /// Computes elements `i .. i + 8`.
    fn eight<L: Lanes>(inputs: Self::Inputs, i: usize, v: T::Vector<L>) -> [T; WIDTH];
    /// Computes element `i`.
    fn one(inputs: Self::Inputs, i: usize, v: T::Wide) -> T;
}

/// v + residual, in the precision of v.
#[inline(always)]
fn plus_residual<T: Element>(v: T::Wide, residual: Option<Row<'_, T>>, i: usize) -> T::Wide {
    residual.map_or(v, |residual| v + residual.one(i).widen())
}

/// [`plus_residual`] for elements `i .. i + 8`.
#[inline(always)]
fn plus_residual_eight<L: Lanes, T: Element>(v: T::Vector<L>, residual: Option<Row<'_, T>>, i: usize) -> T::Vector<L> {
    match residual {
        Some(residual) => T::add::<L>(v, T::load::<L>(residual.chunk::<WIDTH>(i).part(0))),
        None => v,
    }
}

/// The largest value of ReLU6, in the precision of v.
#[inline(always)]
fn six<T: Element>() -> T::Wide {
    T::Wide::from_f64(6.0)
}

/// The epilogue applied to the normalized value: y = activation(v + residual).
impl<'a, T: Element> FromNormalized<T> for Epilogue<Tile<'a, T>> {
    type Inputs = Epilogue<Row<'a, T>>;

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        self.map(|tile| tile.row(r))
    }
    #[inline(always)]
    fn flat(&self) -> Self {
        self.map(|tile| tile.flat())
    }
    #[inline(always)]
    fn eight<L: Lanes>(inputs: Self::Inputs, i: usize, v: T::Vector<L>) -> [T; WIDTH] {
        let v = plus_residual_eight::<L, T>(v, inputs.residual, i);
        T::store::<L>(match inputs.activation {
            Some(Activation::Relu) => T::relu::<L>(v),
            Some(Activation::Relu6) => T::at_most::<L>(T::relu::<L>(v), T::splat::<L>(six::<T>())),
            None => v,
        })
    }
    #[inline(always)]
    fn one(inputs: Self::Inputs, i: usize, v: T::Wide) -> T {
        let (v, zero) = (plus_residual(v, inputs.residual, i), T::Wide::default());
        T::narrow(match inputs.activation {
            Some(_) if v <= zero => zero,
            Some(Activation::Relu6) if v > six::<T>() => six::<T>(),
            _ => v,
        })
    }
}

/// Backward of an activation: dy where y > 0 (and y < 6 for ReLU6), else 0.
///
/// y itself is not needed: it is positive exactly where v + residual rounds to more than 0, and less than 6 where that
/// rounds to less than 6.
#[derive(Clone, Copy)]
pub(crate) struct ActivationBackward<'a, T: Element> {
    pub(crate) activation: Activation,
    pub(crate) dy: Tile<'a, T>,
    pub(crate) residual: Option<Tile<'a, T>>,
}

impl<'a, T: Element> FromNormalized<T> for ActivationBackward<'a, T> {
    type Inputs = (Activation, Row<'a, T>, Option<Row<'a, T>>);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.activation, self.dy.row(r), self.residual.map(|tile| tile.row(r)))
    }
    #[inline(always)]
    fn flat(&self) -> Self {
        Self { dy: self.dy.flat(), residual: self.residual.map(|tile| tile.flat()), ..*self }
    }
    #[inline(always)]
    fn eight<L: Lanes>((activation, dy, residual): Self::Inputs, i: usize, v: T::Vector<L>) -> [T; WIDTH] {
        let v = plus_residual_eight::<L, T>(v, residual, i);
        let dy = T::load::<L>(dy.chunk::<WIDTH>(i).part(0));
        let passes = T::pass::<L>(dy, v, T::splat::<L>(T::ROUNDS_TO_ZERO));
        T::store::<L>(match activation {
            Activation::Relu => passes,
            Activation::Relu6 => T::pass_below::<L>(passes, v, T::splat::<L>(T::ROUNDS_TO_SIX)),
        })
    }
    #[inline(always)]
    fn one((activation, dy, residual): Self::Inputs, i: usize, v: T::Wide) -> T {
        let v = plus_residual(v, residual, i);
        let passes = v > T::ROUNDS_TO_ZERO && (activation == Activation::Relu || v < T::ROUNDS_TO_SIX);
        if passes { dy.one(i) } else { T::narrow(T::Wide::default()) }
    }
}

/// Coefficients of dx = ((dy − dβ/m) − (x − mean)·(dγ/(m·√(σ²+ε)))) · γ/√(σ²+ε), in float64.
///
/// Each is the number of one channel, or a slice with a number for each column.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DxCoefficients<V> {
    pub(crate) mean: V,
    /// dβ/m
    pub(crate) offset: V,
    /// dγ/(m·√(σ²+ε))
    pub(crate) slope: V,
    /// γ/√(σ²+ε)
    pub(crate) scale: V,
}

impl DxCoefficients<f64> {
    #[inline(always)]
    pub(super) fn one<T: Element>(self, dy: T, x: T) -> T {
        T::from_f64(((dy.to_f64() - self.offset) - (x.to_f64() - self.mean) * self.slope) * self.scale)
    }
}

impl<V: Copy> DxCoefficients<V> {
    /// Applies `f` to each coefficient.
    #[inline(always)]
    pub(crate) fn map<W>(self, f: impl Fn(V) -> W) -> DxCoefficients<W> {
        DxCoefficients { mean: f(self.mean), offset: f(self.offset), slope: f(self.slope), scale: f(self.scale) }
    }
}

impl<D: Copy> DxCoefficients<[D; 2]> {
    #[inline(always)]
    pub(super) fn eight<L: Lanes<D = D>, T: Element>(self, dy: [T; WIDTH], x: [T; WIDTH]) -> [T; WIDTH] {
        let (dy, x) = (T::load_wide::<L>(dy), T::load_wide::<L>(x));
        T::store_wide::<L>(from_fn(|h| {
            let through_statistics = L::mul(L::sub(x[h], self.mean[h]), self.slope[h]);
            L::mul(L::sub(L::sub(dy[h], self.offset[h]), through_statistics), self.scale[h])
        }))
    }
}

/// The map y = x.
struct Copied<'a, T: Element>(Tile<'a, T>);

impl<'a, T: Element> Map<T> for Copied<'a, T> {
    type Inputs = Row<'a, T>;

    #[inline(always)]
    fn inputs(&self, r: usize) -> Row<'a, T> {
        self.0.row(r)
    }
    #[inline(always)]
    fn sixteen<L: Lanes, const S: bool>(&self, x: Row<'a, T>, i: usize, _: usize, y: ChunkMut<'_, T, LANES, S>) {
        let x = x.chunk::<LANES>(i);
        y.put::<WIDTH>(0, x.part(0));
        y.put::<WIDTH>(1, x.part(1));
    }
    #[inline(always)]
    fn one(&self, x: Row<'a, T>, i: usize, _: usize) -> T {
        x.one(i)
    }
}

/// The map y = x + z, rounded.
struct Added<'a, T: Element>(Tile<'a, T>, Tile<'a, T>);

impl<'a, T: Element> Map<T> for Added<'a, T> {
    type Inputs = (Row<'a, T>, Row<'a, T>);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.0.row(r), self.1.row(r))
    }
    #[inline(always)]
    fn sixteen<L: Lanes, const S: bool>(&self, (a, b): Self::Inputs, i: usize, _: usize, y: ChunkMut<'_, T, LANES, S>) {
        let (a, b) = (a.chunk::<LANES>(i), b.chunk::<LANES>(i));
        y.put(0, plus::<L, T>(a.part(0), b.part(0)));
        y.put(1, plus::<L, T>(a.part(1), b.part(1)));
    }
    #[inline(always)]
    fn one(&self, (a, b): Self::Inputs, i: usize, _: usize) -> T {
        T::from_f64(a.one(i).to_f64() + b.one(i).to_f64())
    }
}

#[inline(always)]
fn plus<L: Lanes, T: Element>(a: [T; WIDTH], b: [T; WIDTH]) -> [T; WIDTH] {
    let (a, b) = (T::load_wide::<L>(a), T::load_wide::<L>(b));
    T::store_wide::<L>(from_fn(|h| L::add(a[h], b[h])))
}

/// Copies x, or adds x + z: the least work that a pass over memory can do.
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
            None => write::<L, T, _>(self.y, usize::MAX, streaming, &Copied(self.x)),
            Some(z) => write::<L, T, _>(self.y, usize::MAX, streaming, &Added(self.x, z)),
        }
    }
}
