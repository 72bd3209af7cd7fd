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
//! Where an activation followed, dy above stands for the gradient that passes through it: dy where y > 0, else 0, which is
//! that of the residual too. It is made part by part in the memory where it is needed next, while it is in cache.

use crate::blocks::{Family, Interleaved, Merge, Planar, Tree, tile};
use crate::bytes;
use crate::coefficients::Coefficients;
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Error;
use crate::floor::copy;
use crate::infer::{infer, infer_in_place};
use crate::layout::Layout;
use crate::simd::{
    DxCoefficients, DxRows, DxRuns, FloatMode, GradientSumRows, GradientSumRuns, LANES, NormalizeRows, NormalizeRuns,
    ROWS, ReluBackward, dispatch,
};
use crate::view::{Rect, Tile, TileMut, View, ViewMut};
use std::iter::repeat_n;
use std::ops::Range;

/// dγ = Σdy·x̂ and dβ = Σdy per channel with the number of values summed, in float64; a value that merges.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientSums {
    count: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
}

const FORMAT: bytes::Format = bytes::Format { what: "GradientSums", header: b"batchnorm-gradient-sums/1\n" };

impl GradientSums {
    /// Sums from their parts.
    ///
    /// # Errors
    /// [`Error::NoChannels`], [`Error::Channels`] for parts of different lengths, [`Error::NotFinite`] and
    /// [`Error::Negative`] for a count.
    pub fn new(count: Vec<f64>, dgamma: Vec<f64>, dbeta: Vec<f64>) -> Result<Self, Error> {
        if count.is_empty() {
            return Err(Error::NoChannels);
        }
        Error::check_channels("dgamma", dgamma.len(), count.len())?;
        Error::check_channels("dbeta", dbeta.len(), count.len())?;
        Error::check_counts(&count)?;
        Ok(Self { count, dgamma, dbeta })
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.count.len()
    }

    /// Values per channel: m.
    pub fn count(&self) -> &[f64] {
        &self.count
    }

    /// ∂ℓ/∂γ per channel.
    pub fn dgamma(&self) -> &[f64] {
        &self.dgamma
    }

    /// ∂ℓ/∂β per channel.
    pub fn dbeta(&self) -> &[f64] {
        &self.dbeta
    }

    /// The sums over the values of both.
    ///
    /// # Errors
    /// [`Error::Channels`].
    pub fn merge(&self, other: &Self) -> Result<Self, Error> {
        Error::check_channels("other", other.channels(), self.channels())?;
        let _mode = FloatMode::standard();
        let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect();
        Ok(Self {
            count: sum(&self.count, &other.count),
            dgamma: sum(&self.dgamma, &other.dgamma),
            dbeta: sum(&self.dbeta, &other.dbeta),
        })
    }

    /// A portable form: a header with the version, the number of channels, then count, dγ and dβ, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        FORMAT.write([&self.count, &self.dgamma, &self.dbeta])
    }

    /// Reads what [`GradientSums::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Bytes`], and those of [`GradientSums::new`].
    pub fn from_bytes(data: &[u8]) -> Result<Self, Error> {
        let [count, dgamma, dbeta] = FORMAT.read(data)?;
        Self::new(count, dgamma, dbeta)
    }

    fn of(layout: Layout, coefficients: &Coefficients, sums: Vec<(f64, f64)>) -> Self {
        let (dbeta, dgamma) = sums
            .into_iter()
            .zip(coefficients.invstd())
            .map(|((dbeta, products), invstd)| (dbeta, products * invstd))
            .unzip();
        Self { count: vec![layout.count() as f64; layout.channels()], dgamma, dbeta }
    }
}

/// Σdy and Σdy·(x − mean) of some blocks of one channel.
struct Scalar(f64, f64);

impl Merge for Scalar {
    fn merge(&mut self, right: &Self) {
        self.0 += right.0;
        self.1 += right.1;
    }
}

/// The same of some blocks of columns.
struct Partial {
    dbeta: Vec<f64>,
    products: Vec<f64>,
}

impl Merge for Partial {
    fn merge(&mut self, right: &Self) {
        self.dbeta.iter_mut().zip(&right.dbeta).for_each(|(a, b)| *a += b);
        self.products.iter_mut().zip(&right.products).for_each(|(a, b)| *a += b);
    }
}

/// Elements of the gradient through an activation that are made at a time where only sums are taken of them.
const PART: usize = 4096;

/// The gradient through the activation of a forward pass, which is that of its residual: dy where y > 0, else 0; dy itself
/// where there was no activation. `x`, `coefficients` and `epilogue` are those of the forward pass; without dy, `gated` holds it
/// and is written over it.
///
/// # Errors
/// As [`gradient_sums`].
pub fn gate<T: Element>(
    dy: Option<View<'_, T>>,
    x: View<'_, T>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    gated: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    let _mode = crate::begin()?;
    let layout = x.layout();
    let others = [("dy", dy.map_or(layout, |dy| dy.layout())), ("dresidual", gated.layout())];
    check(layout, &others, coefficients, epilogue)?;
    let elements = tile::<T>(layout);
    match (Family::of(layout), epilogue.passes(), dy) {
        (_, true, Some(dy)) => copy(dy, None, gated, false)?,
        (_, true, None) => (),
        (Family::Planar(planar), false, _) => {
            gated.map_tiles(&planar.planes(elements), |rect, gated| {
                let (x, residual) = (x.tile(planar.inner, rect), epilogue.residual.map(|z| z.tile(planar.inner, rect)));
                let dy = dy.map_or_else(|| gated.as_tile(), |dy| dy.tile(planar.inner, rect));
                let coefficients = |r: usize| coefficients.of_channel::<T>((rect.rows.start + r) % planar.channels);
                dispatch(NormalizeRuns { x, y: &gated, coefficients, then: ReluBackward { dy, residual } });
            });
        }
        (Family::Interleaved(rows), false, _) => {
            gated.map_tiles(&rows.tiles(elements), |rect, gated| {
                let (x, residual) = (x.tile(rows.width, rect), epilogue.residual.map(|z| z.tile(rows.width, rect)));
                let dy = dy.map_or_else(|| gated.as_tile(), |dy| dy.tile(rows.width, rect));
                let columns = coefficients.of_columns::<T>(&rows, rect.cols.clone());
                let coefficients = columns.each_ref().map(Vec::as_slice);
                dispatch(NormalizeRows { x, y: &gated, coefficients, then: ReluBackward { dy, residual } });
            });
        }
    }
    Ok(())
}

/// dγ and dβ of a training pass: `x`, `coefficients` and `epilogue` are those of its forward pass.
///
/// # Errors
/// [`Error::Channels`], [`Error::LayoutMismatch`], and [`Error::Threads`], [`Error::Level`] for what the environment
/// names wrongly.
pub fn gradient_sums<T: Element>(
    dy: View<'_, T>,
    x: View<'_, T>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
) -> Result<GradientSums, Error> {
    let _mode = crate::begin()?;
    let layout = x.layout();
    check(layout, &[("dy", dy.layout())], coefficients, epilogue)?;
    let sums = if layout.is_empty() {
        vec![(0.0, 0.0); layout.channels()]
    } else {
        match Family::of(layout) {
            Family::Planar(planar) => sums_planar(dy, x, planar, coefficients, epilogue),
            Family::Interleaved(rows) => sums_interleaved(dy, x, rows, coefficients, epilogue),
        }
    };
    Ok(GradientSums::of(layout, coefficients, sums))
}

fn check<T: Element>(
    layout: Layout,
    others: &[(&'static str, Layout)],
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
) -> Result<(), Error> {
    for &(argument, other) in others {
        if other != layout {
            return Err(Error::LayoutMismatch { argument });
        }
    }
    epilogue.check(layout)?;
    Error::check_channels("x", layout.channels(), coefficients.channels())
}

fn sums_planar<T: Element>(
    dy: View<'_, T>,
    x: View<'_, T>,
    planar: Planar,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
) -> Vec<(f64, f64)> {
    let width = planar.width();
    let sums = planar.map_channels(2 * x.bytes(), |channels, block| {
        let place = planar.rect(&channels, block);
        let (dy, x) = (dy.tile(width, &place), x.tile(width, &place));
        let mean = &coefficients.mean()[channels.clone()];
        if epilogue.passes() {
            return sums_of_block(dy, x, mean);
        }
        let residual = epilogue.residual.map(|z| z.tile(width, &place));
        let mut memory = vec![T::from_f64(0.0); dy.rows() * dy.cols()];
        let gated = TileMut::of(&mut memory, dy.rows(), dy.cols());
        let run = dy.cols() / channels.len();
        for r in 0..dy.rows() {
            let then = ReluBackward { dy: dy.split_row(r, run), residual: residual.map(|z| z.split_row(r, run)) };
            let coefficients = |c: usize| coefficients.of_channel::<T>(channels.start + c);
            dispatch(NormalizeRuns { x: x.split_row(r, run), y: &gated.split_row(r, run), coefficients, then });
        }
        sums_of_block(gated.as_tile(), x, mean)
    });
    sums.into_iter().map(|Scalar(dbeta, products)| (dbeta, products)).collect()
}

fn sums_of_block<T: Element>(dy: Tile<'_, T>, x: Tile<'_, T>, mean: &[f64]) -> Vec<Scalar> {
    dispatch(GradientSumRuns { dy, x, mean }).into_iter().map(|(dbeta, products)| Scalar(dbeta, products)).collect()
}

fn sums_interleaved<T: Element>(
    dy: View<'_, T>,
    x: View<'_, T>,
    rows: Interleaved,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
) -> Vec<(f64, f64)> {
    let of_blocks = |columns: Range<usize>, blocks: Range<usize>| {
        let mean = rows.spread(columns.clone(), 0, |c| coefficients.mean()[c]);
        let gate = (!epilogue.passes()).then(|| coefficients.of_columns::<T>(&rows, columns.clone()));
        // Whole steps of a sum; without a gate, whole blocks.
        let step = if gate.is_some() { (PART / columns.len()).max(ROWS) / ROWS * ROWS } else { rows.rows };
        let mut memory = vec![T::from_f64(0.0); if gate.is_some() { step * columns.len() } else { 0 }];
        Tree::of(blocks.map(|b| {
            let (mut dbeta, mut products) = (vec![0.0; columns.len()], vec![0.0; columns.len()]);
            let block = rows.block(b);
            for start in block.clone().step_by(step) {
                let rect = Rect { rows: start..block.end.min(start + step), cols: columns.clone() };
                let (mut dy, x) = (dy.tile(rows.width, &rect), x.tile(rows.width, &rect));
                let gated;
                if let Some(gate) = &gate {
                    let residual = epilogue.residual.map(|z| z.tile(rows.width, &rect));
                    let coefficients = gate.each_ref().map(Vec::as_slice);
                    gated = TileMut::of(&mut memory, x.rows(), x.cols());
                    dispatch(NormalizeRows { x, y: &gated, coefficients, then: ReluBackward { dy, residual } });
                    dy = gated.as_tile();
                }
                dispatch(GradientSumRows { dy, x, mean: &mean, dbeta: &mut dbeta, products: &mut products });
            }
            Partial { dbeta, products }
        }))
    };
    let close = |strip: Partial| {
        let columns: Vec<(f64, f64)> = strip.dbeta.into_iter().zip(strip.products).collect();
        let channel = |columns: &[(f64, f64)]| {
            let leaves = columns.iter().map(|&(dbeta, products)| Scalar(dbeta, products));
            Tree::of(leaves).map_or((0.0, 0.0), |Scalar(dbeta, products)| (dbeta, products))
        };
        columns.chunks(rows.inner).map(channel).collect()
    };
    rows.map_strips(2 * x.bytes(), of_blocks, close)
}

/// dx of a training pass from dy and the sums, which may be those of more than this dy: of all micro-batches or
/// processes whose moments were merged. Without dy, dx holds it and is written over it.
///
/// # Errors
/// As [`gradient_sums`], and [`Error::Counts`].
pub fn gradient_apply<T: Element>(
    dy: Option<View<'_, T>>,
    x: View<'_, T>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    sums: &GradientSums,
    dx: &mut ViewMut<'_, T>,
) -> Result<(), Error> {
    let _mode = crate::begin()?;
    let layout = x.layout();
    check(layout, &[("dy", dy.map_or(layout, |dy| dy.layout())), ("out", dx.layout())], coefficients, epilogue)?;
    coefficients.check_counts(sums.count.iter().copied())?;
    let of = |c: usize| dx_coefficients(coefficients, c, sums.dgamma[c], sums.dbeta[c], sums.count[c]);
    let channels: Vec<DxCoefficients<f64>> = (0..layout.channels()).map(of).collect();
    // With an activation a tile of each tensor is to stay in cache until dx is made of the gradient that passes.
    let elements = tile::<T>(layout) / if epilogue.passes() { 1 } else { 4 };
    match Family::of(layout) {
        Family::Planar(planar) => {
            dx.map_tiles(&planar.planes(elements), |rect, dx| {
                let mut dy = dy.map_or_else(|| dx.as_tile(), |dy| dy.tile(planar.inner, rect));
                let x = x.tile(planar.inner, rect);
                let channel = |r: usize| (rect.rows.start + r) % planar.channels;
                if !epilogue.passes() {
                    let residual = epilogue.residual.map(|z| z.tile(planar.inner, rect));
                    let coefficients = |r| coefficients.of_channel::<T>(channel(r));
                    dispatch(NormalizeRuns { x, y: &dx.cached(), coefficients, then: ReluBackward { dy, residual } });
                    dy = dx.as_tile();
                }
                dispatch(DxRuns { dy, x, dx: &dx, coefficients: |r| channels[channel(r)] });
            });
        }
        Family::Interleaved(rows) => {
            dx.map_tiles(&rows.tiles(elements), |rect, dx| {
                let mut dy = dy.map_or_else(|| dx.as_tile(), |dy| dy.tile(rows.width, rect));
                let x = x.tile(rows.width, rect);
                if !epilogue.passes() {
                    let residual = epilogue.residual.map(|z| z.tile(rows.width, rect));
                    let columns = coefficients.of_columns::<T>(&rows, rect.cols.clone());
                    let coefficients = columns.each_ref().map(Vec::as_slice);
                    dispatch(NormalizeRows { x, y: &dx.cached(), coefficients, then: ReluBackward { dy, residual } });
                    dy = dx.as_tile();
                }
                let column = |field: fn(DxCoefficients<f64>) -> f64| {
                    rows.spread(rect.cols.clone(), LANES, |c| field(channels[c]))
                };
                let (mean, offset) = (column(|a| a.mean), column(|a| a.offset));
                let (slope, scale) = (column(|a| a.slope), column(|a| a.scale));
                let coefficients =
                    DxCoefficients { mean: &mean[..], offset: &offset[..], slope: &slope[..], scale: &scale[..] };
                dispatch(DxRows { dy, x, dx: &dx, coefficients });
            });
        }
    }
    Ok(())
}

fn dx_coefficients(coefficients: &Coefficients, c: usize, dgamma: f64, dbeta: f64, count: f64) -> DxCoefficients<f64> {
    DxCoefficients {
        mean: coefficients.mean()[c],
        offset: dbeta / count,
        slope: dgamma * coefficients.invstd()[c] / count,
        scale: coefficients.scale()[c],
    }
}

/// `gradient_apply ∘ gradient_sums`, to the bit; where channels lie in runs, channel by channel, so that the second pass
/// reads from cache. Without dy, dx holds it and is written over it.
///
/// # Errors
/// As [`gradient_sums`], and [`Error::Counts`] where x was normalized by the moments of more than x.
pub fn backward<T: Element>(
    dy: Option<View<'_, T>>,
    x: View<'_, T>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    dx: &mut ViewMut<'_, T>,
) -> Result<GradientSums, Error> {
    let _mode = crate::begin()?;
    let layout = x.layout();
    check(layout, &[("dy", dy.map_or(layout, |dy| dy.layout())), ("out", dx.layout())], coefficients, epilogue)?;
    coefficients.check_counts(repeat_n(layout.count() as f64, layout.channels()))?;
    match Family::of(layout) {
        Family::Planar(planar) if planar.fuses() && !layout.is_empty() => {
            Ok(fused(dy, x, planar, coefficients, epilogue, dx))
        }
        _ => {
            let sums = gradient_sums(dy.unwrap_or_else(|| dx.as_view()), x, coefficients, epilogue)?;
            gradient_apply(dy, x, coefficients, epilogue, &sums, dx)?;
            Ok(sums)
        }
    }
}

fn fused<T: Element>(
    dy: Option<View<'_, T>>,
    x: View<'_, T>,
    planar: Planar,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    dx: &mut ViewMut<'_, T>,
) -> GradientSums {
    let count = (planar.outer * planar.inner) as f64;
    let groups = dx.map_tiles(&planar.groups(2 * size_of::<T>()), |rect, dx| {
        let mut dy = dy.map_or_else(|| dx.as_tile(), |dy| dy.tile(planar.width(), rect));
        let x = x.tile(planar.width(), rect);
        let channels = planar.channels_of(rect);
        if !epilogue.passes() {
            let residual = epilogue.residual.map(|z| z.tile(planar.width(), rect));
            let coefficients: Vec<_> = channels.clone().map(|c| coefficients.of_channel::<T>(c)).collect();
            for r in 0..planar.outer {
                let (dy, x) = (dy.split_row(r, planar.inner), x.split_row(r, planar.inner));
                let then = ReluBackward { dy, residual: residual.map(|z| z.split_row(r, planar.inner)) };
                let (gated, coefficients) = (dx.cached(), |c: usize| coefficients[c]);
                dispatch(NormalizeRuns { x, y: &gated.split_row(r, planar.inner), coefficients, then });
            }
            dy = dx.as_tile();
        }
        let means = &coefficients.mean()[channels.clone()];
        let block = |channels: Range<usize>, block| {
            let place = planar.rect(&channels, block);
            sums_of_block(dy.part(&place), x.part(&place), &means[channels])
        };
        let sums = planar.fold(0..channels.len(), 0..planar.blocks(), block);
        let coefficients: Vec<DxCoefficients<f64>> = (channels.zip(&sums))
            .map(|(c, &Scalar(dbeta, products))| {
                dx_coefficients(coefficients, c, products * coefficients.invstd()[c], dbeta, count)
            })
            .collect();
        // Last runs first: they are still in the nearest cache.
        for r in (0..planar.outer).rev() {
            let (dy, x, dx) =
                (dy.split_row(r, planar.inner), x.split_row(r, planar.inner), dx.split_row(r, planar.inner));
            dispatch(DxRuns { dy, x, dx: &dx, coefficients: |c: usize| coefficients[c] });
        }
        sums
    });
    GradientSums::of(
        x.layout(),
        coefficients,
        groups.into_iter().flatten().map(|Scalar(dbeta, products)| (dbeta, products)).collect(),
    )
}

/// dx, dγ and dβ with frozen statistics: dx = γ/√(var+ε)·dy. Without dy, dx holds it and is written over it.
///
/// # Errors
/// As [`gradient_sums`].
pub fn infer_backward<T: Element>(
    dy: Option<View<'_, T>>,
    x: View<'_, T>,
    coefficients: &Coefficients,
    epilogue: Epilogue<View<'_, T>>,
    dx: &mut ViewMut<'_, T>,
) -> Result<GradientSums, Error> {
    if dx.layout() != x.layout() {
        return Err(Error::LayoutMismatch { argument: "out" });
    }
    coefficients.check_range::<T>()?;
    let (mut dy, nothing) = (dy, Epilogue::default());
    if !epilogue.passes() {
        gate(dy, x, coefficients, epilogue, dx)?;
        dy = None;
    }
    let sums = gradient_sums(dy.unwrap_or_else(|| dx.as_view()), x, coefficients, nothing)?;
    match dy {
        Some(dy) => infer(dy, &coefficients.scale_only(), nothing, dx)?,
        None => infer_in_place(&coefficients.scale_only(), nothing, dx)?,
    }
    Ok(sums)
}
