//! The training forward pass (Algorithm 1): statistics of the batch, then the coefficients they make.

use crate::blocks::{Family, Planar};
use crate::coefficients::{self, Coefficients, always_fit, check_parameters, check_training_eps};
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Error;
use crate::infer::{infer, infer_in_place};
use crate::moments::{Moments, moments, moments_of_group};
use crate::simd::{NormalizeRuns, dispatch};
use crate::view::{View, ViewMut};

/// Normalizes x by given moments, which may be those of more than x: of all micro-batches or processes. Absent γ are
/// ones, absent β zeros. What it returns, [`crate::backward`] needs.
///
/// # Errors
/// Those of [`Coefficients::of_moments`] and [`infer`].
pub fn normalize<T: Element>(
    x: View<'_, T>,
    moments: &Moments,
    gamma: Option<&[f64]>,
    beta: Option<&[f64]>,
    eps: f64,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<Coefficients, Error> {
    Error::check_channels("moments", moments.channels(), x.layout().channels())?;
    let coefficients = Coefficients::of_moments(moments, gamma, beta, eps)?;
    infer(x, &coefficients, epilogue, y)?;
    Ok(coefficients)
}

/// `normalize ∘ moments`, to the bit; where channels lie in runs, channel by channel, so that the second pass reads from
/// cache.
///
/// # Errors
/// Those of [`moments`] and [`normalize`]; nothing is written then.
pub fn train_forward<T: Element>(
    x: View<'_, T>,
    gamma: Option<&[f64]>,
    beta: Option<&[f64]>,
    eps: f64,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(Moments, Coefficients), Error> {
    if x.layout() != y.layout() {
        return Err(Error::LayoutMismatch { argument: "out" });
    }
    forward(Some(x), gamma, beta, eps, epilogue, y)
}

/// The same with y in the memory of x. A backward pass needs a copy of x.
///
/// # Errors
/// Those of [`train_forward`]; nothing is written then.
pub fn train_forward_in_place<T: Element>(
    gamma: Option<&[f64]>,
    beta: Option<&[f64]>,
    eps: f64,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(Moments, Coefficients), Error> {
    forward(None, gamma, beta, eps, epilogue, y)
}

/// Normalizes x, or where there is none y itself, into y.
fn forward<T: Element>(
    x: Option<View<'_, T>>,
    gamma: Option<&[f64]>,
    beta: Option<&[f64]>,
    eps: f64,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(Moments, Coefficients), Error> {
    let _mode = crate::begin()?;
    let layout = y.layout();
    check_training_eps(eps)?;
    check_parameters(layout.channels(), gamma, beta)?;
    epilogue.check(layout)?;
    if layout.count() < 2 {
        return Err(Error::TooFewValues { channel: 0, count: layout.count() as f64, wanted: 2 });
    }
    let moments = match Family::of(layout) {
        // It writes before all statistics are known; the other way can still refuse.
        Family::Planar(planar) if planar.fuses() && always_fit::<T>(gamma, beta, eps) => {
            let moments = fused(x, planar, gamma, beta, eps, epilogue, y);
            let coefficients = Coefficients::of_moments(&moments, gamma, beta, eps)?;
            return Ok((moments, coefficients));
        }
        _ => moments(x.unwrap_or_else(|| y.as_view()))?,
    };
    let coefficients = Coefficients::of_moments(&moments, gamma, beta, eps)?;
    match x {
        Some(x) => infer(x, &coefficients, epilogue, y)?,
        None => infer_in_place(&coefficients, epilogue, y)?,
    }
    Ok((moments, coefficients))
}

fn fused<T: Element>(
    x: Option<View<'_, T>>,
    planar: Planar,
    gamma: Option<&[f64]>,
    beta: Option<&[f64]>,
    eps: f64,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Moments {
    let count = planar.outer * planar.inner;
    let at = |values: Option<&[f64]>, c: usize, absent| values.map_or(absent, |values| values[c]);
    let groups = y.map_tiles(&planar.groups(size_of::<T>()), |rect, y| {
        let x = x.map_or_else(|| y.as_tile(), |x| x.tile(planar.width(), rect));
        let epilogue = epilogue.map(|residual| residual.tile(planar.width(), rect));
        let statistics = moments_of_group(&planar, x);
        let coefficients: Vec<[T::Wide; 4]> = (planar.channels_of(rect).zip(&statistics))
            .map(|(c, &(mean, m2))| {
                let scale = coefficients::scale(at(gamma, c, 1.0), m2 / count as f64, eps);
                coefficients::for_kernel::<T>(mean, scale, at(beta, c, 0.0))
            })
            .collect();
        // Last runs first: they are still in the nearest cache.
        for r in (0..planar.outer).rev() {
            let (x, y) = (x.split_row(r, planar.inner), y.split_row(r, planar.inner));
            let then = epilogue.map(|residual| residual.split_row(r, planar.inner));
            dispatch(NormalizeRuns { x, y: &y, coefficients: |c: usize| coefficients[c], then });
        }
        statistics
    });
    let (mean, m2) = groups.into_iter().flatten().unzip();
    Moments::of_equal_count(count, mean, m2)
}
