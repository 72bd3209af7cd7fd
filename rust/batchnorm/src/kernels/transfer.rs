//! Copying and adding tensors: the maps whose time is the floor of the other passes.

use super::LANES;
use super::map::{Map, write};
use crate::element::Element;
use crate::simd::{Kernel, Lanes, WIDTH};
use crate::view::{Chunk, Row, Tile, TileMut};
use std::array::from_fn;

/// The map y = x.
struct Copied<'a, T: Element>(Tile<'a, T>);

impl<'a, T: Element> Map<T> for Copied<'a, T> {
    type Inputs = Row<'a, T>;
    type Chunk = Chunk<'a, T, LANES>;
    type Columns<L: Lanes> = ();

    #[inline(always)]
    fn inputs(&self, r: usize) -> Row<'a, T> {
        self.0.row(r)
    }
    #[inline(always)]
    fn chunk(x: Row<'a, T>, i: usize) -> Self::Chunk {
        x.chunk(i)
    }
    #[inline(always)]
    fn columns<L: Lanes>(&self, _: Row<'a, T>, _: usize) {}
    #[inline(always)]
    fn eight<L: Lanes>(x: Self::Chunk, half: usize, (): ()) -> [T; WIDTH] {
        x.part(half)
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
    type Chunk = (Chunk<'a, T, LANES>, Chunk<'a, T, LANES>);
    type Columns<L: Lanes> = ();

    #[inline(always)]
    fn inputs(&self, r: usize) -> Self::Inputs {
        (self.0.row(r), self.1.row(r))
    }
    #[inline(always)]
    fn chunk((a, b): Self::Inputs, i: usize) -> Self::Chunk {
        (a.chunk(i), b.chunk(i))
    }
    #[inline(always)]
    fn columns<L: Lanes>(&self, _: Self::Inputs, _: usize) {}
    #[inline(always)]
    fn eight<L: Lanes>((a, b): Self::Chunk, half: usize, (): ()) -> [T; WIDTH] {
        plus::<L, T>(a.part(half), b.part(half))
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
