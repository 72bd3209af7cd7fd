//! The layout of a tensor: every dense tensor is `(outer, channels, inner)`.
//!
//! (N, C) is (N, C, 1); (N, C, H, W) is (N, C, H·W); channels-last (N, H, W, C) is (N·H·W, C, 1). A densely permuted
//! tensor is taken in the order in which it lies in memory. Channel k holds m = outer·inner values: the paper's m of
//! section 3, and its m' = m·p·q for convolutions (section 3.2).

use crate::error::Error;

/// The shape of a dense tensor as `(outer, channels, inner)`, checked against overflow once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    outer: usize,
    channels: usize,
    inner: usize,
}

/// Bytes of the largest element type. Sizes are checked for it, so that no byte offset can overflow.
const LARGEST_ELEMENT: usize = 8;

impl Layout {
    /// The layout of a tensor of `outer` × `channels` × `inner` elements.
    ///
    /// # Errors
    /// [`Error::NoChannels`], [`Error::Overflow`].
    pub fn new(outer: usize, channels: usize, inner: usize) -> Result<Self, Error> {
        if channels == 0 {
            return Err(Error::NoChannels);
        }
        // Zero-sized axes must not hide an overflow of the others: offsets are computed from parts of the product.
        let size = [outer, channels, inner].iter().try_fold(LARGEST_ELEMENT, |size, &n| size.checked_mul(n.max(1)));
        match size {
            // With one channel every order of the axes is the same memory, so it has one layout too.
            Some(bytes) if isize::try_from(bytes).is_ok() => Ok(match (outer, channels) {
                (1.., 1) => Self { outer: 1, channels, inner: outer * inner },
                _ => Self { outer, channels, inner },
            }),
            _ => Err(Error::Overflow),
        }
    }

    /// The layout of a C-contiguous tensor; a negative `channel_axis` counts from the end.
    ///
    /// # Errors
    /// [`Error::Rank`], [`Error::ChannelAxis`], [`Error::NoChannels`], [`Error::Overflow`].
    pub fn of_shape(shape: &[usize], channel_axis: isize) -> Result<Self, Error> {
        let axis = resolve_axis(shape.len(), channel_axis)?;
        Self::around(shape, (0..shape.len()).collect::<Vec<_>>().as_slice(), axis)
    }

    /// The layout of a tensor with the given strides in bytes, or `None` if the tensor is not dense and must be copied.
    ///
    /// A tensor is dense if every byte of its memory belongs to exactly one element, in any order of the axes. `item` is
    /// the size of an element in bytes.
    ///
    /// # Errors
    /// As [`Layout::of_shape`].
    pub fn of_strides(
        shape: &[usize],
        strides: &[isize],
        item: usize,
        channel_axis: isize,
    ) -> Result<Option<Self>, Error> {
        let axis = resolve_axis(shape.len(), channel_axis)?;
        let mut order: Vec<usize> = (0..shape.len()).collect();
        if shape.contains(&0) {
            return Self::around(shape, &order, axis).map(Some);
        }
        // Axes of size 1 may have any stride; they keep their place, which changes no product.
        order.retain(|&a| shape[a] != 1 || a == axis);
        order.sort_by_key(|&a| std::cmp::Reverse(if shape[a] == 1 { isize::MAX } else { strides[a] }));
        let mut expected = item as isize;
        for &a in order.iter().rev() {
            if shape[a] != 1 && strides[a] != expected {
                return Self::around(shape, &order, axis).map(|_| None);
            }
            expected = expected.saturating_mul(isize::try_from(shape[a]).map_err(|_| Error::Overflow)?);
        }
        Self::around(shape, &order, axis).map(Some)
    }

    #[allow(clippy::expect_used, reason = "another axis would be taken for the channels")]
    fn around(shape: &[usize], order: &[usize], channel_axis: usize) -> Result<Self, Error> {
        let product = |axes: &[usize]| {
            axes.iter().try_fold(1usize, |size, &a| size.checked_mul(shape[a].max(1))).ok_or(Error::Overflow)
        };
        let place = order.iter().position(|&a| a == channel_axis).expect("the order keeps the channel axis");
        let (before, after) = (&order[..place], &order[place + 1..]);
        let (mut outer, inner) = (product(before)?, product(after)?);
        Self::new(outer, shape[channel_axis], inner)?;
        if shape.iter().enumerate().any(|(a, &n)| n == 0 && a != channel_axis) {
            outer = 0; // all empty tensors have one layout, whichever axis has size 0
        }
        Self::new(outer, shape[channel_axis], inner)
    }

    /// Product of the sizes of the axes before the channels, in memory order.
    pub fn outer(&self) -> usize {
        self.outer
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Product of the sizes of the axes after the channels, in memory order.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of values in each channel: the paper's m.
    pub fn count(&self) -> usize {
        self.outer * self.inner
    }
}

fn resolve_axis(rank: usize, axis: isize) -> Result<usize, Error> {
    if rank < 2 {
        return Err(Error::Rank { rank });
    }
    let signed = if axis < 0 { axis.checked_add_unsigned(rank) } else { Some(axis) };
    match signed.and_then(|a| usize::try_from(a).ok()) {
        Some(a) if a < rank => Ok(a),
        _ => Err(Error::ChannelAxis { axis, rank }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;

    fn parts(layout: Layout) -> (usize, usize, usize) {
        (layout.outer(), layout.channels(), layout.inner())
    }

    #[test]
    fn shapes() {
        assert_eq!(parts(Layout::of_shape(&[5, 3], 1).unwrap()), (5, 3, 1));
        assert_eq!(parts(Layout::of_shape(&[5, 3, 4, 2], 1).unwrap()), (5, 3, 8));
        assert_eq!(parts(Layout::of_shape(&[3, 5], 0).unwrap()), (1, 3, 5));
        assert_eq!(parts(Layout::of_shape(&[5, 1, 4], 1).unwrap()), (1, 1, 20));
        assert_eq!(parts(Layout::of_shape(&[5, 4, 2, 3], -1).unwrap()), (40, 3, 1));
        assert_eq!(Layout::of_shape(&[0, 3], 1).unwrap().len(), 0);
        assert_eq!(Layout::of_shape(&[4, 3, 0], 1).unwrap().count(), 0);
    }

    #[test]
    fn permuted_memory_is_taken_as_it_lies() {
        // NCHW (2, 3, 4, 5) viewed over NHWC memory.
        let strides = [3 * 4 * 5 * 4, 4, 5 * 3 * 4, 3 * 4];
        assert_eq!(parts(Layout::of_strides(&[2, 3, 4, 5], &strides, 4, 1).unwrap().unwrap()), (40, 3, 1));
        // Fortran order of a matrix: the channels come first in memory.
        assert_eq!(parts(Layout::of_strides(&[7, 3], &[4, 28], 4, 1).unwrap().unwrap()), (1, 3, 7));
        // Axes of size 1 may have any stride.
        assert_eq!(parts(Layout::of_strides(&[7, 1], &[4, 999], 4, 1).unwrap().unwrap()), (1, 1, 7));
        assert_eq!(parts(Layout::of_strides(&[1, 3], &[-8, 4], 4, 1).unwrap().unwrap()), (1, 3, 1));
    }

    #[test]
    fn a_tensor_that_is_not_dense_must_be_copied() {
        for strides in [[24, 8], [12, -4], [0, 4], [4, 4]] {
            assert_eq!(Layout::of_strides(&[7, 3], &strides, 4, 1), Ok(None), "{strides:?}");
        }
    }

    #[test]
    fn invalid_shapes_are_errors() {
        assert_eq!(Layout::of_shape(&[5], 1), Err(Error::Rank { rank: 1 }));
        for axis in [2, -3, isize::MIN, isize::MAX] {
            assert_eq!(Layout::of_shape(&[5, 3], axis), Err(Error::ChannelAxis { axis, rank: 2 }));
        }
        assert_eq!(Layout::of_shape(&[5, 0], 1), Err(Error::NoChannels));
        assert_eq!(Layout::of_shape(&[usize::MAX, 3], 1), Err(Error::Overflow));
        assert_eq!(Layout::of_shape(&[0, usize::MAX / 4], 1), Err(Error::Overflow));
        assert_eq!(Layout::new(1 << 40, 1 << 20, 1), Err(Error::Overflow));
    }
}
