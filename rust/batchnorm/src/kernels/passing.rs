//! The gradient that passes an activation, where it passes between two values of x: dy where x lies between them, else 0.

use super::LANES;
use crate::element::Element;
use crate::simd::{Lanes, WIDTH};
use crate::view::Row;

/// Eight values of dy as they pass: all of them if there are no bounds.
#[inline(always)]
pub(super) fn passing_eight<L: Lanes, T: Element>(
    dy: [T; WIDTH],
    x: [T; WIDTH],
    bounds: Option<[T::Compared<L>; 2]>,
) -> [T; WIDTH] {
    match bounds {
        Some(bounds) => T::pass_within::<L>(dy, x, bounds),
        None => dy,
    }
}

/// [`passing_eight`] for one value.
#[inline(always)]
pub(super) fn passing_one<T: Element>(dy: T, x: T, bounds: Option<[T; 2]>) -> T {
    match bounds {
        Some([least, most]) if !(least.widen()..=most.widen()).contains(&x.widen()) => T::narrow(T::Wide::default()),
        _ => dy,
    }
}

/// The bounds of one channel for eight values at a time.
#[inline(always)]
pub(super) fn splat<L: Lanes, T: Element>([least, most]: [T; 2]) -> [T::Compared<L>; 2] {
    [T::compared::<L>([least; WIDTH]), T::compared::<L>([most; WIDTH])]
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
pub(super) struct Passing<'a, L: Lanes, T: Element> {
    dy: Row<'a, T>,
    x: Row<'a, T>,
    bounds: Option<[T; 2]>,
    eight: Option<[T::Compared<L>; 2]>,
}

impl<'a, L: Lanes, T: Element> Passing<'a, L, T> {
    #[inline(always)]
    pub(super) fn new(dy: Row<'a, T>, x: Row<'a, T>, bounds: Option<[T; 2]>) -> Self {
        Self { dy, x, bounds, eight: bounds.map(splat::<L, T>) }
    }
}

impl<L: Lanes, T: Element> Run<L, T> for Passing<'_, L, T> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.dy.len()
    }
    #[inline(always)]
    fn halves(&self, i: usize) -> [[T; WIDTH]; 2] {
        let (dy, x) = (self.dy.chunk::<LANES>(i), self.x.chunk::<LANES>(i));
        [
            passing_eight::<L, T>(dy.part(0), x.part(0), self.eight),
            passing_eight::<L, T>(dy.part(1), x.part(1), self.eight),
        ]
    }
    #[inline(always)]
    fn one(&self, i: usize) -> T {
        passing_one(self.dy.one(i), self.x.one(i), self.bounds)
    }
}
