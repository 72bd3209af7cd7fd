//! Instruction-set levels: the lanes that each computes with, and the choice between them.
//!
//! A kernel is written once, over [`Lanes`], and compiled once for each level. All levels give the same bits (contract 3):
//! none fuses a multiply with an add, and lanes are combined in an order that does not depend on the register width.

#![allow(unsafe_code, reason = "instruction sets")]

mod lanes;
mod level;
mod vectors;

pub(crate) use lanes::Lanes;
pub(crate) use level::dispatch;
pub use level::{Level, set_simd_level, simd_level, simd_levels};
pub(crate) use vectors::{Vectors, WIDTH};

/// Work over tensor memory that is compiled once for each level.
pub(crate) trait Kernel {
    type Output;
    /// Does the work with the lanes of a level.
    ///
    /// It and everything it calls must be `#[inline(always)]`: only then is the code compiled for the level.
    fn run<L: Lanes>(self) -> Self::Output;
}
