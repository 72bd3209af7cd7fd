//! Where a verb reads its input: from a tensor of its own, or from the memory that it writes.

use crate::element::Element;
use crate::error::Error;
use crate::layout::Layout;
use crate::view::{Rect, Tile, TileMut, View, ViewMut};

/// The tensor that a verb reads and maps, element by element, to its output.
#[derive(Clone, Copy)]
pub enum Input<'a, T: Copy> {
    /// A tensor of the layout of the output, in memory of its own.
    View(View<'a, T>),
    /// The tensor that the output's memory holds; the result is written over it.
    InPlace,
}

impl<'a, T: Element> Input<'a, T> {
    pub(crate) fn check(&self, argument: &'static str, layout: Layout) -> Result<(), Error> {
        match self {
            Self::View(view) => check_layout(argument, view.layout(), layout),
            Self::InPlace => Ok(()),
        }
    }

    /// The tensor, of a verb that writes `output`.
    pub(crate) fn view<'b>(&self, output: &'b ViewMut<'_, T>) -> View<'b, T>
    where
        'a: 'b,
    {
        match *self {
            Self::View(view) => view,
            Self::InPlace => output.as_view(),
        }
    }

    /// The rectangle of the tensor that `output` is of the output.
    #[inline]
    pub(crate) fn tile<'b>(&self, width: usize, rect: &Rect, output: &'b TileMut<'_, T>) -> Tile<'b, T>
    where
        'a: 'b,
    {
        match self {
            Self::View(view) => view.tile(width, rect),
            Self::InPlace => output.as_tile(),
        }
    }
}

pub(crate) fn check_layout(argument: &'static str, got: Layout, wanted: Layout) -> Result<(), Error> {
    if got == wanted { Ok(()) } else { Err(Error::LayoutMismatch { argument }) }
}
