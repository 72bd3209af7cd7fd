//! The training forward pass (Algorithm 1): the statistics of the batch, then the coefficients that they make.

use crate::coefficients::{Coefficients, always_fit, for_kernel};
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Error;
use crate::infer::infer;
use crate::input::Input;
use crate::kernels::NormalizeRuns;
use crate::memory::collected;
use crate::moments::{Moments, moments, moments_of_group};
use crate::pairs::Groups;
use crate::parameters::Parameters;
use crate::partition::{Family, Planar};
use crate::simd::dispatch;
use crate::verb::begin;
use crate::view::{View, ViewMut};

/// Normalizes x by given moments, which may be those of more than x: of all micro-batches or processes.
///
/// A backward pass needs the coefficients that it returns, and x.
///
/// # Errors
/// Those of [`Coefficients::of_moments`] and [`infer`].
pub fn normalize<T: Element>(
    x: Input<'_, T>,
    moments: &Moments,
    parameters: Parameters<'_>,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<Coefficients, Error> {
    Error::check_channels("moments", moments.channels(), y.layout().channels())?;
    let coefficients = Coefficients::of_moments(moments, parameters)?;
    infer(x, &coefficients, epilogue, y)?;
    Ok(coefficients)
}

/// Normalizes x by its own moments: `normalize ∘ moments`, to the bit.
///
/// Where each channel lies in long runs, it goes channel by channel, so that the second pass reads from cache. A backward
/// pass needs the coefficients that it returns, and x: a copy of it where y is written in place.
///
/// # Errors
/// Those of [`moments`] and [`normalize`]; nothing is written then, unless what a task takes for its channels (1024 at
/// most) does not fit in memory.
pub fn train_forward<T: Element>(
    x: Input<'_, T>,
    parameters: Parameters<'_>,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
) -> Result<(Moments, Coefficients), Error> {
    let _mode = begin()?;
    let layout = y.layout();
    x.check("out", layout)?;
    parameters.check_training(layout.channels())?;
    epilogue.check(layout)?;
    if layout.count() < 2 {
        return Err(Error::TooFewValues { channel: 0, count: layout.count() as f64, wanted: 2 });
    }
    match Family::of(layout) {
        // This way writes before all statistics are known; the other one can still refuse them.
        Family::Planar(planar) if planar.fuses() && always_fit::<T>(parameters, layout.channels()) => {
            let mut moments = Moments::zeros(layout.count(), layout.channels())?;
            let mut coefficients = Coefficients::zeros_of_training(moments.count())?;
            fused(x, planar, parameters, epilogue, y, &mut moments)?;
            coefficients.fill(moments.mean_and_var(), parameters);
            Ok((moments, coefficients))
        }
        _ => {
            let moments = moments(x.view(y))?;
            let coefficients = normalize(x, &moments, parameters, epilogue, y)?;
            Ok((moments, coefficients))
        }
    }
}

fn fused<T: Element>(
    x: Input<'_, T>,
    planar: Planar,
    parameters: Parameters<'_>,
    epilogue: Epilogue<View<'_, T>>,
    y: &mut ViewMut<'_, T>,
    moments: &mut Moments,
) -> Result<(), Error> {
    let (count, group) = (planar.outer * planar.inner, planar.group(size_of::<T>()));
    let (mean, m2) = moments.mean_and_m2();
    let moments = Groups::new(mean, m2, group)?;
    y.map_tiles(&planar.groups(group), |rect, y| {
        let x = x.tile(planar.width(), rect, &y);
        let epilogue = epilogue.map(|residual| residual.tile(planar.width(), rect));
        let (statistics, channels) = (moments_of_group(&planar, x)?, planar.channels_of(rect));
        let of_channel = |(c, &(mean, m2)): (usize, &(f64, f64))| {
            for_kernel::<T>(mean, parameters.scale(c, m2 / count as f64), parameters.shift(c))
        };
        let coefficients = collected(channels.clone().zip(&statistics).map(of_channel))?;
        // Last runs first: they are still in the nearest cache.
        for r in (0..planar.outer).rev() {
            let (x, y) = (x.split_row(r, planar.inner), y.split_row(r, planar.inner));
            let then = epilogue.map(|residual| residual.split_row(r, planar.inner));
            dispatch(NormalizeRuns { x, y: &y, coefficients: |c: usize| coefficients[c], then });
        }
        moments.write(&channels, statistics.into_iter());
        Ok(())
    })
}
