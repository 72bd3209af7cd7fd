//! The fixed partition of a channel's values into blocks.
//!
//! It depends on the layout alone, never on the number of threads, which only decides which thread computes which blocks
//! (contract 3). [`crate::tree`] combines them. Sums of one block stay in registers while the block lies in the first-level cache.

use crate::element::Wide;
use crate::error::Error;
use crate::kernels::{LANES, TOGETHER};
use crate::layout::Layout;
use crate::memory::{collected, try_collected, with_capacity};
use crate::parallel;
use crate::per_channel::PerChannel;
use crate::tree::{Merge, Tree};
use crate::view::{Grid, Rect};
use std::borrow::Cow;
use std::ops::Range;

/// The least number of adjacent values per channel for which the planar kernels are used.
const PLANAR_INNER: usize = 32;
/// Channels with runs shorter than this are summed together, in the order of memory. One by one, each would be read from as
/// many places as it has runs.
const SHORT_RUN: usize = 512;
/// Values in a planar block: 16 KiB of float32.
const PLANAR_BLOCK: usize = 4096;
/// Rows in an interleaved block.
const INTERLEAVED_BLOCK: usize = 256;
/// The largest number of columns that a task sums together: their sums stay in the first-level cache. This constant and the
/// number of tasks do not change the bits of a result.
const STRIP: usize = 1024;
/// The least number of rows in a tile of an elementwise pass, since a tile may first copy the coefficients of its columns.
const LEAST_ROWS: usize = 32;
/// The number of tasks that the statistics are divided into if the layout allows it: enough for the threads of any machine.
const TASKS: usize = 64;
/// With fewer channels than this, tasks of whole channels would leave threads idle.
const FUSED_CHANNELS: usize = 16;

/// The largest number of bytes of x in a group of channels that two passes go over: the second pass finds them in cache.
const SLAB: usize = 4 << 20;
/// The number of groups that the channels are divided into, unless `SLAB` demands more. The runs of a group are adjacent, and
/// long runs are read faster than short ones.
const GROUPS: usize = 32;
/// The least number of bytes of x in a group, of small and of larger tensors, unless there are no more. The runs of a group
/// are adjacent, and two threads hinder each other if they read and write neighbouring runs of a few KiB. Measured on two
/// cores: a training pass over 1 MiB in runs of 512 bytes was slower on two threads than on one; in runs of 4 KiB one over
/// 2 MiB took twice the time of runs of 8 KiB.
const LEAST_GROUP: (usize, usize) = (64 << 10, 128 << 10);
/// The number of groups that a small tensor is divided into.
const LEAST_GROUPS: usize = 8;
/// The largest number of channels in a group, which bounds the memory that a task needs for them.
const GROUP: usize = 1024;

/// The number of elements that one task of an elementwise pass writes: fewer if the tensor is small, so that a thread that
/// wakes late still finds work.
pub(crate) fn tile<T>(layout: Layout) -> usize {
    (layout.len() / 16).clamp((32 << 10) / size_of::<T>(), (256 << 10) / size_of::<T>())
}

/// The kernel family that computes a layout, with its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// Channels lie in runs of `inner` values.
    Planar(Planar),
    /// Rows of `width` columns, each column a channel. A small `inner` is served here too: with `inner` columns a
    /// channel, combined at the end.
    Interleaved(Interleaved),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planar {
    pub(crate) outer: usize,
    pub(crate) channels: usize,
    pub(crate) inner: usize,
    /// Runs in a block (more than 1 only where a block holds whole runs).
    runs: usize,
    /// Values of each run in a block.
    part: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interleaved {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    /// Columns that belong to one channel.
    pub(crate) inner: usize,
}

impl Family {
    pub(crate) fn of(layout: Layout) -> Self {
        let (outer, channels, inner) = (layout.outer(), layout.channels(), layout.inner());
        if inner < PLANAR_INNER {
            return Self::Interleaved(Interleaved { rows: outer, width: channels * inner, inner });
        }
        // Parts of nearly equal length, whole cache lines each.
        let part = inner.div_ceil(inner.div_ceil(PLANAR_BLOCK)).next_multiple_of(64).min(inner);
        Self::Planar(Planar { outer, channels, inner, runs: (PLANAR_BLOCK / inner).max(1), part })
    }
}

impl Planar {
    fn parts(&self) -> usize {
        self.inner.div_ceil(self.part)
    }

    /// Number of blocks in a channel.
    pub(crate) fn blocks(&self) -> usize {
        self.outer.div_ceil(self.runs) * self.parts()
    }

    /// The runs, and the part of each, that make up a block.
    pub(crate) fn block(&self, b: usize) -> (Range<usize>, Range<usize>) {
        let (run, start) = (b / self.parts() * self.runs, b % self.parts() * self.part);
        (run..self.outer.min(run + self.runs), start..self.inner.min(start + self.part))
    }

    /// Elements in a row of the matrix that this layout is.
    pub(crate) fn width(&self) -> usize {
        self.channels * self.inner
    }

    /// The rectangle of that matrix in which a block of some adjacent channels lies: whole runs, or a part of the runs of one
    /// channel.
    pub(crate) fn rect(&self, channels: &Range<usize>, (runs, part): (Range<usize>, Range<usize>)) -> Rect {
        Rect { rows: runs, cols: channels.start * self.inner + part.start..(channels.end - 1) * self.inner + part.end }
    }

    /// Whether there are enough channels to give each task whole channels, so that the second pass over a channel finds it
    /// in cache.
    pub(crate) fn fuses(&self) -> bool {
        self.channels >= FUSED_CHANNELS
    }

    /// Channels in a group, for work that passes over it twice: `element` bytes each.
    pub(crate) fn group(&self, element: usize) -> usize {
        let channel = (self.outer * self.inner * element).max(1);
        let bytes = (self.channels * channel / LEAST_GROUPS).clamp(LEAST_GROUP.0, LEAST_GROUP.1);
        let least = bytes.div_ceil(channel).min(self.channels);
        self.channels.div_ceil(GROUPS).max(least).min(SLAB / channel).clamp(1, GROUP)
    }

    /// The matrix cut into groups of so many channels.
    pub(crate) fn groups(&self, group: usize) -> Grid {
        Grid::new(self.outer, self.width(), self.outer, group * self.inner)
    }

    /// The result of each of some adjacent channels: the tree over the partial results that `f(channels, block)` returns.
    ///
    /// Memory is read in its order as far as the blocks allow: the same runs of all channels, then the next runs; or part by
    /// part, if a run is longer than a block. There must be at least one block.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn fold<P: Merge>(
        &self,
        channels: Range<usize>,
        blocks: Range<usize>,
        f: impl Fn(Range<usize>, (Range<usize>, Range<usize>)) -> Result<Vec<P>, Error>,
    ) -> Result<Vec<P>, Error> {
        let parts = self.parts();
        let mut trees: Vec<Tree<P>> = collected(channels.clone().map(|_| Tree::new()))?;
        for band in blocks.start / parts..blocks.end.div_ceil(parts) {
            let blocks = blocks.start.max(band * parts)..blocks.end.min((band + 1) * parts);
            let together = if self.inner < SHORT_RUN { TOGETHER } else { 1 };
            for (i, c) in (0..trees.len()).step_by(together).zip(channels.clone().step_by(together)) {
                let trees = &mut trees[i..channels.len().min(i + together)];
                for b in blocks.clone() {
                    let leaves = f(c..c + trees.len(), self.block(b))?;
                    trees.iter_mut().zip(leaves).try_for_each(|(tree, leaf)| tree.push(leaf))?;
                }
            }
        }
        collected(trees.into_iter().map(Tree::finish))
    }

    /// The channels of a rectangle of [`Planar::groups`].
    pub(crate) fn channels_of(&self, rect: &Rect) -> Range<usize> {
        rect.cols.start / self.inner..rect.cols.end / self.inner
    }

    /// The same memory as planes, each of one channel, in rectangles of about `elements`: plane p is of channel
    /// p mod `channels`.
    pub(crate) fn planes(&self, elements: usize) -> Grid {
        Grid::new(self.outer * self.channels, self.inner, elements / self.inner, elements)
    }

    /// The result of every channel: the tree over the partial results that `f(channels, block)` returns. If there are few
    /// channels, tasks are spans of blocks.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn map_channels<P: Merge + Send + Sync>(
        &self,
        bytes: usize,
        f: impl Fn(Range<usize>, (Range<usize>, Range<usize>)) -> Result<Vec<P>, Error> + Sync,
    ) -> Result<Vec<P>, Error> {
        let (blocks, group) = (self.blocks(), self.channels.div_ceil(TASKS));
        let span = span_of(blocks, TASKS / self.channels);
        let spans = blocks.div_ceil(span);
        // Task by task the spans of one group of channels, then the next group.
        let parts = parallel::map(self.channels.div_ceil(group) * spans, bytes, |task| {
            let (g, s) = (task / spans, task % spans);
            let channels = g * group..self.channels.min((g + 1) * group);
            let blocks = s * span..blocks.min((s + 1) * span);
            self.fold(channels, blocks, &f).map(Vec::into_iter)
        })?;
        combined(parts, self.channels, spans, group)
    }
}

/// The tree of channel after channel over its spans, which lie task after task: those of a group, each with a value a
/// channel.
#[allow(clippy::expect_used, reason = "a lost value would shift those of all later channels")]
fn combined<P: Merge>(
    mut parts: Vec<std::vec::IntoIter<P>>,
    channels: usize,
    spans: usize,
    group: usize,
) -> Result<Vec<P>, Error> {
    try_collected((0..channels).map(|c| {
        let first = c / group * spans;
        let of_channel = parts[first..first + spans].iter_mut();
        Tree::of(of_channel.map(|part| Ok(part.next().expect("each span has a value for each channel of its group"))))
    }))
}

impl Interleaved {
    /// Number of blocks in a column.
    pub(crate) fn blocks(&self) -> usize {
        self.rows.div_ceil(INTERLEAVED_BLOCK)
    }

    /// The rows of a block.
    pub(crate) fn block(&self, b: usize) -> Range<usize> {
        let row = b * INTERLEAVED_BLOCK;
        row..self.rows.min(row + INTERLEAVED_BLOCK)
    }

    /// The result of every channel: the tree over the partial results that `f(columns, blocks)` returns of a strip of columns,
    /// from which `close` makes those of its channels.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn map_strips<P: Merge + Send + Sync, C: Send + Sync>(
        &self,
        bytes: usize,
        f: impl Fn(Range<usize>, Range<usize>) -> Result<P, Error> + Sync,
        close: impl Fn(P) -> Result<Vec<C>, Error> + Sync,
    ) -> Result<Vec<C>, Error> {
        let blocks = self.blocks();
        let span = span_of(blocks, TASKS);
        let spans = blocks.div_ceil(span);
        // Few rows make few spans; then columns are shared out instead, in whole channels and about whole cache lines.
        let share = self.width.div_ceil(TASKS / 8 / spans.min(TASKS / 8)).next_multiple_of(64).min(STRIP);
        let strip = share.next_multiple_of(self.inner);
        let columns = |t: usize| t * strip..self.width.min((t + 1) * strip);
        let strips = self.width.div_ceil(strip);
        if spans == 1 {
            // Strips are closed where they are computed: with few rows, columns take as much memory as x.
            let closed = parallel::map(strips, bytes, |t| close(f(columns(t), 0..blocks)?))?;
            let mut channels = with_capacity(self.width / self.inner)?;
            channels.extend(closed.into_iter().flatten());
            return Ok(channels);
        }
        let parts = parallel::map(strips * spans, bytes, |task| {
            let (t, s) = (task / spans, task % spans);
            f(columns(t), s * span..blocks.min((s + 1) * span))
        })?;
        let (mut parts, mut channels) = (parts.into_iter(), with_capacity(self.width / self.inner)?);
        for _ in 0..strips {
            channels.extend(close(Tree::of(parts.by_ref().take(spans).map(Ok))?)?);
        }
        Ok(channels)
    }

    /// Rectangles of about `elements` for a pass that maps every element by itself.
    pub(crate) fn tiles(&self, elements: usize) -> Grid {
        let cols = self.width.clamp(1, 4 * STRIP);
        Grid::new(self.rows, self.width, (elements / cols).max(LEAST_ROWS), cols)
    }

    /// The number of each column's channel, for each of the columns; then those of the first [`LANES`] columns once more.
    /// Where each column is a channel and numbers are float64, they are not copied.
    pub(crate) fn columns<'a, W: Wide>(
        &self,
        numbers: &'a PerChannel,
        columns: Range<usize>,
    ) -> Result<Cow<'a, [W]>, Error> {
        if self.inner == 1
            && let Some(shared) = W::shared(numbers.and_more(columns.clone()))
        {
            return Ok(Cow::Borrowed(shared));
        }
        let numbers = numbers.as_slice();
        self.spread(columns, LANES, |c| W::from_f64(numbers[c])).map(Cow::Owned)
    }

    /// The same for numbers that kernels take as they are.
    pub(crate) fn copies<'a, V: Copy>(
        &self,
        numbers: &'a PerChannel<V>,
        columns: Range<usize>,
    ) -> Result<Cow<'a, [V]>, Error> {
        match self.inner {
            1 => Ok(Cow::Borrowed(numbers.and_more(columns))),
            _ => self.spread(columns, LANES, |c| numbers.as_slice()[c]).map(Cow::Owned),
        }
    }

    /// The value of each column's channel, for each of the columns; then those of the first `again` columns once more.
    pub(crate) fn spread<V: Copy>(
        &self,
        columns: Range<usize>,
        again: usize,
        value: impl Fn(usize) -> V,
    ) -> Result<Vec<V>, Error> {
        let n = columns.len();
        let mut values = with_capacity(n + again)?;
        // Channel by channel: to ask for the channel of each column takes several times as long.
        let (mut c, mut end) = (columns.start / self.inner, 0);
        while end < n {
            end = n.min((c + 1) * self.inner - columns.start);
            values.resize(end, value(c));
            c += 1;
        }
        for i in 0..again {
            values.push(values[i]); // of fewer columns than `again`, those that stand again do so once more
        }
        Ok(values)
    }
}

/// The number of blocks in a span: the largest power of two that gives at least `spans` spans, if there are that many blocks.
pub(crate) fn span_of(blocks: usize, spans: usize) -> usize {
    let most = (blocks / spans.max(1)).max(1);
    1 << most.ilog2()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;

    #[test]
    fn spans_are_whole_trees_and_enough() {
        for blocks in 1..300 {
            for spans in [0, 1, 3, 64] {
                let span = span_of(blocks, spans);
                assert!(span.is_power_of_two() && blocks.div_ceil(span) >= spans.min(blocks), "{blocks} {spans}");
            }
        }
    }

    #[test]
    fn blocks_cover_every_value_once() {
        for (outer, inner) in [(1, 32), (5, 49), (200, 49), (3, 4096), (2, 4097), (2, 12544), (1, 1_000_003)] {
            let Family::Planar(planar) = Family::of(Layout::new(outer, 2, inner).unwrap()) else {
                unreachable!("inner = {inner} is planar");
            };
            let mut seen = vec![0u8; outer * inner];
            for b in 0..planar.blocks() {
                let (runs, part) = planar.block(b);
                assert!(!runs.is_empty() && !part.is_empty() && runs.len() * part.len() <= PLANAR_BLOCK);
                for run in runs {
                    part.clone().for_each(|i| seen[run * inner + i] += 1);
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{outer} x {inner}");
        }
    }
}
