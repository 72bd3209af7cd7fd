//! The backward pass, through the statistics.
//!
//! With x̂ᵢ = (xᵢ − μ)/√(σ²+ε), yᵢ = γx̂ᵢ + β, μ = Σxᵢ/m, σ² = Σ(xᵢ−μ)²/m, the six derivatives of section 3 are
//!
//! ```text
//! ∂ℓ/∂x̂ᵢ = dyᵢ·γ
//! ∂ℓ/∂σ² = Σ ∂ℓ/∂x̂ᵢ·(xᵢ−μ)·(−1/2)·(σ²+ε)^(−3/2)
//! ∂ℓ/∂μ  = Σ ∂ℓ/∂x̂ᵢ·(−1/√(σ²+ε)) + ∂ℓ/∂σ²·Σ −2(xᵢ−μ)/m
//! ∂ℓ/∂xᵢ = ∂ℓ/∂x̂ᵢ/√(σ²+ε) + ∂ℓ/∂σ²·2(xᵢ−μ)/m + ∂ℓ/∂μ/m
//! ∂ℓ/∂γ  = Σ dyᵢ·x̂ᵢ            ∂ℓ/∂β = Σ dyᵢ
//! ```
//!
//! Since Σ(xᵢ−μ) = 0 the second term of ∂ℓ/∂μ vanishes. With dβ = Σdy and dγ = Σdy·x̂:
//! ∂ℓ/∂σ²·2(xᵢ−μ)/m = −γ·dγ·x̂ᵢ/(m·√(σ²+ε)), and ∂ℓ/∂μ/m = −γ·dβ/(m·√(σ²+ε)). So
//!
//! ```text
//! dxᵢ = γ/√(σ²+ε) · ( dyᵢ − dβ/m − x̂ᵢ·dγ/m )
//! ```
//!
//! With frozen statistics only the first term is left: dxᵢ = γ/√(σ²+ε)·dyᵢ. Sums and dx are computed in float64.
//!
//! Where an activation followed, dy above stands for the gradient that passes it: dy where y > 0 (and y < 6 for ReLU6), else 0,
//! which is also the gradient of the residual. Each part of it is computed into the memory where it is used next, while that is in cache.

use crate::bounds::Bounds;
use crate::coefficients::Coefficients;
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Error;
use crate::forward_pass::ForwardPass;
use crate::gradient_sums::{GradientSums, SumAndProducts, dgamma_and_dbeta, sums_of, sums_of_block};
use crate::infer::infer;
use crate::input::{Input, check_layout};
use crate::kernels::{DxCoefficients, DxRows, DxRuns};
use crate::memory::{Room, collected};
use crate::pairs::{Groups, OfChannel};
use crate::partition::{Family, Planar, tile};
use crate::per_channel::PerChannel;
use crate::simd::dispatch;
use crate::verb::begin;
use crate::view::{View, ViewMut};
use std::iter::repeat_n;
use std::ops::Range;

/// Bytes per channel that sums and the coefficients made of them take at most while a gradient is computed from them.
const ROOM: usize = 128;
/// Bytes of dx up to which the gradient that passes an activation is kept there between the two passes over the tensor.
/// A larger one would come back from memory, which takes longer than to compute it twice.
const CACHED: usize = 4 << 20;

/// Where a backward pass reads dy: from memory of its own, or from an output that is written over it.
#[derive(Clone, Copy)]
pub enum Dy<'a, T: Copy> {
    /// A tensor of the layout of x, in memory of its own.
    View(View<'a, T>),
    /// The tensor that the memory of dx holds.
    InDx,
    /// The tensor that the memory of dresidual holds.
    InDresidual,
}

/// Checks the tensors of a pass, and the number of values that the sums are (or will be) over. With `dresidual`, writes
/// the gradient that passes the activation there, and from there goes on by `rest`, which else takes dy through the whole
/// pass.
fn back<'a, T: Element, R>(
    dy: Dy<'a, T>,
    pass: ForwardPass<'a, T>,
    count: impl ExactSizeIterator<Item = f64>,
    dresidual: Option<&mut ViewMut<'_, T>>,
    dx: &mut ViewMut<'_, T>,
    rest: impl FnOnce(Input<'_, T>, ForwardPass<'_, T>, &mut ViewMut<'_, T>) -> Result<R, Error>,
) -> Result<R, Error> {
    if let Dy::View(dy) = dy {
        check_layout("dy", dy.layout(), pass.layout())?;
    }
    check_layout("out", dx.layout(), pass.layout())?;
    pass.check()?;
    pass.coefficients.check_count(count)?;
    let Some(dresidual) = dresidual else {
        let dy = match dy {
            Dy::View(dy) => Input::View(dy),
            Dy::InDx => Input::InPlace,
            Dy::InDresidual => return Err(Error::NoDresidual),
        };
        return rest(dy, pass, dx);
    };
    check_layout("dresidual", dresidual.layout(), pass.layout())?;
    let dy = match dy {
        Dy::View(dy) => Input::View(dy),
        Dy::InDx => Input::View(dx.as_view()),
        Dy::InDresidual => Input::InPlace,
    };
    let room = Room::new(ROOM * pass.layout().channels())?;
    pass.through(dy, dresidual)?;
    room.free();
    rest(Input::View(dresidual.as_view()), pass.without_epilogue(), dx)
}

/// dx of a training pass from dy and the sums, which may be those of more than this dy: of all micro-batches or
/// processes whose moments were merged.
///
/// The gradient of the residual, where it is asked for, is written to `dresidual`.
///
/// # Errors
/// As [`gradient_sums`](crate::gradient_sums()); [`Error::Counts`], and [`Error::NoDresidual`] for [`Dy::InDresidual`] without it.
pub fn gradient_apply<T: Element>(
    dy: Dy<'_, T>,
    pass: ForwardPass<'_, T>,
    sums: &GradientSums,
    dresidual: Option<&mut ViewMut<'_, T>>,
    dx: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    let _mode = begin()?;
    back(dy, pass, sums.count().iter().copied(), dresidual, dx, |dy, pass, dx| {
        let (pass, bounds) = pass.bounded()?;
        apply(dy, &pass, bounds.as_ref(), sums, dx)
    })
}

/// dx from dy and the sums; with bounds, dy counts only between them.
fn apply<T: Element>(
    dy: Input<'_, T>,
    pass: &ForwardPass<'_, T>,
    bounds: Option<&Bounds<T>>,
    sums: &GradientSums,
    dx: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    let layout = pass.layout();
    let of = |c| dx_coefficients(pass.coefficients, c, sums.dgamma()[c], sums.dbeta()[c], sums.count()[c]);
    let per_channel = DxCoefficients {
        mean: pass.coefficients.mean_per_channel(),
        offset: &PerChannel::of((0..layout.channels()).map(|c| of(c).offset))?,
        slope: &PerChannel::of((0..layout.channels()).map(|c| of(c).slope))?,
        scale: pass.coefficients.scale_per_channel(),
    };
    // With an activation a tile of each tensor is to stay in cache until dx is computed from the gradient that passes.
    let elements = tile::<T>(layout) / if pass.has_activation() { 4 } else { 1 };
    match Family::of(layout) {
        Family::Planar(planar) => dx.map_tiles(&planar.planes(elements), |rect, dx| {
            let (dy, cached) = (dy.tile(planar.inner, rect, &dx), dx.cached());
            let dy = pass.through_planes(&planar, rect, dy, &cached);
            let x = pass.x.tile(planar.inner, rect);
            let channel = |r: usize| (rect.rows.start + r) % planar.channels;
            let coefficients = |r: usize| per_channel.map(|numbers| numbers.as_slice()[channel(r)]);
            let bounds = bounds.map(|bounds| move |r: usize| bounds.of_channel(channel(r)));
            dispatch(DxRuns { dy, x, dx: pass.output(&dx, &cached), coefficients, bounds });
            Ok(())
        }),
        Family::Interleaved(rows) => dx.map_tiles(&rows.tiles(elements), |rect, dx| {
            let (dy, cached) = (dy.tile(rows.width, rect, &dx), dx.cached());
            let columns = pass.columns(&rows, rect.cols.clone())?;
            let dy = pass.through_rows(&rows, (columns.as_ref(), rect), dy, &cached);
            let x = pass.x.tile(rows.width, rect);
            let column = |numbers| rows.columns::<f64>(numbers, rect.cols.clone());
            let (mean, offset) = (column(per_channel.mean)?, column(per_channel.offset)?);
            let (slope, scale) = (column(per_channel.slope)?, column(per_channel.scale)?);
            let coefficients = DxCoefficients { mean: &*mean, offset: &*offset, slope: &*slope, scale: &*scale };
            let bounds = bounds.map(|bounds| bounds.of_columns(&rows, rect.cols.clone())).transpose()?;
            let bounds = bounds.as_ref().map(|[least, most]| [&**least, &**most]);
            dispatch(DxRows { dy, x, dx: pass.output(&dx, &cached), coefficients, bounds });
            Ok(())
        }),
    }
}

fn dx_coefficients(coefficients: &Coefficients, c: usize, dgamma: f64, dbeta: f64, count: f64) -> DxCoefficients<f64> {
    DxCoefficients {
        mean: coefficients.mean()[c],
        offset: dbeta / count,
        slope: dgamma * coefficients.invstd()[c] / count,
        scale: coefficients.scale()[c],
    }
}

/// dx, dγ and dβ of a training pass: `gradient_apply ∘ gradient_sums`, to the bit.
///
/// The gradient of the residual, where it is asked for, is written to `dresidual`. Where each channel lies in long runs, it
/// goes channel by channel, so that the second pass reads from cache.
///
/// # Errors
/// As [`gradient_apply`]; [`Error::Counts`] where x was normalized by the moments of more than x.
pub fn backward<T: Element>(
    dy: Dy<'_, T>,
    pass: ForwardPass<'_, T>,
    dresidual: Option<&mut ViewMut<'_, T>>,
    dx: &mut ViewMut<'_, T>,
) -> Result<GradientSums, Error> {
    let _mode = begin()?;
    let layout = pass.layout();
    let count = repeat_n(layout.count() as f64, layout.channels());
    back(dy, pass, count, dresidual, dx, |dy, pass, dx| {
        let (pass, bounds) = pass.bounded()?;
        let bounds = bounds.as_ref();
        match Family::of(layout) {
            Family::Planar(planar) if planar.fuses() && !layout.is_empty() => fused(dy, &pass, bounds, planar, dx),
            _ if pass.has_activation() && dx.bytes() <= CACHED => {
                in_place(dy, pass, dx, |pass, sums, dx| apply(Input::InPlace, pass, None, sums, dx))
            }
            _ => {
                let sums = sums_of(dy.view(dx), &pass, bounds)?;
                apply(dy, &pass, bounds, &sums, dx)?;
                Ok(sums)
            }
        }
    })
}

/// The sums of a pass that ended in an activation, and dx made from them by `rest`: the gradient that passes the activation
/// is written to dx first, and replaced there.
fn in_place<T: Element>(
    dy: Input<'_, T>,
    pass: ForwardPass<'_, T>,
    dx: &mut ViewMut<'_, T>,
    rest: impl FnOnce(&ForwardPass<'_, T>, &GradientSums, &mut ViewMut<'_, T>) -> Result<(), Error>,
) -> Result<GradientSums, Error> {
    let room = Room::new(ROOM * pass.layout().channels())?;
    pass.through(dy, dx)?;
    room.free();
    let pass = pass.without_epilogue();
    let sums = sums_of(dx.as_view(), &pass, None)?;
    rest(&pass, &sums, dx)?;
    Ok(sums)
}

fn fused<T: Element>(
    dy: Input<'_, T>,
    pass: &ForwardPass<'_, T>,
    bounds: Option<&Bounds<T>>,
    planar: Planar,
    dx: &mut ViewMut<'_, T>,
) -> Result<GradientSums, Error> {
    let mut gradients = GradientSums::zeros(pass.layout())?;
    let group = planar.group(2 * size_of::<T>());
    let (dgamma, dbeta) = gradients.dgamma_and_dbeta();
    let groups = Groups::new(dgamma, dbeta, group)?;
    let (width, coefficients) = (planar.width(), pass.coefficients);
    let count = (planar.outer * planar.inner) as f64;
    dx.map_tiles(&planar.groups(group), |rect, dx| {
        let (dy, cached) = (dy.tile(width, rect, &dx), dx.cached());
        let (x, channels) = (pass.x.tile(width, rect), planar.channels_of(rect));
        // The gradient that passes the activation is written block by block, and summed while the nearest cache has it.
        let block = |block_channels: Range<usize>, block| {
            let part = planar.rect(&block_channels, block);
            let block_channels = channels.start + block_channels.start..channels.start + block_channels.end;
            let (rect, to) = (part.within(rect), cached.part(&part));
            let dy = pass.through_runs(&planar, (&block_channels, &rect), dy.part(&part), &to);
            let bounds = bounds.map(|bounds| bounds.of_channels(block_channels.clone()));
            sums_of_block(dy, x.part(&part), &coefficients.mean()[block_channels], bounds)
        };
        let sums = planar.fold(0..channels.len(), 0..planar.blocks(), block)?;
        let dy = if pass.has_activation() { cached.as_tile() } else { dy };
        let of = |(c, sums): (usize, &OfChannel<SumAndProducts>)| {
            dx_coefficients(coefficients, c, sums.second * coefficients.invstd()[c], sums.first, count)
        };
        let of_channels = collected(channels.clone().zip(&sums).map(of))?;
        let dx = pass.output(&dx, &cached);
        // Last runs first: they are still in the nearest cache.
        for r in (0..planar.outer).rev() {
            let (dy, x, dx) =
                (dy.split_row(r, planar.inner), x.split_row(r, planar.inner), dx.split_row(r, planar.inner));
            let bounds = bounds.map(|bounds| |c: usize| bounds.of_channel(channels.start + c));
            dispatch(DxRuns { dy, x, dx: &dx, coefficients: |c: usize| of_channels[c], bounds });
        }
        let sums = channels.clone().zip(sums).map(|(c, sums)| dgamma_and_dbeta(pass, c, sums.into_pair()));
        groups.write(&channels, sums);
        Ok(())
    })?;
    Ok(gradients)
}

/// dx, dγ and dβ with frozen statistics: dx = γ/√(var+ε)·dy.
///
/// The gradient of the residual, where it is asked for, is written to `dresidual`.
///
/// # Errors
/// As [`gradient_sums`](crate::gradient_sums()), [`Error::Range`], and [`Error::NoDresidual`] for [`Dy::InDresidual`] without it.
pub fn infer_backward<T: Element>(
    dy: Dy<'_, T>,
    pass: ForwardPass<'_, T>,
    dresidual: Option<&mut ViewMut<'_, T>>,
    dx: &mut ViewMut<'_, T>,
) -> Result<GradientSums, Error> {
    let _mode = begin()?;
    pass.coefficients.check_range::<T>()?;
    let count = repeat_n(pass.layout().count() as f64, pass.layout().channels());
    let scale_only = pass.coefficients.scale_only()?;
    back(dy, pass, count, dresidual, dx, |dy, pass, dx| {
        if pass.has_activation() {
            return in_place(dy, pass, dx, |_, _, dx| infer(Input::InPlace, &scale_only, Epilogue::default(), dx));
        }
        let sums = sums_of(dy.view(dx), &pass, None)?;
        infer(dy, &scale_only, Epilogue::default(), dx)?;
        Ok(sums)
    })
}
