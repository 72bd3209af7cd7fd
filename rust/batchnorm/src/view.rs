//! Views of tensors: memory with a [`Layout`], cut into tiles that several threads write at the same time.
//!
//! Elements may lie at any byte address. A view is read as a matrix of `rows` × `width` elements and cut into [`Tile`]s,
//! which are rectangles of that matrix. Rectangles of a [`Grid`] are disjoint by construction, which is why
//! [`ViewMut::map_tiles`] may hand them to several threads.

#![allow(unsafe_code, reason = "raw tensor memory: unaligned, and written in parts by several threads")]

mod tile;

use crate::{cache, element::Element, error::Error, layout::Layout, parallel};
use std::{marker::PhantomData, ops::Range};
pub(crate) use tile::{Buffer, Chunk, ChunkMut, LINE, Row, RowMut, Tile, TileMut};

/// The share of the last-level cache from which an output is written with non-temporal stores: the input and what else is live
/// want room too. Measured with 32 MiB: from 8 to 16 MiB passes take as long either way, above that 1.2 times as long without. In
/// the program of a host library none is, since its next operator reads the output from the caches.
const STREAM_FROM: usize = 4;

/// Makes this thread's non-temporal stores visible to every thread that synchronizes with it afterwards.
#[inline]
fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of SSE2, which every x86-64 has.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// A tensor that is read: borrowed memory with a [`Layout`].
#[derive(Clone, Copy)]
pub struct View<'a, T: Copy> {
    data: *const T,
    layout: Layout,
    memory: PhantomData<&'a [T]>,
}

// SAFETY: a `View` only reads memory that nobody writes for `'a`, or (in place) that `map_tiles` hands to one thread at
// a time; `T` is plain data.
unsafe impl<T: Element> Send for View<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for View<'_, T> {}

impl<'a, T: Element> View<'a, T> {
    /// The tensor that a slice holds.
    ///
    /// # Errors
    /// [`Error::Elements`] if the length of the slice is not `layout.len()`.
    pub fn new(data: &'a [T], layout: Layout) -> Result<Self, Error> {
        check_length("x", data.len(), layout)?;
        // SAFETY: the slice is readable for `'a` and holds `layout.len()` elements.
        Ok(unsafe { Self::from_raw(data.as_ptr(), layout) })
    }

    /// The tensor at an address, which need not be aligned.
    ///
    /// # Safety
    /// `layout.len()` elements at `data` must be readable, and nobody may write them for `'a`.
    pub unsafe fn from_raw(data: *const T, layout: Layout) -> Self {
        Self { data, layout, memory: PhantomData }
    }

    /// The layout of the tensor.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.layout.len() * size_of::<T>()
    }

    /// The rectangle `rect` of this tensor, read as a matrix with rows of `width` elements.
    #[inline]
    pub(crate) fn tile(&self, width: usize, rect: &Rect) -> Tile<'a, T> {
        rect.check(self.layout.len(), width);
        // SAFETY: the rectangle lies within `len` elements, as just checked.
        let data = unsafe { self.data.add(rect.offset(width)) };
        Tile { data, rows: rect.rows.len(), cols: rect.cols.len(), stride: width, memory: PhantomData }
    }
}

/// A tensor that is written: mutably borrowed memory with a [`Layout`].
///
/// Its old contents are read only where they are the input ([`crate::Input::InPlace`]).
pub struct ViewMut<'a, T: Copy> {
    data: *mut T,
    layout: Layout,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: a `ViewMut` is the only one that writes its memory for `'a`; `T` is plain data.
unsafe impl<T: Element> Send for ViewMut<'_, T> {}
// SAFETY: through a shared reference only `map_tiles` writes, and it takes `&mut self`.
unsafe impl<T: Element> Sync for ViewMut<'_, T> {}

impl<'a, T: Element> ViewMut<'a, T> {
    /// The tensor that a slice holds.
    ///
    /// # Errors
    /// [`Error::Elements`] if the length of the slice is not `layout.len()`.
    pub fn new(data: &'a mut [T], layout: Layout) -> Result<Self, Error> {
        check_length("out", data.len(), layout)?;
        // SAFETY: the slice is writable for `'a` and holds `layout.len()` elements.
        Ok(unsafe { Self::from_raw(data.as_mut_ptr(), layout) })
    }

    /// The tensor at an address, which need not be aligned.
    ///
    /// # Safety
    /// `layout.len()` elements at `data` must be writable, and nobody else may read or write them for `'a`.
    pub unsafe fn from_raw(data: *mut T, layout: Layout) -> Self {
        Self { data, layout, memory: PhantomData }
    }

    /// The layout of the tensor.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.layout.len() * size_of::<T>()
    }

    /// A view that reads this tensor; the tensor cannot be written while the view exists.
    pub fn as_view(&self) -> View<'_, T> {
        View { data: self.data, layout: self.layout, memory: PhantomData }
    }

    /// Calls `f` once with every rectangle of `grid`, on several threads where that pays.
    ///
    /// The last rectangle is computed first: the pass before this one has left the end of the memory in cache.
    ///
    /// # Errors
    /// [`Error::NoMemory`] before `f` is called, or what `f` returned.
    pub(crate) fn map_tiles(
        &mut self,
        grid: &Grid,
        f: impl Fn(&Rect, TileMut<'_, T>) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        self.map_work(grid, self.bytes(), f)
    }

    /// The same for work that takes as long as moving `bytes`.
    ///
    /// # Errors
    /// [`Error::NoMemory`] before `f` is called, or what `f` returned.
    pub(crate) fn map_work(
        &mut self,
        grid: &Grid,
        bytes: usize,
        f: impl Fn(&Rect, TileMut<'_, T>) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        let (len, data) = (self.layout.len(), SendPtr(self.data));
        let streaming = self.bytes() >= cache::last_level() / STREAM_FROM && !parallel::is_hosted();
        let tiles = grid.len();
        parallel::map(tiles, bytes, |i| {
            let rect = grid.rect(tiles - 1 - i);
            rect.check(len, grid.width);
            // SAFETY: the rectangle lies within `len` elements, as just checked.
            let data = unsafe { data.get().add(rect.offset(grid.width)) };
            // Rectangles of a grid are disjoint and `parallel::map` calls with every `i` once, so no two tiles that
            // live at the same time share an element.
            let tile = TileMut {
                data,
                rows: rect.rows.len(),
                cols: rect.cols.len(),
                stride: grid.width,
                streaming,
                memory: PhantomData,
            };
            let result = f(&rect, tile);
            fence();
            result
        })
        .map(drop)
    }
}

#[derive(Clone, Copy)]
struct SendPtr<T: Copy>(*mut T);
// SAFETY: only `map_tiles` dereferences it, in disjoint rectangles.
unsafe impl<T: Copy> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Copy> Sync for SendPtr<T> {}

impl<T: Copy> SendPtr<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

fn check_length(argument: &'static str, got: usize, layout: Layout) -> Result<(), Error> {
    let wanted = layout.len();
    if got == wanted { Ok(()) } else { Err(Error::Elements { argument, got, wanted }) }
}

/// A rectangle of a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rect {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl Rect {
    /// This rectangle of a rectangle `outer`, as one of the whole matrix.
    pub(crate) fn within(&self, outer: &Self) -> Self {
        let moved = |part: &Range<usize>, start: usize| start + part.start..start + part.end;
        Self { rows: moved(&self.rows, outer.rows.start), cols: moved(&self.cols, outer.cols.start) }
    }

    fn offset(&self, width: usize) -> usize {
        self.rows.start * width + self.cols.start
    }

    /// Panics if the rectangle is not within a matrix of `len` elements in rows of `width`, which is a bug in this crate.
    fn check(&self, len: usize, width: usize) {
        let inside = self.rows.start < self.rows.end
            && self.cols.start < self.cols.end
            && self.cols.end <= width
            && self.rows.end <= len / width;
        assert!(inside, "{self:?} leaves a matrix of {len} elements in rows of {width}");
    }
}

/// A matrix of `rows` × `width` cut into disjoint rectangles of `row_step` × `col_step`, row by row.
#[derive(Debug, Clone)]
pub(crate) struct Grid {
    rows: usize,
    width: usize,
    row_step: usize,
    col_step: usize,
}

impl Grid {
    pub(crate) fn new(rows: usize, width: usize, row_step: usize, col_step: usize) -> Self {
        Self { rows, width, row_step: row_step.max(1), col_step: col_step.max(1) }
    }

    fn across(&self) -> usize {
        self.width.div_ceil(self.col_step)
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.div_ceil(self.row_step) * self.across()
    }

    pub(crate) fn rect(&self, i: usize) -> Rect {
        let (r, c) = (i / self.across() * self.row_step, i % self.across() * self.col_step);
        Rect { rows: r..self.rows.min(r + self.row_step), cols: c..self.width.min(c + self.col_step) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;

    #[test]
    fn large_outputs_are_streamed_except_in_the_program_of_a_host() {
        let streams = |bytes: usize| {
            let (mut y, layout) = (vec![0.0; bytes / 8], Layout::new(bytes / 8, 1, 1).unwrap());
            let mut found = None;
            let grid = Grid::new(1, bytes / 8, 1, bytes / 8);
            let seen = std::sync::Mutex::new(&mut found);
            ViewMut::new(&mut y, layout)
                .unwrap()
                .map_tiles(&grid, |_, tile| {
                    **seen.lock().unwrap() = Some(tile.streaming);
                    Ok(())
                })
                .unwrap();
            found.unwrap()
        };
        let least = cache::last_level() / STREAM_FROM;
        assert!(streams(least.next_multiple_of(8)));
        assert!(!streams(least - 8));
        assert!(!parallel::hosted(None, 2, || streams(2 * least)));
    }
}
