//! The gradient that passes an activation, where it passes between two values of x: dy where x lies between them, else 0.

use super::LANES;
use crate::element::Element;
use crate::simd::{Lanes, WIDTH};
use crate::view::Row;

/// A kernel with bounds or without, as the type says, so that its loop need not ask.
pub(super) struct Known<'k, K, const BOUNDED: bool>(pub(super) &'k K);

/// Eight values of dy as they pass: all of them if there are no bounds.
#[inline(always)]
pub(super) fn passing_eight<L: Lanes, T: Element, const BOUNDED: bool>(
    dy: [T; WIDTH],
    x: [T; WIDTH],
    bounds: [T::Compared<L>; 2],
) -> [T; WIDTH] {
    if BOUNDED { T::pass_within::<L>(dy, x, bounds) } else { dy }
}

/// [`passing_eight`] for one value.
#[inline(always)]
pub(super) fn passing_one<T: Element, const BOUNDED: bool>(dy: T, x: T, [least, most]: [T; 2]) -> T {
    let passes = !BOUNDED || (least.widen()..=most.widen()).contains(&x.widen());
    if passes { dy } else { T::from_f64(0.0) }
}

/// The bounds of one channel for eight values at a time.
#[inline(always)]
pub(super) fn splat<L: Lanes, T: Element>([least, most]: [T; 2]) -> [T::Compared<L>; 2] {
    [T::compared::<L>([least; WIDTH]), T::compared::<L>([most; WIDTH])]
}

/// Bounds that are not there, and not looked at.
#[inline(always)]
pub(super) fn no_bounds<T: Element>() -> [T; 2] {
    [T::from_f64(0.0); 2]
}

/// A run of values that are summed.
pub(super) trait Run<L: Lanes, T: Element> {
    fn len(&self) -> usize;
    /// Values `i .. i + 16`, in two halves.
    fn halves(&self, i: usize) -> [[T; WIDTH]; 2];
    fn one(&self, i: usize) -> T;
}

impl<L: Lanes, T: Element> Run<L, T> for Row<'_, T> {
    #[inline(always)]
    fn len(&self) -> usize {
        Row::len(self)
    }
    #[inline(always)]
    fn halves(&self, i: usize) -> [[T; WIDTH]; 2] {
        let chunk = self.chunk::<LANES>(i);
        [chunk.part(0), chunk.part(1)]
    }
    #[inline(always)]
    fn one(&self, i: usize) -> T {
        Row::one(self, i)
    }
}

/// The gradient that passes in a run of one channel.
pub(super) struct Passing<'a, L: Lanes, T: Element, const BOUNDED: bool> {
    dy: Row<'a, T>,
    x: Row<'a, T>,
    bounds: [T; 2],
    of_eight: [T::Compared<L>; 2],
}

impl<'a, L: Lanes, T: Element, const BOUNDED: bool> Passing<'a, L, T, BOUNDED> {
    #[inline(always)]
    pub(super) fn new(dy: Row<'a, T>, x: Row<'a, T>, bounds: [T; 2]) -> Self {
        Self { dy, x, bounds, of_eight: splat::<L, T>(bounds) }
    }
}

impl<L: Lanes, T: Element, const BOUNDED: bool> Run<L, T> for Passing<'_, L, T, BOUNDED> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.dy.len()
    }
    #[inline(always)]
    fn halves(&self, i: usize) -> [[T; WIDTH]; 2] {
        let (dy, x) = (self.dy.chunk::<LANES>(i), self.x.chunk::<LANES>(i));
        [
            passing_eight::<L, T, BOUNDED>(dy.part(0), x.part(0), self.of_eight),
            passing_eight::<L, T, BOUNDED>(dy.part(1), x.part(1), self.of_eight),
        ]
    }
    #[inline(always)]
    fn one(&self, i: usize) -> T {
        passing_one::<T, BOUNDED>(self.dy.one(i), self.x.one(i), self.bounds)
    }
}
