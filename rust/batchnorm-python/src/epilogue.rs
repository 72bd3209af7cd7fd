//! The epilogue of a pass: the arguments activation and residual.

use crate::buffer::{Tensor, type_name};
use batchnorm::{Activation, Coefficients, Element, ForwardPass, Input, View};
use numpy::PyUntypedArray;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

/// An activation and a residual, as the arguments of those names give them.
#[derive(Default)]
pub(crate) struct Epilogue<'py> {
    pub(crate) activation: Option<Activation>,
    pub(crate) residual: Option<Tensor<'py>>,
}

impl<'py> Epilogue<'py> {
    pub(crate) fn read(
        x: &Tensor<'py>,
        activation: Option<&Bound<'py, PyAny>>,
        residual: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let activation = activation.map(activation_of).transpose()?;
        let residual = residual.map(|residual| x.read_like("residual", residual)).transpose()?;
        Ok(Self { activation, residual })
    }

    pub(crate) fn of<T: Element>(&self) -> batchnorm::Epilogue<View<'_, T>> {
        batchnorm::Epilogue { activation: self.activation, residual: self.residual.as_ref().map(Tensor::view::<T>) }
    }

    /// The forward pass of x that ended in this epilogue.
    pub(crate) fn pass<'a, T: Element>(
        &'a self,
        x: &'a Tensor<'py>,
        coefficients: &'a Coefficients,
    ) -> ForwardPass<'a, T> {
        ForwardPass { x: x.view(), coefficients, epilogue: self.of() }
    }

    /// Tensors that outputs must not share memory with: `others`, and the residual.
    pub(crate) fn inputs<'a>(
        &'a self,
        others: &[(&'a str, &'a Tensor<'py>)],
    ) -> Vec<(&'a str, &'a Bound<'py, PyUntypedArray>)> {
        let residual = self.residual.as_ref().map(|residual| ("residual", residual));
        others.iter().copied().chain(residual).map(|(name, tensor)| (name, &tensor.array)).collect()
    }
}

/// The activation that the argument of that name gives.
pub(crate) fn activation_of(value: &Bound<'_, PyAny>) -> PyResult<Activation> {
    const WANTED: &str = "wanted None, \"relu\" or \"relu6\"";
    let Ok(name) = value.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("activation is {}; {WANTED}", type_name(value))));
    };
    let name = name.to_str()?;
    let found = Activation::ALL.into_iter().find(|activation| activation.name() == name);
    found.ok_or_else(|| PyValueError::new_err(format!("activation is {name:?}; {WANTED}")))
}

/// The input of a pass: a view of x, or no view if the pass works in place and the output is the memory of x.
pub(crate) fn input<'a, T: Element>(x: &'a Tensor<'_>, in_place: bool) -> Input<'a, T> {
    if in_place { Input::InPlace } else { Input::View(x.view()) }
}
