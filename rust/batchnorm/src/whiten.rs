//! Whitening: channels are decorrelated by the statistics of the batch, not only scaled.
//!
//! Forward, with x a position's channels of one group and Λ the biased covariance of the batch:
//!
//! ```text
//! x̂ = W(x − mean),   W(Λ + εI)Wᵀ = I,   y = γx̂ + β
//! ```
//!
//! Backward, with G = Σ dy(x − mean)ᵀ over all positions: dβ = Σdy; dγ is the diagonal of G·Wᵀ; ∂ℓ/∂W = diag(γ)·G, from which
//! [`crate::whitener`] finds ∂ℓ/∂Λ; and
//!
//! ```text
//! dx = Wᵀγ(dy − Σdy/m) + (2/m)·∂ℓ/∂Λ·(x − mean)
//! ```
//!
//! which is the derivative of Λ and of the mean: every example moves both. With one channel a group it is batch normalization.

use crate::comoments::CoMoments;
use crate::comoments::comoments;
use crate::element::Element;
use crate::error::Error;
use crate::gradient_sums::GradientSums;
use crate::input::{Input, check_layout};
use crate::layout::Layout;
use crate::memory::{collected, copied, zeros};
use crate::parallel;
use crate::parameters::Parameters;
use crate::patch::{Patch, Patches};
use crate::products::{Centred, products};
use crate::shrinkage::{PowerSums, Shrinkage, squared_norms};
use crate::verb::begin;
use crate::view::{View, ViewMut};
use crate::whitener::{Method, Whitener};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatRef, Par};
use std::iter::repeat_n;

/// How a batch is whitened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whitening {
    /// How W is made.
    pub method: Method,
    /// Groups of adjacent channels, each whitened by itself.
    pub groups: usize,
    /// Whether Λ is shrunk as by Ledoit and Wolf (2004), so that it has an inverse even with fewer positions than channels.
    pub shrinkage: bool,
}

/// A whitening pass, as its backward pass needs it.
pub struct WhiteningPass {
    comoments: CoMoments,
    whiteners: Vec<Whitener>,
    shrinkage: Option<(PowerSums, Vec<Shrinkage>)>,
    gamma: Vec<f64>,
    layout: Layout,
}

impl WhiteningPass {
    /// The statistics of the batch.
    pub fn comoments(&self) -> &CoMoments {
        &self.comoments
    }

    /// W of each group: (groups, D, D), row-major.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn matrix(&self) -> Result<Vec<f64>, Error> {
        row_major(&self.whiteners, |_| 1.0)
    }

    /// The most steps that a group took, where the method is iterative.
    pub fn steps(&self) -> Option<u32> {
        self.whiteners.iter().filter_map(|whitener| whitener.steps).max()
    }

    /// The largest max|I − W(Λ+εI)Wᵀ| of a group, where the method is iterative.
    pub fn residual(&self) -> Option<f64> {
        largest_residual(&self.whiteners)
    }

    /// The weight δ of shrinkage of each group; none if nothing was shrunk.
    pub fn shrinkage(&self) -> Option<impl Iterator<Item = f64>> {
        self.shrinkage.as_ref().map(|(_, of_groups)| of_groups.iter().map(|shrinkage| shrinkage.weight))
    }
}

fn largest_residual(whiteners: &[Whitener]) -> Option<f64> {
    whiteners.iter().filter_map(|whitener| whitener.residual).reduce(|a, b| if a >= b { a } else { b })
}

/// diag(scale)·W of each group, row-major.
fn row_major(whiteners: &[Whitener], scale: impl Fn(usize) -> f64) -> Result<Vec<f64>, Error> {
    let d = whiteners.first().map_or(0, |whitener| whitener.matrix.nrows());
    collected((0..whiteners.len() * d * d).map(|k| {
        let (g, i, j) = (k / (d * d), k / d % d, k % d);
        scale(g * d + i) * whiteners[g].matrix[(i, j)]
    }))
}

/// The matrix of group `g` among matrices of d × d.
fn of_group(matrices: &[f64], d: usize, g: usize) -> MatRef<'_, f64> {
    MatRef::from_row_major_slice(&matrices[g * d * d..(g + 1) * d * d], d, d)
}

/// Calls `f` with the number of each group, on several threads if the cubes of their sizes make that worth while.
fn map_groups<R: Send + Sync>(
    groups: usize,
    d: usize,
    f: impl Fn(usize) -> Result<R, Error> + Sync,
) -> Result<Vec<R>, Error> {
    parallel::map(groups, groups.saturating_mul(d.saturating_pow(3)).saturating_mul(8), f)
}

/// W of each group of covariances, (groups, D, D) and row-major as they are, of which the lower triangles count; and the largest
/// max|I − W(Λ+εI)Wᵀ|, where the method is iterative.
///
/// # Errors
/// [`Error::Groups`], [`Error::Elements`] if `cov` is not of that form; [`Error::NotFinite`], [`Error::Eps`];
/// [`Error::Singular`], [`Error::NotConverged`]; [`Error::NoMemory`].
pub fn whitening_matrix(
    cov: &[f64],
    channels: usize,
    groups: usize,
    eps: f64,
    method: Method,
) -> Result<(Vec<f64>, Option<f64>), Error> {
    let _mode = begin()?;
    let d = Error::check_groups(groups, channels)?;
    if cov.len() != channels.saturating_mul(d) {
        return Err(Error::Elements { argument: "cov", got: cov.len(), wanted: channels.saturating_mul(d) });
    }
    check_eps(eps)?;
    Error::check_finite_rows("cov", cov, d)?;
    let whiteners = map_groups(groups, d, |g| Whitener::new(of_group(cov, d, g), eps, method, g))?;
    Ok((row_major(&whiteners, |_| 1.0)?, largest_residual(&whiteners)))
}

fn check_eps(eps: f64) -> Result<(), Error> {
    if eps >= 0.0 && eps.is_finite() { Ok(()) } else { Err(Error::Eps { value: eps }) }
}

/// Whitens x by the statistics of the batch: y = γW(x − mean) + β.
///
/// Its bits are the same for any number of threads, on processors of one type at one level. Between types they differ, within
/// the accuracy of the linear algebra.
///
/// # Errors
/// [`Error::Groups`], [`Error::LayoutMismatch`], [`Error::Channels`], [`Error::NotFinite`] for parameters, [`Error::Eps`];
/// [`Error::TooFewValues`] for fewer than 2 positions; [`Error::NotFinite`] where the statistics of x are not finite;
/// [`Error::Singular`], [`Error::NotConverged`]; [`Error::NoMemory`], [`Error::Threads`], [`Error::Level`]. Nothing is written
/// then.
pub fn whiten_forward<T: Element>(
    x: View<'_, T>,
    whitening: Whitening,
    parameters: Parameters<'_>,
    y: &mut ViewMut<'_, T>,
) -> Result<WhiteningPass, Error> {
    let _mode = begin()?;
    let layout = y.layout();
    check_layout("out", x.layout(), layout)?;
    let channels = layout.channels();
    let patches = Patches::of(layout, whitening.groups)?;
    check_eps(parameters.eps)?;
    let (gamma, beta) =
        (of_channels("gamma", parameters.gamma, 1.0, channels)?, of_channels("beta", parameters.beta, 0.0, channels)?);
    if layout.count() < 2 {
        return Err(Error::TooFewValues { channel: 0, count: layout.count() as f64, wanted: 2 });
    }
    let comoments = comoments(x, whitening.groups)?;
    Error::check_finite("the mean of x", comoments.mean())?;
    Error::check_finite_rows("the covariance of x", comoments.scatter(), patches.group)?;
    let centred = Centred { x, mean: comoments.mean() };
    let (cov, d) = (comoments.cov(0)?, patches.group);
    let shrinkage = match whitening.shrinkage {
        false => None,
        true => {
            let sums = PowerSums::of(&patches, centred)?;
            let count = comoments.count();
            let of_groups = (0..patches.groups()).map(|g| Shrinkage::of(of_group(&cov, d, g), sums.fourth[g], count));
            let of_groups = collected(of_groups)?;
            Some((sums, of_groups))
        }
    };
    let whiteners = map_groups(patches.groups(), d, |g| {
        let cov = of_group(&cov, d, g);
        let shrunk = shrinkage.as_ref().map(|(_, of_groups)| of_groups[g].apply(cov));
        Whitener::new(shrunk.as_ref().map_or(cov, |shrunk| shrunk.as_ref()), parameters.eps, whitening.method, g)
    })?;
    let matrices = row_major(&whiteners, |_| 1.0)?;
    let room = || Ok([patches.room(None)?, patches.room(None)?]);
    let x = Input::View(x);
    patches.write(y, room, |[from, to], channels, rect, y| {
        from.gather(patches.input(&x, rect, y), &comoments.mean()[channels.clone()]);
        to.like(from);
        for g in 0..channels.len() / d {
            let matrix = of_group(&matrices, d, channels.start / d + g);
            let own = g * d..(g + 1) * d;
            matmul(to.matrix_mut(own.clone()), Accum::Replace, matrix, from.matrix(own), 1.0, Par::Seq);
        }
        to.scatter(&gamma[channels.clone()], &beta[channels.clone()], y);
        Ok(())
    })?;
    Ok(WhiteningPass { comoments, whiteners, shrinkage, gamma, layout })
}

fn of_channels(
    argument: &'static str,
    values: Option<&[f64]>,
    absent: f64,
    channels: usize,
) -> Result<Vec<f64>, Error> {
    let Some(values) = values else { return collected(repeat_n(absent, channels)) };
    Error::check_channels(argument, values.len(), channels)?;
    Error::check_finite(argument, values)?;
    copied(values)
}

/// dx of a whitening pass, through its statistics, and dγ and dβ.
///
/// x is the tensor of the forward pass.
///
/// # Errors
/// [`Error::LayoutMismatch`]; [`Error::EigenvalueGap`] for principal components of which two have the same variance;
/// [`Error::NoMemory`], [`Error::Threads`], [`Error::Level`]. Nothing is written then.
pub fn whiten_backward<T: Element>(
    dy: View<'_, T>,
    x: View<'_, T>,
    pass: &WhiteningPass,
    dx: &mut ViewMut<'_, T>,
) -> Result<GradientSums, Error> {
    let _mode = begin()?;
    let layout = pass.layout;
    for (argument, got) in [("dy", dy.layout()), ("x", x.layout()), ("out", dx.layout())] {
        check_layout(argument, got, layout)?;
    }
    let (comoments, channels) = (&pass.comoments, layout.channels());
    let patches = Patches::of(layout, comoments.groups())?;
    let (d, count, origin) = (patches.group, comoments.count(), zeros(channels)?);
    let centred = Centred { x, mean: comoments.mean() };
    // G and Σdy
    let sums = products(&patches, Centred { x: dy, mean: &origin }, Some(centred))?;
    let matrix = |c: usize, i: usize| pass.whiteners[c / d].matrix[(c % d, i)];
    let dgamma = collected((0..channels).map(|c| (0..d).map(|i| matrix(c, i) * sums.products[c * d + i]).sum()))?;

    let cov = comoments.cov(0)?;
    let of_groups = map_groups(patches.groups(), d, |g| {
        let product = of_group(&sums.products, d, g);
        let dw = faer::Mat::from_fn(d, d, |i, j| pass.gamma[g * d + i] * product[(i, j)]);
        let dcov = pass.whiteners[g].backward(dw.as_ref(), g)?;
        Ok(match &pass.shrinkage {
            None => (dcov, 0.0),
            Some((_, of_groups)) => of_groups[g].backward(dcov.as_ref(), of_group(&cov, d, g)),
        })
    })?;
    // dx = Aᵀ·dy + B·(x − mean) + c·‖x − mean‖²(x − mean) + shift
    let a = row_major(&pass.whiteners, |c| pass.gamma[c])?;
    let b = collected((0..channels * d).map(|k| 2.0 / count * of_groups[k / (d * d)].0[(k / d % d, k % d)]))?;
    let c = collected(of_groups.iter().map(|(_, dfourth)| 4.0 * dfourth))?;
    let shift = collected((0..channels).map(|i| {
        let g = i / d;
        let through_mean: f64 = (0..d).map(|o| a[(g * d + o) * d + i % d] * sums.sums[g * d + o]).sum();
        let through_norms = pass.shrinkage.as_ref().map_or(0.0, |(powers, _)| c[g] * powers.third[i]);
        -(through_mean + through_norms) / count
    }))?;
    let ones = collected(repeat_n(1.0, channels))?;
    let room = || Ok(([patches.room(None)?, patches.room(None)?, patches.room(None)?], Vec::new()));
    let (dy, x) = (Input::View(dy), Input::View(x));
    patches.write(dx, room, |([from, own, to], norms), channels, rect, dx| {
        from.gather(patches.input(&dy, rect, dx), &origin[channels.clone()]);
        own.gather(patches.input(&x, rect, dx), &comoments.mean()[channels.clone()]);
        to.like(from);
        for g in 0..channels.len() / d {
            let (of_patch, g) = (g * d..(g + 1) * d, channels.start / d + g);
            let a = of_group(&a, d, g).transpose();
            matmul(to.matrix_mut(of_patch.clone()), Accum::Replace, a, from.matrix(of_patch.clone()), 1.0, Par::Seq);
            let b = of_group(&b, d, g);
            matmul(to.matrix_mut(of_patch.clone()), Accum::Add, b, own.matrix(of_patch), 1.0, Par::Seq);
        }
        if pass.shrinkage.is_some() {
            squared_norms(own, d, norms);
            add_by_norms(to, own, norms, &c[channels.start / d..], d);
        }
        to.scatter(&ones[channels.clone()], &shift[channels.clone()], dx);
        Ok(())
    })?;
    GradientSums::new(collected(repeat_n(count, channels))?, dgamma, sums.sums)
}

/// to += c·‖x‖²x, with c of each group and the norms of each group and position.
fn add_by_norms(to: &mut Patch, x: &Patch, norms: &[f64], c: &[f64], d: usize) {
    let positions = x.positions();
    x.add_to(to, |channel, p| c[channel / d] * norms[channel / d * positions + p]);
}
