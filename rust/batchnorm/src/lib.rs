//! Batch normalization after Ioffe and Szegedy 2015 (arXiv 1502.03167), on CPUs: training with its full backward pass,
//! and inference with frozen population statistics.
//!
//! # The mathematics
//!
//! | symbol | name here | meaning |
//! |---|---|---|
//! | x, y | `x`, `y` | input and output, (outer, channels, inner) |
//! | m | `count` | values in a channel: outer·inner |
//! | μ, σ² | `mean`, `var` | mean and biased variance of a channel of the batch |
//! | E\[x\], Var\[x\] | `mean`, `var` | population statistics; the variance unbiased |
//! | γ, β | `gamma`, `beta` | learned scale and shift |
//! | ε | `eps` | added to the variance |
//!
//! Forward (Algorithm 1): x̂ = (x − μ)/√(σ²+ε), y = γx̂ + β. With γ = √(Var\[x\]+ε) and β = E\[x\] a layer is the identity.
//!
//! Backward (section 3; derived in `backward.rs`): dβ = Σdy, dγ = Σdy·x̂, and dx = γ/√(σ²+ε)·(dy − dβ/m − x̂·dγ/m). The
//! last two terms are there because every example moves the statistics that all the others are normalized by.
//!
//! Inference (Algorithm 2): y = (x − E\[x\])·s + β with s = γ/√(Var\[x\]+ε). It is computed in float64 for 32- and 64-bit
//! tensors, and in float32 with a two-part mean for 16-bit ones. Each operation is rounded; none are fused.
//!
//! An [`Epilogue`] may follow in the same pass: y = activation(v + residual), rounded once, where v is the y above.
//!
//! # Promises
//!
//! The bits of y, moments and gradients do not depend on the number of threads, the instruction-set level, the alignment
//! of memory, or whether the result overwrites its input. In inference they do not depend on the rest of the batch either.
//!
//! ```
//! use batchnorm::{Activation, Coefficients, Epilogue, Input, Layout, Parameters, View, ViewMut, infer, train_forward};
//!
//! let layout = Layout::of_shape(&[4, 2], 1)?;
//! let x: Vec<f32> = vec![1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 40.0];
//! let mut y = vec![0.0; 8];
//! let (x, mut y) = (View::new(&x, layout)?, ViewMut::new(&mut y, layout)?);
//! let parameters = Parameters { gamma: None, beta: None, eps: 1e-5 };
//! let (moments, _) = train_forward(Input::View(x), parameters, Epilogue::default(), &mut y)?;
//! assert_eq!(moments.mean(), [2.5, 25.0]);
//!
//! let frozen = Coefficients::new(moments.mean(), &moments.var_unbiased()?, parameters)?;
//! infer(Input::View(x), &frozen, Epilogue { activation: Some(Activation::Relu), residual: Some(x) }, &mut y)?;
//! # Ok::<(), batchnorm::Error>(())
//! ```

mod backward;
mod bounds;
mod bytes;
mod cache;
mod coefficients;
mod comoments;
mod copy;
mod element;
mod epilogue;
mod error;
mod float_mode;
mod forward_pass;
mod gradient_sums;
mod infer;
mod input;
mod kernels;
mod layout;
mod memory;
mod moments;
mod numbers;
mod pairs;
mod parallel;
mod parameters;
mod partition;
mod patch;
mod per_channel;
mod products;
mod shrinkage;
mod simd;
mod train;
mod tree;
mod verb;
mod view;
mod whiten;
mod whitener;
mod whitening_map;

pub use backward::{Dy, backward, gradient_apply, infer_backward};
pub use coefficients::Coefficients;
pub use comoments::{CoMoments, comoments};
pub use copy::copy;
pub use element::{Element, Wide};
pub use epilogue::{Activation, Epilogue};
pub use error::Error;
pub use forward_pass::ForwardPass;
pub use gradient_sums::{GradientSums, gradient_sums};
pub use half::{bf16, f16};
pub use infer::infer;
pub use input::Input;
pub use layout::Layout;
pub use moments::{Moments, moments};
pub use numbers::Numbers;
pub use parallel::{
    Owned, PerProcess, Team, ThreadSource, get_num_threads, get_thread_source, hosted, set_num_threads,
    set_thread_source,
};
pub use parameters::Parameters;
pub use simd::{Level, set_simd_level, simd_level, simd_levels};
pub use train::{normalize, train_forward};
pub use view::{View, ViewMut};
pub use whiten::{Whitening, WhiteningPass, whiten_backward, whiten_forward, whitening_matrix};
pub use whitener::{Method, WHITE};
pub use whitening_map::WhiteningMap;
