//! The whitening matrix W of a covariance Λ, so that W(Λ+εI)Wᵀ = I, and the derivative of a loss by Λ from that by W.

use crate::error::Error;
use crate::memory::Room;
use crate::parallel;
use faer::dyn_stack::{MemBuffer, MemStack, StackReq};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, MatRef, Par};

/// How the whitening matrix is made: W(Λ+εI)Wᵀ = I has many solutions, a rotation of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// (Λ+εI)^(−1/2), the symmetric solution, nearest to the identity.
    Zca,
    /// D^(−1/2)Uᵀ: the principal components, those of the largest variance first. The entry of largest magnitude of each
    /// eigenvector (the first of equal ones) is positive.
    Pca,
    /// L⁻¹ with Λ+εI = LLᵀ: output i depends on inputs 0 to i alone.
    Cholesky,
    /// (Λ+εI)^(−1/2) by Newton–Schulz steps: products of matrices only. Without a number, as many as it takes.
    Iterative {
        /// The number of steps: the T of the literature.
        steps: Option<u32>,
    },
}

impl Method {
    /// The method of a name: "zca", "pca", "cholesky" or "iterative", which alone takes `steps`, 1 to 100.
    ///
    /// # Errors
    /// [`Error::Method`], [`Error::Steps`].
    pub fn find(name: &str, steps: Option<u32>) -> Result<Self, Error> {
        let method = match name {
            "zca" => Self::Zca,
            "pca" => Self::Pca,
            "cholesky" => Self::Cholesky,
            "iterative" => Self::Iterative { steps },
            _ => return Err(Error::Method { got: name.to_owned() }),
        };
        match (method, steps) {
            (_, None) | (Self::Iterative { .. }, Some(1..=MOST_STEPS)) => Ok(method),
            (_, Some(steps)) => Err(Error::Steps { steps, method: name.to_owned() }),
        }
    }
}

const MOST_STEPS: u32 = 100;
/// What ‖I − ZY‖ falls to at most before the steps end, unless rounding keeps it above.
const CONVERGED: f64 = 1e-14;
/// A residual above this is not whitening: the steps have not converged.
pub const WHITE: f64 = 1e-3;
/// Columns of a block of a product.
const BLOCK: usize = 256;
/// Eigenvalues that differ by less than this, relative to the larger, have no well-defined eigenvectors.
const LEAST_GAP: f64 = 1e-8;

/// The whitening matrix of one group of channels, and what its derivative needs.
pub(crate) struct Whitener {
    pub(crate) matrix: Mat<f64>,
    pub(crate) steps: Option<u32>,
    /// max|I − W(Λ+εI)Wᵀ|, where the method is iterative.
    pub(crate) residual: Option<f64>,
    kept: Kept,
}

enum Kept {
    /// Eigenvectors as columns, and the eigenvalues of Λ+εI.
    Symmetric(Mat<f64>, Vec<f64>),
    /// The same, in descending order.
    Principal(Mat<f64>, Vec<f64>),
    Triangular,
    /// The trace of Λ+εI, and Y and Z before each step.
    Steps(f64, Vec<[Mat<f64>; 2]>),
}

impl Whitener {
    /// The whitening matrix of a covariance, of which the lower triangle is read.
    ///
    /// # Errors
    /// [`Error::Singular`] if Λ+εI has no inverse, as far as float64 can tell; [`Error::NotConverged`]; [`Error::NoMemory`].
    pub(crate) fn new(cov: MatRef<'_, f64>, eps: f64, method: Method, group: usize) -> Result<Self, Error> {
        let d = cov.nrows();
        // What the library takes for its own matrices. It would end the process if it found no memory.
        Room::new(d.saturating_mul(d).saturating_mul(8 * 8))?.free();
        match method {
            Method::Zca => {
                let (vectors, values) = eigen(cov, eps, group)?;
                let scaled = Mat::from_fn(d, d, |i, j| vectors[(i, j)] / values[j].sqrt().sqrt());
                let matrix = times(scaled.as_ref(), scaled.transpose())?;
                Ok(Self { matrix, steps: None, residual: None, kept: Kept::Symmetric(vectors, values) })
            }
            Method::Pca => {
                let (mut vectors, mut values) = eigen(cov, eps, group)?;
                values.reverse();
                vectors = Mat::from_fn(d, d, |i, j| vectors[(i, d - 1 - j)]);
                for j in 0..d {
                    let largest =
                        (0..d).fold(0.0, |a: f64, i| if vectors[(i, j)].abs() > a.abs() { vectors[(i, j)] } else { a });
                    if largest < 0.0 {
                        (0..d).for_each(|i| vectors[(i, j)] = -vectors[(i, j)]);
                    }
                }
                let matrix = Mat::from_fn(d, d, |i, j| vectors[(j, i)] / values[i].sqrt());
                Ok(Self { matrix, steps: None, residual: None, kept: Kept::Principal(vectors, values) })
            }
            Method::Cholesky => cholesky(cov, eps, group),
            Method::Iterative { steps } => iterative(cov, eps, steps, group),
        }
    }

    /// ∂ℓ/∂Λ, symmetric, from ∂ℓ/∂W.
    ///
    /// # Errors
    /// [`Error::EigenvalueGap`] for principal components of which two have the same variance; [`Error::NoMemory`].
    pub(crate) fn backward(&self, dw: MatRef<'_, f64>, group: usize) -> Result<Mat<f64>, Error> {
        let d = dw.nrows();
        Room::new(d.saturating_mul(d).saturating_mul(6 * 8))?.free();
        let dcov = match &self.kept {
            Kept::Symmetric(u, values) => {
                let inner = times(times(u.transpose(), dw)?.as_ref(), u.as_ref())?;
                let root: Vec<f64> = values.iter().map(|v| v.sqrt()).collect();
                // One division after the other: the product of three roots may leave the range of float64.
                let weighted = Mat::from_fn(d, d, |i, j| -inner[(i, j)] / root[i] / root[j] / (root[i] + root[j]));
                times(times(u.as_ref(), weighted.as_ref())?.as_ref(), u.transpose())?
            }
            Kept::Principal(u, values) => {
                if let Some(k) = (1..d).find(|&k| values[k - 1] - values[k] < LEAST_GAP * values[k - 1]) {
                    return Err(Error::EigenvalueGap { group, pair: (k - 1, k), values: (values[k - 1], values[k]) });
                }
                let h = times(dw, u.as_ref())?;
                let inner = Mat::from_fn(d, d, |j, i| match i == j {
                    true => -0.5 * h[(i, i)] / values[i].sqrt() / values[i],
                    false => h[(i, j)] / values[i].sqrt() / (values[i] - values[j]),
                });
                times(times(u.as_ref(), inner.as_ref())?.as_ref(), u.transpose())?
            }
            Kept::Triangular => {
                let w = self.matrix.as_ref();
                let product = times(dw, w.transpose())?;
                let lower = Mat::from_fn(d, d, |i, j| match i.cmp(&j) {
                    std::cmp::Ordering::Less => 0.0,
                    std::cmp::Ordering::Equal => -0.5 * product[(i, i)],
                    std::cmp::Ordering::Greater => -product[(i, j)],
                });
                times(times(w.transpose(), lower.as_ref())?.as_ref(), w)?
            }
            Kept::Steps(trace, iterates) => steps_backward(dw, self.matrix.as_ref(), *trace, iterates)?,
        };
        Ok(Mat::from_fn(d, d, |i, j| 0.5 * (dcov[(i, j)] + dcov[(j, i)])))
    }
}

/// a·b, in blocks of columns on several threads where that pays.
fn times(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Result<Mat<f64>, Error> {
    let (rows, cols) = (a.nrows(), b.ncols());
    let multiply = |start: usize, cols: usize| {
        let mut product = Mat::zeros(rows, cols);
        matmul(&mut product, Accum::Replace, a, b.subcols(start, cols), 1.0, Par::Seq);
        product
    };
    if cols <= BLOCK {
        return Ok(multiply(0, cols));
    }
    let block = |k: usize| Ok(multiply(k * BLOCK, BLOCK.min(cols - k * BLOCK)));
    let work = rows.saturating_mul(cols).saturating_mul(a.ncols());
    let blocks = parallel::map(cols.div_ceil(BLOCK), work, block)?;
    let mut product = Mat::zeros(rows, cols);
    for (k, block) in blocks.iter().enumerate() {
        product.as_mut().subcols_mut(k * BLOCK, block.ncols()).copy_from(block);
    }
    Ok(product)
}

/// Memory that the library asks for.
fn scratch(request: StackReq) -> Result<MemBuffer, Error> {
    MemBuffer::try_new(request).map_err(|_| Error::NoMemory { bytes: request.size_bytes() })
}

/// Eigenvectors, as columns, and eigenvalues of Λ+εI, ascending. Rounding may make an eigenvalue of Λ negative, which none is.
fn eigen(cov: MatRef<'_, f64>, eps: f64, group: usize) -> Result<(Mat<f64>, Vec<f64>), Error> {
    let d = cov.nrows();
    let mut memory =
        scratch(self_adjoint_evd_scratch::<f64>(d, ComputeEigenvectors::Yes, Par::Seq, Default::default()))?;
    let (mut values, mut vectors) = (Mat::<f64>::zeros(d, 1), Mat::zeros(d, d));
    // Divided by its largest element: squares of very large and very small variances would leave the range of float64.
    let size = largest(cov);
    if size == 0.0 && eps == 0.0 {
        return Err(Error::Singular { group, smallest: 0.0, largest: 0.0 });
    }
    let unit = if size == 0.0 { 1.0 } else { size };
    let scaled = Mat::from_fn(d, d, |i, j| cov[(i, j)] / unit);
    self_adjoint_evd(
        scaled.as_ref(),
        values.col_mut(0).as_diagonal_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| Error::NotConverged { group })?;
    let values: Vec<f64> = (0..d).map(|i| (values[(i, 0)] * unit).max(0.0) + eps).collect();
    check_regular(values[0], values[d - 1], d, group)?;
    Ok((vectors, values))
}

fn largest(matrix: MatRef<'_, f64>) -> f64 {
    let mut largest = 0.0f64;
    for i in 0..matrix.nrows() {
        for j in 0..=i {
            largest = largest.max(matrix[(i, j)].abs());
        }
    }
    largest
}

/// Checks that the smallest eigenvalue is above what rounding makes of 0.
fn check_regular(smallest: f64, largest: f64, d: usize, group: usize) -> Result<(), Error> {
    let noise = if d == 1 { 0.0 } else { d as f64 * f64::EPSILON * largest };
    // A NaN is no more than the noise either.
    if smallest > noise { Ok(()) } else { Err(Error::Singular { group, smallest, largest }) }
}

fn cholesky(cov: MatRef<'_, f64>, eps: f64, group: usize) -> Result<Whitener, Error> {
    let d = cov.nrows();
    let mut lower = Mat::from_fn(d, d, |i, j| match i.cmp(&j) {
        std::cmp::Ordering::Less => 0.0,
        std::cmp::Ordering::Equal => cov[(i, i)] + eps,
        std::cmp::Ordering::Greater => cov[(i, j)],
    });
    let most = (0..d).fold(0.0, |most: f64, i| most.max(lower[(i, i)]));
    let mut memory = scratch(cholesky_in_place_scratch::<f64>(d, Par::Seq, Default::default()))?;
    let stack = MemStack::new(&mut memory);
    cholesky_in_place(lower.as_mut(), Default::default(), Par::Seq, stack, Default::default())
        .map_err(|_| Error::Singular { group, smallest: 0.0, largest: most })?;
    // The square of a pivot is not below the smallest eigenvalue.
    let least = (0..d).fold(f64::INFINITY, |least, i| least.min(lower[(i, i)] * lower[(i, i)]));
    check_regular(least, most, d, group)?;
    let mut matrix = Mat::zeros(d, d);
    invert_lower_triangular(matrix.as_mut(), lower.as_ref(), Par::Seq);
    Ok(Whitener { matrix, steps: None, residual: None, kept: Kept::Triangular })
}

/// max|I − ab|
fn residual(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Result<f64, Error> {
    let product = times(a, b)?;
    let mut most = 0.0f64;
    for j in 0..product.ncols() {
        for i in 0..product.nrows() {
            let wanted = if i == j { 1.0 } else { 0.0 };
            let off = (wanted - product[(i, j)]).abs();
            most = if off.is_nan() { f64::NAN } else { most.max(off) };
        }
    }
    Ok(most)
}

/// The coupled Newton–Schulz iteration (Higham 2008, equation 6.35) on A = (Λ+εI)/tr(Λ+εI): Y and Z tend to A^(1/2) and
/// A^(−1/2).
fn iterative(cov: MatRef<'_, f64>, eps: f64, wanted: Option<u32>, group: usize) -> Result<Whitener, Error> {
    let d = cov.nrows();
    let lower = |i: usize, j: usize| if i >= j { cov[(i, j)] } else { cov[(j, i)] };
    let shifted = Mat::from_fn(d, d, |i, j| lower(i, j) + if i == j { eps } else { 0.0 });
    let trace: f64 = (0..d).map(|i| shifted[(i, i)]).sum();
    if !(trace > 0.0 && trace.is_finite()) {
        return Err(Error::Singular { group, smallest: 0.0, largest: trace });
    }
    let (mut y, mut z) = (Mat::from_fn(d, d, |i, j| shifted[(i, j)] / trace), Mat::<f64>::identity(d, d));
    let mut iterates = Vec::new();
    let mut before = f64::INFINITY;
    loop {
        let product = times(z.as_ref(), y.as_ref())?;
        if wanted.is_none() {
            // The sum of squares: a direction that is left stands out in it, however many channels share it.
            let off = Mat::from_fn(d, d, |i, j| if i == j { 1.0 } else { 0.0 } - product[(i, j)]);
            let now = off.norm_l2();
            let stands = now < 0.1 && now > 0.5 * before; // only rounding is left
            if now <= CONVERGED || stands {
                break;
            }
            before = now;
        }
        if iterates.len() as u32 == wanted.unwrap_or(MOST_STEPS) {
            break;
        }
        Room::new(d.saturating_mul(d).saturating_mul(4 * 8))?.free();
        let step = half_step(product.as_ref());
        let (next_y, next_z) = (times(y.as_ref(), step.as_ref())?, times(step.as_ref(), z.as_ref())?);
        crate::memory::push(&mut iterates, [std::mem::replace(&mut y, next_y), std::mem::replace(&mut z, next_z)])?;
    }
    let root = trace.sqrt();
    let matrix = Mat::from_fn(d, d, |i, j| z[(i, j)] / root);
    let residual = residual(times(matrix.as_ref(), shifted.as_ref())?.as_ref(), matrix.transpose())?;
    if residual.is_nan() || (wanted.is_none() && residual > WHITE) {
        return Err(Error::NotConverged { group });
    }
    let steps = Some(iterates.len() as u32);
    Ok(Whitener { matrix, steps, residual: Some(residual), kept: Kept::Steps(trace, iterates) })
}

/// (3I − ZY)/2
fn half_step(product: MatRef<'_, f64>) -> Mat<f64> {
    Mat::from_fn(product.nrows(), product.ncols(), |i, j| {
        if i == j { 0.5 * (3.0 - product[(i, j)]) } else { -0.5 * product[(i, j)] }
    })
}

/// ∂ℓ/∂Λ through the steps Y' = YM, Z' = MZ with M = (3I − ZY)/2, from W = Z/√tr.
fn steps_backward(
    dw: MatRef<'_, f64>,
    w: MatRef<'_, f64>,
    trace: f64,
    iterates: &[[Mat<f64>; 2]],
) -> Result<Mat<f64>, Error> {
    let d = dw.nrows();
    let root = trace.sqrt();
    let mut dz = Mat::from_fn(d, d, |i, j| dw[(i, j)] / root);
    let mut dy = Mat::<f64>::zeros(d, d);
    for [y, z] in iterates.iter().rev() {
        let step = half_step(times(z.as_ref(), y.as_ref())?.as_ref());
        let dstep = times(y.transpose(), dy.as_ref())? + times(dz.as_ref(), z.transpose())?;
        let half = faer::Scale(0.5);
        dz = times(step.transpose(), dz.as_ref())? - times(dstep.as_ref(), y.transpose())? * half;
        dy = times(dy.as_ref(), step.transpose())? - times(z.transpose(), dstep.as_ref())? * half;
    }
    // W = Z/√t and Y = A = (Λ+εI)/t at the start: both depend on the trace t.
    let products = |a: MatRef<'_, f64>, b: MatRef<'_, f64>| -> f64 {
        (0..d).map(|j| (0..d).map(|i| a[(i, j)] * b[(i, j)]).sum::<f64>()).sum()
    };
    let by_start = iterates.first().map_or(0.0, |[y, _]| products(dy.as_ref(), y.as_ref()));
    let dtrace = -0.5 * products(dw, w) / trace - by_start / trace;
    Ok(Mat::from_fn(d, d, |i, j| dy[(i, j)] / trace + if i == j { dtrace } else { 0.0 }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]
    use super::*;

    const METHODS: [Method; 5] = [
        Method::Zca,
        Method::Pca,
        Method::Cholesky,
        Method::Iterative { steps: Some(3) },
        Method::Iterative { steps: None },
    ];

    /// Numbers that look random, between −0.5 and 0.5.
    fn numbers(d: usize, seed: u64) -> Mat<f64> {
        let mut state = seed;
        Mat::from_fn(d, d, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        })
    }

    fn covariance(d: usize) -> Mat<f64> {
        let a = numbers(d, 1);
        let mut product = times(a.as_ref(), a.transpose()).unwrap();
        (0..d).for_each(|i| product[(i, i)] += 0.1 * (i + 1) as f64);
        product
    }

    fn off_identity(w: &Mat<f64>, cov: &Mat<f64>) -> f64 {
        residual(times(w.as_ref(), cov.as_ref()).unwrap().as_ref(), w.transpose()).unwrap()
    }

    #[test]
    fn a_product_in_blocks_is_the_product() {
        let d = BLOCK + 3;
        let (a, b) = (numbers(d, 3), numbers(d, 4));
        let product = times(a.as_ref(), b.as_ref()).unwrap();
        for (i, j) in [(0, 0), (d - 1, d - 1), (3, BLOCK), (BLOCK, BLOCK - 1)] {
            let wanted: f64 = (0..d).map(|k| a[(i, k)] * b[(k, j)]).sum();
            assert!((product[(i, j)] - wanted).abs() < 1e-12);
        }
    }

    #[test]
    fn each_method_whitens() {
        for d in [1, 2, 5, 33] {
            let cov = covariance(d);
            for method in METHODS {
                let whitener = Whitener::new(cov.as_ref(), 0.0, method, 0).unwrap();
                let off = off_identity(&whitener.matrix, &cov);
                match method {
                    Method::Iterative { steps: Some(_) } => {
                        // The residual is of this very product; the steps are too few for more.
                        assert!((off - whitener.residual.unwrap()).abs() < 1e-12, "{d} {off}");
                    }
                    _ => assert!(off < 1e-11, "{d} {method:?} {off}"),
                }
            }
        }
    }

    #[test]
    fn the_derivative_is_that_of_the_matrix() {
        let (d, h) = (6, 1e-6);
        let (cov, dw) = (covariance(d), numbers(d, 2));
        for method in METHODS {
            let loss = |cov: &Mat<f64>| {
                let w = Whitener::new(cov.as_ref(), 0.01, method, 0).unwrap().matrix;
                (0..d).map(|j| (0..d).map(|i| dw[(i, j)] * w[(i, j)]).sum::<f64>()).sum::<f64>()
            };
            let dcov = Whitener::new(cov.as_ref(), 0.01, method, 0).unwrap().backward(dw.as_ref(), 0).unwrap();
            for (i, j) in [(0, 0), (3, 1), (5, 4), (2, 2)] {
                let moved = |by: f64| {
                    let mut moved = cov.clone();
                    moved[(i, j)] += by;
                    moved[(j, i)] = moved[(i, j)];
                    loss(&moved)
                };
                let difference = (moved(h) - moved(-h)) / (2.0 * h);
                // Both elements of a symmetric matrix move.
                let ours = dcov[(i, j)] * if i == j { 1.0 } else { 2.0 };
                assert!(
                    (difference - ours).abs() < 1e-6 * (1.0 + ours.abs()),
                    "{method:?} {i} {j}: {difference} {ours}"
                );
            }
        }
    }

    #[test]
    fn what_has_no_inverse_is_an_error() {
        let singular = |cov: &Mat<f64>, eps| {
            METHODS[..3].iter().all(|&method| {
                matches!(Whitener::new(cov.as_ref(), eps, method, 7), Err(Error::Singular { group: 7, .. }))
            })
        };
        let constant = Mat::zeros(3, 3);
        let dependent = Mat::from_fn(3, 3, |_, _| 2.0);
        assert!(singular(&constant, 0.0) && singular(&dependent, 0.0) && singular(&dependent, 1e-18));
        assert!(!singular(&constant, 1e-5) && !singular(&dependent, 1e-5));
        let all = Method::Iterative { steps: None };
        assert!(Whitener::new(dependent.as_ref(), 0.0, all, 0).is_err());
        assert!(Whitener::new(constant.as_ref(), 0.0, all, 0).is_err());
    }

    #[test]
    fn equal_variances_have_no_principal_derivative() {
        let cov = Mat::from_fn(3, 3, |i, j| if i == j { [4.0, 1.0, 1.0][i] } else { 0.0 });
        let whitener = Whitener::new(cov.as_ref(), 0.0, Method::Pca, 2).unwrap();
        let error = whitener.backward(cov.as_ref(), 2).err();
        assert_eq!(error, Some(Error::EigenvalueGap { group: 2, pair: (1, 2), values: (1.0, 1.0) }));
        assert!(Whitener::new(cov.as_ref(), 0.0, Method::Zca, 2).unwrap().backward(cov.as_ref(), 2).is_ok());
    }
}
