//! Sums of products of channels over all positions: the scatter matrix of a batch, and what a backward pass needs.

use crate::element::Element;
use crate::error::Error;
use crate::memory::zeros;
use crate::parallel;
use crate::partition::span_of;
use crate::patch::{Patch, Patches, STRIP, Spare};
use crate::tree::{Merge, Tree};
use crate::view::View;
use faer::linalg::matmul::matmul;
use faer::prelude::ReborrowMut;
use faer::{Accum, MatMut, Par};
use std::ops::Range;

/// The number of tasks that the sums are divided into if the layout allows it.
const TASKS: usize = 16;
/// The least number of patches that a task sums, since each has a matrix of its own.
const LEAST_SPAN: usize = 4;
/// Rows of the result that are computed together.
const ROWS: usize = 64;

/// A tensor less a number for each channel.
#[derive(Clone, Copy)]
pub(crate) struct Centred<'a, T: Copy> {
    pub(crate) x: View<'a, T>,
    pub(crate) mean: &'a [f64],
}

/// Σ left_o·right_i over all positions, for each pair of channels of a group, and Σ left_o.
pub(crate) struct Products {
    /// (groups, D, D), row-major; o is the row.
    pub(crate) products: Vec<f64>,
    /// Of each channel.
    pub(crate) sums: Vec<f64>,
}

/// The part of the result that a task computes.
struct Part {
    strip: Range<usize>,
    left: Range<usize>,
    right: Range<usize>,
}

/// Partial sums over some patches.
struct Sums {
    products: Vec<f64>,
    sums: Vec<f64>,
}

impl Merge for Sums {
    fn merge(&mut self, other: &Self) {
        let add = |to: &mut [f64], from: &[f64]| to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        add(&mut self.products, &other.products);
        add(&mut self.sums, &other.sums);
    }
}

/// The products of left and right; without right, of left with itself, a symmetric matrix. Both tensors have one layout.
///
/// # Errors
/// [`Error::NoMemory`].
pub(crate) fn products<T: Element>(
    patches: &Patches,
    left: Centred<'_, T>,
    right: Option<Centred<'_, T>>,
) -> Result<Products, Error> {
    let d = patches.group;
    let mut result = Products { products: zeros(patches.channels() * d)?, sums: zeros(patches.channels())? };
    let parts = parts(patches, right.is_none())?;
    let span = span_of(patches.len(), (TASKS / parts.len()).min(patches.len() / LEAST_SPAN));
    let spans = patches.len().div_ceil(span);
    let (spare, most) = (Spare::new(), parts.iter().map(|part| part.left.len()).max());
    let partial = parallel::map(parts.len() * spans, patches.work(), |task| {
        let (part, s) = (&parts[task / spans], task % spans);
        let span = s * span..patches.len().min((s + 1) * span);
        let room = || Ok([patches.room(most)?, patches.room(most)?]);
        spare.with(room, |room| sums(patches, part, span, (left, right), room))
    })?;
    let mut partial = partial.into_iter();
    for part in &parts {
        let sums = Tree::of(partial.by_ref().take(spans).map(Ok))?;
        result.put(part, &sums, d, right.is_none());
    }
    Ok(result)
}

/// Squares of [`STRIP`] channels where groups are larger than that, else strips of whole groups.
fn parts(patches: &Patches, symmetric: bool) -> Result<Vec<Part>, Error> {
    let mut parts = crate::memory::with_capacity(patches.strips())?;
    for strip in (0..patches.strips()).map(|s| patches.strip(s)) {
        let step = if patches.group > STRIP { STRIP } else { strip.len() };
        let piece = |start: usize| start..strip.end.min(start + step);
        for left in strip.clone().step_by(step).map(piece) {
            for right in strip.clone().step_by(step).map(piece).filter(|right| !symmetric || right.start <= left.start)
            {
                crate::memory::push(&mut parts, Part { strip: strip.clone(), left: left.clone(), right })?;
            }
        }
    }
    Ok(parts)
}

fn sums<T: Element>(
    patches: &Patches,
    part: &Part,
    span: Range<usize>,
    (left, right): (Centred<'_, T>, Option<Centred<'_, T>>),
    [a, b]: &mut [Patch; 2],
) -> Result<Sums, Error> {
    let (rows, cols) = (part.left.len().min(patches.group), part.right.len().min(patches.group));
    let groups = part.left.len() / rows;
    let mut sums = Sums { products: zeros(groups * rows * cols)?, sums: zeros(part.left.len())? };
    let gather = |patch: &mut Patch, from: Centred<'_, T>, channels: &Range<usize>, p: usize| {
        patch.gather(from.x.tile(patches.width(), &patches.rect(channels, p)), &from.mean[channels.clone()]);
    };
    // Of a symmetric matrix only the lower triangle is needed: of blocks of rows, the columns to their end.
    let on_the_diagonal = right.is_none() && part.left == part.right;
    for p in span {
        gather(a, left, &part.left, p);
        if !on_the_diagonal {
            gather(b, right.unwrap_or(left), &part.right, p);
        }
        let b: &Patch = if on_the_diagonal { a } else { b };
        for (g, to) in sums.products.chunks_exact_mut(rows * cols).enumerate() {
            let mut to = MatMut::from_row_major_slice_mut(to, rows, cols);
            let (a, b) = (a.matrix(g * rows..(g + 1) * rows), b.matrix(g * cols..(g + 1) * cols).transpose());
            let step = if on_the_diagonal { ROWS } else { rows };
            for row in (0..rows).step_by(step) {
                let n = step.min(rows - row);
                let cols = if on_the_diagonal { row + n } else { cols };
                let to = to.rb_mut().submatrix_mut(row, 0, n, cols);
                matmul(to, Accum::Add, a.subrows(row, n), b.subcols(0, cols), 1.0, Par::Seq);
            }
        }
        if part.right.start == part.strip.start {
            add_rows(a, &mut sums.sums);
        }
    }
    Ok(sums)
}

/// Adds the sum of each channel.
fn add_rows(patch: &Patch, sums: &mut [f64]) {
    if patch.by_position() {
        for row in patch.values().chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
        }
    } else {
        for (sum, row) in sums.iter_mut().zip(patch.values().chunks_exact(patch.positions())) {
            *sum += row.iter().sum::<f64>();
        }
    }
}

impl Products {
    fn put(&mut self, part: &Part, sums: &Sums, d: usize, symmetric: bool) {
        let (rows, cols) = (part.left.len().min(d), part.right.len().min(d));
        for (k, &value) in sums.products.iter().enumerate() {
            let (g, o, i) = (k / (rows * cols), k / cols % rows, k % cols);
            let (o, i) = (part.left.start + g * rows + o, part.right.start + g * cols + i);
            if !symmetric || i <= o {
                self.products[o * d + i % d] = value;
                if symmetric {
                    self.products[i * d + o % d] = value;
                }
            }
        }
        if part.right.start == part.strip.start {
            self.sums[part.left.clone()].copy_from_slice(&sums.sums);
        }
    }
}
