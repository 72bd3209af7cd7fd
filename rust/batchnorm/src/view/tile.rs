//! Tiles: rectangles of tensors, their rows, and how elements are loaded from and stored to them.

use super::Rect;
use crate::element::Element;
use std::{marker::PhantomData, mem::MaybeUninit};

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;
/// Bytes that one non-temporal store writes.
#[cfg(target_arch = "x86_64")]
const VECTOR: usize = 16;
/// On other machines there are no non-temporal stores here.
#[cfg(not(target_arch = "x86_64"))]
const VECTOR: usize = 1;

/// A rectangle of a tensor that is read.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a, T: Copy> {
    pub(super) data: *const T,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
    pub(super) memory: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Tile<'a, T> {
    #[inline(always)]
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from the start of a row to the start of the next.
    #[inline(always)]
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> Row<'a, T> {
        assert!(r < self.rows);
        // SAFETY: row `r` lies within the rectangle.
        let data = unsafe { self.data.add(r * self.stride) };
        Row { data, len: self.cols, memory: PhantomData }
    }

    /// This rectangle as one row if its rows are adjacent in memory, else unchanged.
    #[inline(always)]
    pub(crate) fn flat(&self) -> Self {
        let (rows, cols) = if self.cols == self.stride { (1, self.rows * self.cols) } else { (self.rows, self.cols) };
        Self { rows, cols, ..*self }
    }

    /// The part of this rectangle in the given rows and columns.
    #[inline(always)]
    pub(crate) fn part(&self, Rect { rows, cols }: &Rect) -> Self {
        assert!(rows.start < rows.end && rows.end <= self.rows && cols.start < cols.end && cols.end <= self.cols);
        // SAFETY: the part lies within this rectangle.
        let data = unsafe { self.data.add(rows.start * self.stride + cols.start) };
        Self { data, rows: rows.len(), cols: cols.len(), ..*self }
    }

    /// Row `r` as a rectangle with rows of `width` elements.
    #[inline(always)]
    pub(crate) fn split_row(&self, r: usize, width: usize) -> Self {
        assert!(r < self.rows && self.cols.is_multiple_of(width));
        // SAFETY: row `r` lies within the rectangle.
        let data = unsafe { self.data.add(r * self.stride) };
        Self { data, rows: self.cols / width, cols: width, stride: width, memory: PhantomData }
    }
}

/// A rectangle of a tensor that is written. It belongs to one thread (raw pointers are not `Sync`), so reading it through
/// [`TileMut::as_tile`] between writes is not a data race.
pub(crate) struct TileMut<'a, T: Copy> {
    pub(super) data: *mut T,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
    /// Whether the tensor is so large that non-temporal stores pay: ordinary ones would evict data still to be read.
    pub(super) streaming: bool,
    pub(super) memory: PhantomData<&'a mut [T]>,
}

impl<'a, T: Element> TileMut<'a, T> {
    /// `rows` adjacent rows of `cols` elements at the start of a slice.
    pub(crate) fn of(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= data.len());
        Self { data: data.as_mut_ptr(), rows, cols, stride: cols, streaming: false, memory: PhantomData }
    }

    /// This rectangle, written with ordinary stores because it is read again at once.
    #[inline(always)]
    pub(crate) fn cached(&self) -> TileMut<'_, T> {
        TileMut { streaming: false, ..*self }
    }

    #[inline(always)]
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The part of this rectangle in the given rows and columns.
    #[inline(always)]
    pub(crate) fn part(&self, Rect { rows, cols }: &Rect) -> TileMut<'_, T> {
        assert!(rows.start < rows.end && rows.end <= self.rows && cols.start < cols.end && cols.end <= self.cols);
        // SAFETY: the part lies within this rectangle.
        let data = unsafe { self.data.add(rows.start * self.stride + cols.start) };
        TileMut { data, rows: rows.len(), cols: cols.len(), ..*self }
    }

    /// This rectangle as one row if its rows are adjacent in memory, else unchanged.
    #[inline(always)]
    pub(crate) fn flat(&self) -> TileMut<'_, T> {
        let (rows, cols) = if self.cols == self.stride { (1, self.rows * self.cols) } else { (self.rows, self.cols) };
        TileMut { rows, cols, ..*self }
    }

    /// This rectangle as one row if rows are adjacent in memory both here and in `x`, else unchanged.
    #[inline(always)]
    pub(crate) fn flat_with(&self, x: &Tile<'_, T>) -> TileMut<'_, T> {
        if x.cols == x.stride { self.flat() } else { TileMut { ..*self } }
    }

    /// Whether to write with non-temporal stores.
    #[inline(always)]
    pub(crate) fn streaming(&self) -> bool {
        self.streaming && self.is_aligned()
    }

    /// Whether elements are aligned, so that cache lines begin with whole elements.
    #[inline(always)]
    pub(crate) fn is_aligned(&self) -> bool {
        (self.data as usize).is_multiple_of(size_of::<T>())
    }

    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> RowMut<'_, T> {
        assert!(r < self.rows);
        // SAFETY: row `r` lies within the rectangle.
        let data = unsafe { self.data.add(r * self.stride) };
        RowMut { data, len: self.cols, memory: PhantomData }
    }

    /// Row `r` as a rectangle with rows of `width` elements.
    #[inline(always)]
    pub(crate) fn split_row(&self, r: usize, width: usize) -> TileMut<'_, T> {
        assert!(r < self.rows && self.cols.is_multiple_of(width));
        // SAFETY: row `r` lies within the rectangle.
        let data = unsafe { self.data.add(r * self.stride) };
        TileMut { data, rows: self.cols / width, cols: width, stride: width, ..*self }
    }

    /// This rectangle as the input of a kernel that works in place.
    #[inline(always)]
    pub(crate) fn as_tile(&self) -> Tile<'_, T> {
        Tile { data: self.data, rows: self.rows, cols: self.cols, stride: self.stride, memory: PhantomData }
    }
}

/// Adjacent elements that are read. It holds a pointer and not a slice, because a kernel that works in place writes the
/// same elements meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a, T: Copy> {
    data: *const T,
    len: usize,
    memory: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Row<'a, T> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Elements `i .. i + len` as a row.
    #[inline(always)]
    pub(crate) fn part(&self, i: usize, len: usize) -> Self {
        assert!(i <= self.len && len <= self.len - i);
        Self { data: self.data.wrapping_add(i), len, memory: PhantomData }
    }

    /// Element `i`.
    #[inline(always)]
    pub(crate) fn one(&self, i: usize) -> T {
        assert!(i < self.len);
        // SAFETY: element `i` lies within the row, as just checked; `T` is plain data, at any address.
        unsafe { self.data.add(i).read_unaligned() }
    }

    /// Elements `i .. i + N`. Bounds are checked here once, and not again when they are loaded.
    #[inline(always)]
    pub(crate) fn chunk<const N: usize>(&self, i: usize) -> Chunk<'a, T, N> {
        assert!(N <= self.len && i <= self.len - N);
        Chunk { data: self.data.wrapping_add(i), memory: PhantomData }
    }

    /// Prefetches the cache line of element `i`, which may lie outside the row.
    #[inline(always)]
    pub(crate) fn prefetch(&self, i: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch has no effect that the program can see, and does not fail at any address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.data.wrapping_add(i).cast());
        }
    }
}

/// `N` adjacent elements that are read.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'a, T: Copy, const N: usize> {
    data: *const T,
    memory: PhantomData<&'a [T]>,
}

impl<T: Element, const N: usize> Chunk<'_, T, N> {
    /// Part `k` of `M` elements.
    #[inline(always)]
    pub(crate) fn part<const M: usize>(&self, k: usize) -> [T; M] {
        assert!((k + 1) * M <= N); // of constants
        // SAFETY: the part lies within the chunk, which `Row::chunk` has checked to lie within its row.
        unsafe { self.data.add(k * M).cast::<[T; M]>().read_unaligned() }
    }
}

/// Adjacent elements that are written.
pub(crate) struct RowMut<'a, T: Copy> {
    data: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<T: Element> RowMut<'_, T> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Elements `i .. i + len` as a row; both write the same memory, by turns.
    #[inline(always)]
    pub(crate) fn part(&self, i: usize, len: usize) -> RowMut<'_, T> {
        assert!(i <= self.len && len <= self.len - i);
        RowMut { data: self.data.wrapping_add(i), len, memory: PhantomData }
    }

    /// Writes element `i`.
    #[inline(always)]
    pub(crate) fn put_one(&self, i: usize, value: T) {
        assert!(i < self.len);
        // SAFETY: element `i` lies within the row, as just checked; `T` is plain data, at any address.
        unsafe { self.data.add(i).write_unaligned(value) }
    }

    /// Number of elements before the first that begins a cache line; elements must be aligned.
    #[inline(always)]
    pub(crate) fn before_line(&self) -> usize {
        self.len.min((self.data as usize).wrapping_neg() % LINE / size_of::<T>())
    }

    /// Elements `i .. i + N`. Bounds are checked here once, and not again when they are written.
    ///
    /// In a `STREAMING` chunk, whole vectors are written with non-temporal stores; [`super::fence`] must follow before
    /// another thread reads them.
    #[inline(always)]
    pub(crate) fn chunk<const N: usize, const STREAMING: bool>(&self, i: usize) -> ChunkMut<'_, T, N, STREAMING> {
        assert!(N <= self.len && i <= self.len - N);
        let data = self.data.wrapping_add(i);
        assert!(!STREAMING || (data as usize).is_multiple_of(VECTOR));
        ChunkMut { data, memory: PhantomData }
    }
}

/// `N` adjacent elements that are written.
pub(crate) struct ChunkMut<'a, T: Copy, const N: usize, const STREAMING: bool> {
    data: *mut T,
    memory: PhantomData<&'a mut [T]>,
}

impl<T: Element, const N: usize, const STREAMING: bool> ChunkMut<'_, T, N, STREAMING> {
    /// Writes part `k` of `M` elements.
    #[inline(always)]
    pub(crate) fn put<const M: usize>(&self, k: usize, values: [T; M]) {
        assert!((k + 1) * M <= N); // of constants
        #[cfg(target_arch = "x86_64")]
        if STREAMING {
            use std::arch::x86_64::{__m128i, _mm_stream_si128};
            const { assert!((M * size_of::<T>()).is_multiple_of(VECTOR)) };
            for v in 0..M * size_of::<T>() / VECTOR {
                // SAFETY: the vector lies within `values` and within the part, which lies within the chunk.
                // `RowMut::chunk` has checked that the chunk is aligned and lies within its row.
                unsafe {
                    let value = values.as_ptr().cast::<__m128i>().add(v).read_unaligned();
                    _mm_stream_si128(self.data.add(k * M).cast::<__m128i>().add(v), value);
                }
            }
            return;
        }
        // SAFETY: the part lies within the chunk, which lies within its row or buffer (see `RowMut::chunk`, `Buffer::chunk`).
        unsafe { self.data.add(k * M).cast::<[T; M]>().write_unaligned(values) }
    }
}

/// Elements that a kernel has computed and will write to a row later.
pub(crate) struct Buffer<T: Copy, const N: usize>(MaybeUninit<[T; N]>);

impl<T: Element, const N: usize> Buffer<T, N> {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    #[inline(always)]
    pub(crate) fn chunk(&mut self) -> ChunkMut<'_, T, N, false> {
        ChunkMut { data: self.0.as_mut_ptr().cast(), memory: PhantomData }
    }

    /// Writes the first `n` elements to elements `i .. i + n` of a row.
    #[inline(always)]
    pub(crate) fn copy_first(&self, row: &RowMut<'_, T>, i: usize, n: usize) {
        self.copy(0, row, i, n);
    }

    /// Writes the last `n` elements to the last `n` elements of a row.
    #[inline(always)]
    pub(crate) fn copy_last(&self, row: &RowMut<'_, T>, n: usize) {
        self.copy(N - n, row, row.len - n, n);
    }

    #[inline(always)]
    fn copy(&self, from: usize, row: &RowMut<'_, T>, to: usize, n: usize) {
        assert!(from <= N && n <= N - from && to <= row.len && n <= row.len - to);
        // SAFETY: both ranges lie within the buffer and the row, as just checked. Elements of the buffer that were never
        // written are copied as bytes, without being read as values.
        unsafe {
            let from = self.0.as_ptr().cast::<MaybeUninit<T>>().add(from);
            std::ptr::copy_nonoverlapping(from.cast::<u8>(), row.data.add(to).cast::<u8>(), n * size_of::<T>());
        }
    }
}
