//! What may follow normalization in the same pass: a residual that is added, an activation.

use crate::element::Element;
use crate::error::Error;
use crate::layout::Layout;
use crate::view::View;

/// A function of every element by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(v, 0): a NaN stays one, −0 becomes 0. Its gradient passes where y > 0.
    Relu,
}

/// y = activation(v + residual), where v is what normalization gives: in the precision of v, then rounded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epilogue<R> {
    /// What follows the sum.
    pub activation: Option<Activation>,
    /// What is added: a tensor like x.
    pub residual: Option<R>,
}

/// Nothing follows.
impl<R> Default for Epilogue<R> {
    fn default() -> Self {
        Self { activation: None, residual: None }
    }
}

impl<R: Copy> Epilogue<R> {
    /// The same with another form of the residual.
    #[inline(always)]
    pub(crate) fn map<S>(&self, f: impl FnOnce(R) -> S) -> Epilogue<S> {
        Epilogue { activation: self.activation, residual: self.residual.map(f) }
    }

    /// Whether gradients pass everywhere.
    pub(crate) fn passes(&self) -> bool {
        self.activation.is_none()
    }
}

impl<T: Element> Epilogue<View<'_, T>> {
    /// The residual has the layout of x.
    pub(crate) fn check(&self, layout: Layout) -> Result<(), Error> {
        match self.residual {
            Some(residual) if residual.layout() != layout => Err(Error::LayoutMismatch { argument: "residual" }),
            _ => Ok(()),
        }
    }
}
