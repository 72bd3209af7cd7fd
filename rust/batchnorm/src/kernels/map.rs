//! Elementwise kernels: the loop over rows, and the expressions that compute each element from inputs at the same place.

use super::LANES;
use crate::element::{Element, Wide};
use crate::epilogue::{Activation, Epilogue};
use crate::simd::{Lanes, WIDTH};
use crate::view::{Buffer, Chunk, ChunkMut, Row, RowMut, Tile, TileMut};
use std::array::from_fn;
use std::ops::Range;

/// An elementwise computation of the rows of a tile.
pub(super) trait Map<T: Element> {
    /// The inputs that one row is computed from.
    type Inputs: Copy;
    /// Sixteen adjacent elements of each of them.
    type Chunk: Copy;
    /// Registers with what eight adjacent columns are computed with.
    type Columns<L: Lanes>: Copy;

    /// The inputs of row `r`.
    fn inputs(&self, r: usize) -> Self::Inputs;
    /// The kind of computation that the inputs ask for.
    #[inline(always)]
    fn kind(_: Self::Inputs) -> Kind {
        Kind::Plain
    }
    /// The inputs as they are, of the kind [`Map::kind`]; a loop over them does not ask again.
    #[inline(always)]
    fn of_kind<const KIND: u8>(inputs: Self::Inputs) -> Self::Inputs {
        inputs
    }
    /// Elements `i .. i + 16` of a row.
    fn chunk(inputs: Self::Inputs, i: usize) -> Self::Chunk;
    /// Prefetches element `i` of each input, where the columns of a row differ.
    #[inline(always)]
    fn prefetch(_: Self::Inputs, _: usize) {}
    /// What columns `j .. j + 8` of a row are computed with.
    fn columns<L: Lanes>(&self, inputs: Self::Inputs, j: usize) -> Self::Columns<L>;
    /// Computes half `half` of a chunk.
    fn eight<L: Lanes>(chunk: Self::Chunk, half: usize, columns: Self::Columns<L>) -> [T; WIDTH];
    /// Computes element `i`, which lies in column `j`.
    fn one(&self, inputs: Self::Inputs, i: usize, j: usize) -> T;
}

/// Activation and residual of a row, as far as loops are compiled for them apart.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Neither.
    Plain,
    /// ReLU without a residual.
    Relu,
    /// All others.
    Other,
}

const PLAIN: u8 = Kind::Plain as u8;
const RELU: u8 = Kind::Relu as u8;

impl Kind {
    #[inline(always)]
    fn of<R>(activation: Option<Activation>, residual: &Option<R>) -> Self {
        match (activation, residual) {
            (None, None) => Self::Plain,
            (Some(Activation::Relu), None) => Self::Relu,
            _ => Self::Other,
        }
    }

    /// Activation and residual again, of a kind that the compiler knows.
    #[inline(always)]
    fn known<const KIND: u8, R>(
        activation: Option<Activation>,
        residual: Option<R>,
    ) -> (Option<Activation>, Option<R>) {
        match KIND {
            PLAIN => (None, None),
            RELU => (Some(Activation::Relu), None),
            _ => (activation, residual),
        }
    }
}

/// Bytes from which a row is written with non-temporal stores. (Cache lines that two rows share are written ordinarily.)
const STREAM_RUN: usize = 1024;
/// The number of chunks in the same columns that are computed with what was loaded once for these columns.
const REUSED: usize = 2;
/// The largest distance, in bytes, of such chunks where they are written with non-temporal stores. (Measured with 256 bytes: a
/// tenth to a fifth less time; with 1024: half as much again.)
const NEAR: usize = 512;
/// Smallest distance, in bytes, by which inputs of rows of columns are prefetched. The prefetchers of processors lose track of
/// a tensor beside the coefficients of its columns. (Measured in the last-level cache: up to twice the time.)
const AHEAD: usize = 4096;

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
    // Elements left over at either end are computed by chunks that overlap the whole ones. These come first: if the kernel
    // works in place, the whole chunks overwrite what the overlapping ones read.
    let (mut head, mut tail) = (Buffer::<T, LANES>::new(), Buffer::<T, LANES>::new());
    let start = first / LANES * LANES; // a line has up to 32 elements
    if start < first {
        write_chunk::<L, T, M, false>(map, inputs, start, start % period, head.chunk());
    }
    if first + whole < len {
        write_chunk::<L, T, M, false>(map, inputs, len - LANES, (len - LANES) % period, tail.chunk());
    }
    for i in (0..start).step_by(LANES) {
        write_chunk::<L, T, M, false>(map, inputs, i, i % period, y.chunk(i));
    }
    head.copy_first(y, start, first - start);
    let range = first..first + whole;
    if STREAMING {
        // Memory takes longer than to ask again and again.
        write_whole::<L, T, M, true>(y, range, period, map, inputs);
    } else {
        match M::kind(inputs) {
            Kind::Plain => write_whole::<L, T, M, false>(y, range, period, map, M::of_kind::<PLAIN>(inputs)),
            Kind::Relu => write_whole::<L, T, M, false>(y, range, period, map, M::of_kind::<RELU>(inputs)),
            Kind::Other => write_whole::<L, T, M, false>(y, range, period, map, inputs),
        }
    }
    // A cache line written by non-temporal stores must not be written again: it would have to come back from memory.
    match len - first - whole {
        0 => {}
        over if STREAMING => tail.copy_last(y, over),
        _ => tail.copy_last(y, LANES),
    }
}

/// Computes the whole chunks of a row.
///
/// Chunks in the same columns are computed together. They are as many chunks apart as it takes for both columns and chunks to
/// begin again, which is a row of the tensor if its length is a multiple of a chunk's.
#[inline(always)]
fn write_whole<L: Lanes, T: Element, M: Map<T>, const STREAMING: bool>(
    y: &RowMut<'_, T>,
    whole: Range<usize>,
    period: usize,
    map: &M,
    inputs: M::Inputs,
) {
    if period == usize::MAX {
        let columns = map.columns::<L>(inputs, 0);
        for i in whole.step_by(LANES) {
            let (chunk, y) = (M::chunk(inputs, i), y.chunk::<LANES, STREAMING>(i));
            y.put(0, M::eight::<L>(chunk, 0, columns));
            y.put(1, M::eight::<L>(chunk, 1, columns));
        }
        return;
    }
    let mut start = whole.start;
    let apart = period << LANES.trailing_zeros().saturating_sub(period.trailing_zeros());
    let ahead = (REUSED * apart).max(AHEAD / size_of::<T>());
    let near = !STREAMING || apart * size_of::<T>() <= NEAR;
    while near && whole.end - start >= REUSED * apart {
        let mut j = start % period;
        for i in (start..start + apart).step_by(LANES) {
            if !STREAMING {
                for k in 0..REUSED {
                    M::prefetch(inputs, start + ahead + REUSED * (i - start) + k * LANES);
                }
            }
            write_chunks::<L, T, M, STREAMING>(map, inputs, (i, apart), j, y);
            j = after(j, period);
        }
        start += REUSED * apart;
    }
    let mut j = start % period;
    for i in (start..whole.end).step_by(LANES) {
        write_chunk::<L, T, M, STREAMING>(map, inputs, i, j, y.chunk(i));
        j = after(j, period);
    }
}

/// The column in which the chunk after one that begins in column `j` begins.
#[inline(always)]
fn after(mut j: usize, period: usize) -> usize {
    j += LANES;
    while j >= period {
        j -= period;
    }
    j
}

/// Computes the chunk that begins at element `i`, which lies in columns `j .. j + 16`, and writes it to `y`.
#[inline(always)]
fn write_chunk<L: Lanes, T: Element, M: Map<T>, const STREAMING: bool>(
    map: &M,
    inputs: M::Inputs,
    i: usize,
    j: usize,
    y: ChunkMut<'_, T, LANES, STREAMING>,
) {
    let chunk = M::chunk(inputs, i);
    y.put(0, M::eight::<L>(chunk, 0, map.columns::<L>(inputs, j)));
    y.put(1, M::eight::<L>(chunk, 1, map.columns::<L>(inputs, j + WIDTH)));
}

/// Computes [`REUSED`] chunks, `apart` elements apart, of which the first begins at element `i`. All lie in columns `j .. j + 16`.
#[inline(always)]
fn write_chunks<L: Lanes, T: Element, M: Map<T>, const STREAMING: bool>(
    map: &M,
    inputs: M::Inputs,
    (i, apart): (usize, usize),
    j: usize,
    y: &RowMut<'_, T>,
) {
    // Loops, since closures that the compiler does not inline would not be compiled for the level.
    let low = map.columns::<L>(inputs, j);
    if STREAMING {
        // Each cache line at once.
        let high = map.columns::<L>(inputs, j + WIDTH);
        for k in 0..REUSED {
            let (chunk, y) = (M::chunk(inputs, i + k * apart), y.chunk::<LANES, true>(i + k * apart));
            y.put(0, M::eight::<L>(chunk, 0, low));
            y.put(1, M::eight::<L>(chunk, 1, high));
        }
        return;
    }
    for k in 0..REUSED {
        let (chunk, y) = (M::chunk(inputs, i + k * apart), y.chunk::<LANES, false>(i + k * apart));
        y.put(0, M::eight::<L>(chunk, 0, low));
    }
    let high = map.columns::<L>(inputs, j + WIDTH);
    for k in 0..REUSED {
        let (chunk, y) = (M::chunk(inputs, i + k * apart), y.chunk::<LANES, false>(i + k * apart));
        y.put(1, M::eight::<L>(chunk, 1, high));
    }
}

/// The expression that defines inference (contract 1): v = (x − mean)·s + β, each operation rounded.
#[inline(always)]
pub(crate) fn normalize_one<T: Element>(x: T, [high, low, s, beta]: [T::Wide; 4]) -> T::Wide {
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
    /// Whether it may be written with non-temporal stores; what is read again at once is not.
    const STREAMS: bool;
    /// The inputs, besides v, that one row is computed from.
    type Inputs: Copy;
    /// Sixteen adjacent elements of each of them.
    type Chunk: Copy;

    /// The inputs of row `r`.
    fn inputs(&self, r: usize) -> Self::Inputs;
    /// The kind of computation that the inputs ask for.
    fn kind(inputs: Self::Inputs) -> Kind;
    /// The inputs as they are, of the kind [`FromNormalized::kind`]; a loop over them does not ask again.
    fn of_kind<const KIND: u8>(inputs: Self::Inputs) -> Self::Inputs;
    /// This computation with inputs as one row if their rows are adjacent in memory, else unchanged.
    fn flat(&self) -> Self;
    /// Elements `i .. i + 16` of a row.
    fn chunk(inputs: Self::Inputs, i: usize) -> Self::Chunk;
    /// Prefetches element `i` of each input.
    fn prefetch(inputs: Self::Inputs, i: usize);
    /// Computes half `half` of a chunk.
    fn eight<L: Lanes>(chunk: Self::Chunk, half: usize, v: T::Vector<L>) -> [T; WIDTH];
    /// Computes element `i`.
    fn one(inputs: Self::Inputs, i: usize, v: T::Wide) -> T;
}

/// v + residual, in the precision of v.
#[inline(always)]
fn plus_residual<T: Element>(v: T::Wide, residual: Option<Row<'_, T>>, i: usize) -> T::Wide {
    residual.map_or(v, |residual| v + residual.one(i).widen())
}

/// [`plus_residual`] for half `half` of a chunk.
#[inline(always)]
fn plus_residual_eight<L: Lanes, T: Element>(
    v: T::Vector<L>,
    residual: Option<Chunk<'_, T, LANES>>,
    half: usize,
) -> T::Vector<L> {
    match residual {
        Some(residual) => T::add::<L>(v, T::load::<L>(residual.part(half))),
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
    const STREAMS: bool = true;
    type Inputs = Epilogue<Row<'a, T>>;
    type Chunk = Epilogue<Chunk<'a, T, LANES>>;

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        self.map(|tile| tile.row(r))
    }
    #[inline(always)]
    fn kind(inputs: Self::Inputs) -> Kind {
        Kind::of(inputs.activation, &inputs.residual)
    }
    #[inline(always)]
    fn of_kind<const KIND: u8>(inputs: Self::Inputs) -> Self::Inputs {
        let (activation, residual) = Kind::known::<KIND, _>(inputs.activation, inputs.residual);
        Epilogue { activation, residual }
    }
    #[inline(always)]
    fn flat(&self) -> Self {
        self.map(|tile| tile.flat())
    }
    #[inline(always)]
    fn chunk(inputs: Self::Inputs, i: usize) -> Self::Chunk {
        inputs.map(|row| row.chunk(i))
    }
    #[inline(always)]
    fn prefetch(inputs: Self::Inputs, i: usize) {
        inputs.map(|row| row.prefetch(i));
    }
    #[inline(always)]
    fn eight<L: Lanes>(chunk: Self::Chunk, half: usize, v: T::Vector<L>) -> [T; WIDTH] {
        let v = plus_residual_eight::<L, T>(v, chunk.residual, half);
        T::store::<L>(match chunk.activation {
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
    const STREAMS: bool = false;
    type Inputs = (Activation, Row<'a, T>, Option<Row<'a, T>>);
    type Chunk = (Activation, Chunk<'a, T, LANES>, Option<Chunk<'a, T, LANES>>);

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.activation, self.dy.row(r), self.residual.map(|tile| tile.row(r)))
    }
    #[inline(always)]
    fn kind((activation, _, residual): Self::Inputs) -> Kind {
        Kind::of(Some(activation), &residual)
    }
    #[inline(always)]
    fn of_kind<const KIND: u8>((activation, dy, residual): Self::Inputs) -> Self::Inputs {
        let (known, residual) = Kind::known::<KIND, _>(Some(activation), residual);
        (known.unwrap_or(activation), dy, residual)
    }
    #[inline(always)]
    fn flat(&self) -> Self {
        Self { dy: self.dy.flat(), residual: self.residual.map(|tile| tile.flat()), ..*self }
    }
    #[inline(always)]
    fn chunk((activation, dy, residual): Self::Inputs, i: usize) -> Self::Chunk {
        (activation, dy.chunk(i), residual.map(|row| row.chunk(i)))
    }
    #[inline(always)]
    fn prefetch((_, dy, residual): Self::Inputs, i: usize) {
        dy.prefetch(i);
        if let Some(residual) = residual {
            residual.prefetch(i);
        }
    }
    #[inline(always)]
    fn eight<L: Lanes>((activation, dy, residual): Self::Chunk, half: usize, v: T::Vector<L>) -> [T; WIDTH] {
        let v = plus_residual_eight::<L, T>(v, residual, half);
        let passes = T::pass::<L>(dy.part(half), v, T::splat::<L>(T::ROUNDS_TO_ZERO));
        match activation {
            Activation::Relu => passes,
            Activation::Relu6 => T::pass::<L>(passes, T::splat::<L>(T::ROUNDS_TO_SIX), v),
        }
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
/// Each is the number of one channel, or numbers of all channels or columns.
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
