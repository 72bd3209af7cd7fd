//! What follows normalization in the same pass, and the way back through it.

use crate::buffer::{Output, Tensor, type_name};
use batchnorm::{Activation, Coefficients, Element, Error, View, ViewMut, gate};
use numpy::PyUntypedArray;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

/// An activation and a residual, as the arguments of those names.
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

    /// Tensors that outputs share no memory with: these, and the residual.
    pub(crate) fn inputs<'a>(
        &'a self,
        others: &[(&'a str, &'a Tensor<'py>)],
    ) -> Vec<(&'a str, &'a Bound<'py, PyUntypedArray>)> {
        let residual = self.residual.as_ref().map(|residual| ("residual", residual));
        others.iter().copied().chain(residual).map(|(name, tensor)| (name, &tensor.array)).collect()
    }
}

fn activation_of(value: &Bound<'_, PyAny>) -> PyResult<Activation> {
    let Ok(name) = value.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("activation is {}; wanted None or \"relu\"", type_name(value))));
    };
    match name.to_str()? {
        "relu" => Ok(Activation::Relu),
        other => Err(PyValueError::new_err(format!("activation is {other:?}; wanted None or \"relu\""))),
    }
}

/// The tensors of a way back: what comes, what it is written to, and where the gradient of the residual goes.
pub(crate) struct Back<'py> {
    dy: Tensor<'py>,
    pub(crate) dx: Output<'py>,
    over_dy: bool,
    /// And whether it is dy itself.
    dresidual: Option<(Output<'py>, bool)>,
}

impl<'py> Back<'py> {
    pub(crate) fn read(
        dy: &Bound<'py, PyAny>,
        x: &Tensor<'py>,
        epilogue: &Epilogue<'py>,
        out: Option<&Bound<'py, PyAny>>,
        dresidual: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        if dresidual.is_some() && epilogue.residual.is_none() {
            return Err(PyValueError::new_err("dresidual is given, but the forward pass had no residual; wanted None"));
        }
        let dy = x.read_like("dy", dy)?;
        let mut inputs = epilogue.inputs(&[("x", x)]);
        let (dx, over_dy) = x.output_over("out", out, ("dy", &dy), &inputs)?;
        let dresidual = match dresidual {
            Some(_) => {
                if out.is_some() {
                    inputs.push(("out", &dx.array));
                }
                Some(x.output_over("dresidual", dresidual, ("dy", &dy), &inputs)?)
            }
            None => None,
        };
        Ok(Self { dy, dx, over_dy, dresidual })
    }

    pub(crate) fn views<T: Element>(&mut self) -> Views<'_, T> {
        let gated_over_dy = self.dresidual.as_ref().is_some_and(|(_, over_dy)| *over_dy);
        Views {
            dy: (!self.over_dy && !gated_over_dy).then(|| self.dy.view()),
            gated: self.dresidual.as_mut().map(|(dresidual, _)| dresidual.view_mut()),
            gated_over_dy,
            dx: self.dx.view_mut(),
        }
    }

    /// The gradient of the residual, where it is known: what was asked for, or dy where that passes as it is.
    pub(crate) fn dresidual(&self, epilogue: &Epilogue<'py>) -> Option<Bound<'py, PyUntypedArray>> {
        match &self.dresidual {
            Some((dresidual, _)) => Some(dresidual.array.clone()),
            None if epilogue.activation.is_none() && epilogue.residual.is_some() && !self.over_dy => {
                Some(self.dy.array.clone())
            }
            None => None,
        }
    }
}

/// The same as the core takes them: of memory that is written over there is no other view.
pub(crate) struct Views<'a, T: Element> {
    dy: Option<View<'a, T>>,
    gated: Option<ViewMut<'a, T>>,
    gated_over_dy: bool,
    dx: ViewMut<'a, T>,
}

impl<T: Element> Views<'_, T> {
    /// Goes back through the activation where the gradient of the residual is asked for, and from there by `rest`, which
    /// else does both. Sums over `count` values are refused first where they would be later.
    pub(crate) fn go<R>(
        mut self,
        x: View<'_, T>,
        coefficients: &Coefficients,
        epilogue: batchnorm::Epilogue<View<'_, T>>,
        count: impl ExactSizeIterator<Item = f64>,
        rest: impl FnOnce(Option<View<'_, T>>, batchnorm::Epilogue<View<'_, T>>, &mut ViewMut<'_, T>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        match &mut self.gated {
            None => rest(self.dy, epilogue, &mut self.dx),
            Some(gated) => {
                coefficients.check_counts(count)?;
                let dy = self.dy.or_else(|| (!self.gated_over_dy).then(|| self.dx.as_view()));
                gate(dy, x, coefficients, epilogue, gated)?;
                rest(Some(gated.as_view()), batchnorm::Epilogue::default(), &mut self.dx)
            }
        }
    }
}
