//! Patches: some positions of some adjacent channels, as a matrix of float64 that linear algebra takes.
//!
//! Positions are what a channel's values are counted by: the m of the paper, outer·inner of them. As everywhere, the cut into
//! patches depends on the layout alone (contract 3).

use crate::element::Element;
use crate::error::Error;
use crate::input::Input;
use crate::kernels::{GatherRows, GatherRuns, Rows, ScaleAndShift, ScatterRows, ScatterRuns};
use crate::layout::Layout;
use crate::memory::{self, zeros};
use crate::simd::dispatch;
use crate::view::{Grid, Rect, Tile, TileMut, ViewMut};
use faer::{MatMut, MatRef};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The number of positions in a patch, as far as the layout allows; more of them if the matrices of groups, which are packed
/// for the product with each patch, leave the nearest caches.
const POSITIONS: (usize, usize) = (256, 512);
/// The number of channels in a patch, unless a group has more.
pub(crate) const STRIP: usize = 256;
/// Work on a patch takes as long as moving so many times fewer bytes than its multiplications.
const MULTIPLICATIONS_PER_BYTE: usize = 16;

/// Scratch memory that the tasks of a pass hand on to each other: to get fresh memory takes longer than many a patch.
pub(crate) struct Spare<S>(Mutex<Vec<S>>);

impl<S> Spare<S> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Calls `f` with memory that is spare, or that `make` returns.
    ///
    /// # Errors
    /// What `make` or `f` returned.
    pub(crate) fn with<R>(
        &self,
        make: impl FnOnce() -> Result<S, Error>,
        f: impl FnOnce(&mut S) -> Result<R, Error>,
    ) -> Result<R, Error> {
        // Each value is moved whole, so a panic cannot have left the list half changed.
        let spare = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = spare().pop();
        let mut scratch = taken.map_or_else(make, Ok)?;
        let result = f(&mut scratch);
        memory::push(&mut spare(), scratch)?;
        result
    }
}

/// How a tensor is cut into patches.
#[derive(Clone, Copy)]
pub(crate) struct Patches {
    layout: Layout,
    /// Channels in a group; 1 or more, a divisor of all channels.
    pub(crate) group: usize,
    /// Channels in a strip: whole groups.
    strip: usize,
    /// Rows in a patch.
    rows: usize,
    /// Of each run of `inner` values.
    part: usize,
}

impl Patches {
    /// # Errors
    /// [`Error::Groups`].
    pub(crate) fn of(layout: Layout, groups: usize) -> Result<Self, Error> {
        let channels = layout.channels();
        let group = Error::check_groups(groups, channels)?;
        let strip = (STRIP / group).clamp(1, groups) * group;
        let inner = layout.inner().max(1);
        let positions = if group > STRIP { POSITIONS.1 } else { POSITIONS.0 };
        Ok(Self { layout, group, strip, rows: (positions / inner).max(1), part: inner.min(positions) })
    }

    pub(crate) fn channels(&self) -> usize {
        self.layout.channels()
    }

    pub(crate) fn groups(&self) -> usize {
        self.channels() / self.group
    }

    pub(crate) fn strips(&self) -> usize {
        self.channels().div_ceil(self.strip)
    }

    pub(crate) fn strip(&self, s: usize) -> Range<usize> {
        s * self.strip..self.channels().min((s + 1) * self.strip)
    }

    /// Elements in a row of the matrix that the tensor is.
    pub(crate) fn width(&self) -> usize {
        self.channels() * self.layout.inner()
    }

    fn parts(&self) -> usize {
        self.layout.inner().div_ceil(self.part)
    }

    /// Number of patches in a strip.
    pub(crate) fn len(&self) -> usize {
        self.layout.outer().div_ceil(self.rows) * self.parts()
    }

    /// Where patch `p` of some channels lies.
    pub(crate) fn rect(&self, channels: &Range<usize>, p: usize) -> Rect {
        let row = p / self.parts() * self.rows;
        let rows = row..self.layout.outer().min(row + self.rows);
        Rect { rows, cols: self.columns(channels, p % self.parts()) }
    }

    fn columns(&self, channels: &Range<usize>, part: usize) -> Range<usize> {
        let (inner, start) = (self.layout.inner(), part * self.part);
        let end = inner.min(start + self.part);
        channels.start * inner + start..(channels.end - 1) * inner + end
    }

    /// What threads are asked for: as if so many bytes were moved, for products of patches with matrices of a group.
    pub(crate) fn work(&self) -> usize {
        self.layout.len().saturating_mul(self.group.max(MULTIPLICATIONS_PER_BYTE)) / MULTIPLICATIONS_PER_BYTE
    }

    /// An empty patch, with room for so many channels, or for a strip.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn room(&self, most: Option<usize>) -> Result<Patch, Error> {
        let values = zeros(most.unwrap_or(self.strip) * self.rows * self.part)?;
        Ok(Patch { values, channels: 0, positions: 0, inner: self.layout.inner() })
    }

    /// Calls `f` once with each patch of y, and the channels and the rectangle that it is, on several threads where that
    /// pays. Of `scratch` there is one for each thread.
    ///
    /// # Errors
    /// [`Error::NoMemory`] before `f` is called, or what `f` returned.
    pub(crate) fn write<T: Element, S: Send>(
        &self,
        y: &mut ViewMut<'_, T>,
        scratch: impl Fn() -> Result<S, Error> + Sync,
        f: impl Fn(&mut S, &Range<usize>, &Rect, &TileMut<'_, T>) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        let inner = self.layout.inner();
        let grid = Grid::new(self.layout.outer(), self.width(), self.rows, self.strip * inner);
        let spare = Spare::new();
        y.map_work(&grid, self.work(), |rect, y| {
            let channels = rect.cols.start / inner..rect.cols.end / inner;
            spare.with(&scratch, |scratch| {
                (0..self.parts()).try_for_each(|part| {
                    let cols = self.columns(&(0..channels.len()), part);
                    let own = Rect { rows: 0..rect.rows.len(), cols };
                    f(scratch, &channels, &own.within(rect), &y.part(&own))
                })
            })
        })
    }

    /// The part of the input that is written to a patch of the output.
    pub(crate) fn input<'b, 'a: 'b, T: Element>(
        &self,
        x: &Input<'a, T>,
        rect: &Rect,
        y: &'b TileMut<'_, T>,
    ) -> Tile<'b, T> {
        x.tile(self.width(), rect, y)
    }
}

/// A matrix of channels × positions in float64.
///
/// It lies in the tensor's order: position after position if each column of the tensor is a channel, else channel after channel.
pub(crate) struct Patch {
    values: Vec<f64>,
    channels: usize,
    positions: usize,
    inner: usize,
}

impl Patch {
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    pub(crate) fn positions(&self) -> usize {
        self.positions
    }

    /// The place of a value of a channel at a position.
    fn place(&self, channel: usize, position: usize) -> usize {
        if self.by_position() { position * self.channels + channel } else { channel * self.positions + position }
    }

    /// Calls `f` with channel, position and value of each value, those of a channel in the order of positions.
    pub(crate) fn each(&self, mut f: impl FnMut(usize, usize, f64)) {
        for channel in 0..self.channels {
            for position in 0..self.positions {
                f(channel, position, self.values[self.place(channel, position)]);
            }
        }
    }

    /// Adds each value, times a factor of its channel and position, to the same value of another patch.
    pub(crate) fn add_to(&self, to: &mut Self, factor: impl Fn(usize, usize) -> f64) {
        self.each(|channel, position, v| to.values[self.place(channel, position)] += factor(channel, position) * v);
    }

    /// Whether the values of a position are adjacent, and not those of a channel.
    pub(crate) fn by_position(&self) -> bool {
        self.inner == 1
    }

    pub(crate) fn values(&self) -> &[f64] {
        &self.values[..self.channels * self.positions]
    }

    /// Values from `channel` of the first position on, as [`Patch::by_position`] says.
    pub(crate) fn rows(&self, channel: usize) -> Rows<'_> {
        match self.by_position() {
            true => Rows { values: &self.values()[channel..], stride: self.channels },
            false => Rows { values: &self.values()[channel * self.positions..], stride: self.positions },
        }
    }

    /// The same to be written, and the stride.
    pub(crate) fn rows_mut(&mut self, channel: usize) -> (&mut [f64], usize) {
        let n = self.channels * self.positions;
        match self.by_position() {
            true => (&mut self.values[channel..n], self.channels),
            false => (&mut self.values[channel * self.positions..n], self.positions),
        }
    }

    /// The matrix of some channels.
    pub(crate) fn matrix(&self, channels: Range<usize>) -> MatRef<'_, f64> {
        let whole = match self.by_position() {
            true => MatRef::from_column_major_slice(self.values(), self.channels, self.positions),
            false => MatRef::from_row_major_slice(self.values(), self.channels, self.positions),
        };
        whole.subrows(channels.start, channels.len())
    }

    /// The same to be written.
    pub(crate) fn matrix_mut(&mut self, channels: Range<usize>) -> MatMut<'_, f64> {
        let n = self.channels * self.positions;
        let whole = match self.by_position() {
            true => MatMut::from_column_major_slice_mut(&mut self.values[..n], self.channels, self.positions),
            false => MatMut::from_row_major_slice_mut(&mut self.values[..n], self.channels, self.positions),
        };
        whole.subrows_mut(channels.start, channels.len())
    }

    /// Becomes as large as another patch.
    pub(crate) fn like(&mut self, other: &Self) {
        (self.channels, self.positions) = (other.channels, other.positions);
    }

    /// Reads x − mean from the part of a tensor; `mean` is of each of its channels.
    pub(crate) fn gather<T: Element>(&mut self, x: Tile<'_, T>, mean: &[f64]) {
        self.channels = mean.len();
        let run = x.cols() - (self.channels - 1) * self.inner;
        self.positions = x.rows() * run;
        let (inner, to) = (self.inner, &mut self.values[..self.channels * self.positions]);
        match inner {
            1 => dispatch(GatherRows { x, mean, to }),
            _ => dispatch(GatherRuns { x, inner, run, mean, to }),
        }
    }

    /// Writes scale·v + shift to the part of a tensor.
    pub(crate) fn scatter<T: Element>(&self, scale: &[f64], shift: &[f64], y: &TileMut<'_, T>) {
        let (from, inner, with) = (self.values(), self.inner, ScaleAndShift { scale, shift });
        match inner {
            1 => dispatch(ScatterRows { from, with, y }),
            _ => dispatch(ScatterRuns { from, inner, run: y.cols() - (self.channels - 1) * inner, with, y }),
        }
    }
}
