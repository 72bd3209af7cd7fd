//! Shared code of the contract tests: seeded tensors, and the bits of everything that a layer computes.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use batchnorm::{
    Activation, Coefficients, Dy, Element, Epilogue, ForwardPass, Input, Layout, Parameters, View, ViewMut, backward,
    gradient_apply, gradient_sums, infer, infer_backward, moments, normalize, train_forward,
};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) const EPS: f64 = 1e-5;

/// A lock for tests that set the number of threads or the level, which are settings of the whole process.
pub(crate) fn own_settings() -> MutexGuard<'static, ()> {
    static SETTINGS: Mutex<()> = Mutex::new(());
    SETTINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reproducible noise in [-1, 1) (a linear congruential generator; Knuth's constants).
fn noise(seed: u64) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1), |s| {
        Some(s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407))
    })
    .map(|s| (s >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
}

pub(crate) fn tensor<T: Element>(layout: Layout, seed: u64, mean: f64) -> Vec<T> {
    let mut values: Vec<T> = noise(seed).skip(8).take(layout.len()).map(|v| T::from_f64(v + mean)).collect();
    values.shrink_to_fit(); // so that the allocation ends where the tensor does, for memory checkers
    values
}

pub(crate) fn parameters(channels: usize) -> (Vec<f64>, Vec<f64>) {
    let mut values = noise(99).skip(8);
    let gamma = values.by_ref().take(channels).map(|v| f64::from(v as f32)).collect();
    (gamma, values.take(channels).map(|v| f64::from(v as f32)).collect())
}

fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    values.iter().map(|v| v.to_f64().to_bits()).collect()
}

/// A backward pass that writes dx, and dresidual if that is asked for.
type Backward<'c, T> = &'c mut dyn FnMut(Option<&mut ViewMut<'_, T>>, &mut ViewMut<'_, T>);

/// Everything that a layer computes, as bits: alone, and with a residual and an activation.
pub(crate) fn everything<T: Element>(layout: Layout, mean: f64) -> Vec<Vec<u64>> {
    let alone = all_with::<T>(layout, mean, Epilogue::default());
    // Residuals such that many values reach 0, and for ReLU6 also 6.
    let follows = [(Activation::Relu, 0.0), (Activation::Relu6, 5.0)].into_iter().flat_map(|(activation, about)| {
        let residual = tensor::<T>(layout, 3, about);
        let residual = Some(View::new(&residual, layout).unwrap());
        all_with(layout, mean, Epilogue { activation: Some(activation), residual })
    });
    alone.into_iter().chain(follows).collect()
}

fn all_with<T: Element>(layout: Layout, mean: f64, epilogue: Epilogue<View<'_, T>>) -> Vec<Vec<u64>> {
    let (x_values, dy_values) = (tensor::<T>(layout, 1, mean), tensor::<T>(layout, 2, 0.0));
    let (x, dy) = (View::new(&x_values, layout).unwrap(), View::new(&dy_values, layout).unwrap());
    let (gamma, beta) = parameters(layout.channels());
    let parameters = Parameters { gamma: Some(&gamma), beta: Some(&beta), eps: EPS };
    // Calls with an output that holds the given values, and gives what it returned and the bits written.
    let with = |values: &[T], call: &mut dyn FnMut(&mut ViewMut<'_, T>)| {
        let mut output = values.to_vec();
        call(&mut ViewMut::new(&mut output, layout).unwrap());
        bits(&output)
    };
    let zeros = vec![T::from_f64(0.0); layout.len()];

    let m = moments(x).unwrap();
    let coefficients = Coefficients::of_moments(&m, parameters).unwrap();
    let trained = Ok((m.clone(), coefficients.clone()));
    let y = with(&zeros, &mut |y| assert_eq!(train_forward(Input::View(x), parameters, epilogue, y), trained));
    let over = with(&x_values, &mut |y| assert_eq!(train_forward(Input::InPlace, parameters, epilogue, y), trained));
    assert!(over == y, "train_forward in place and not differ: {layout:?}");
    for (x, held) in [(Input::View(x), &zeros), (Input::InPlace, &x_values)] {
        let normalized = with(held, &mut |y| {
            assert_eq!(normalize(x, &m, parameters, epilogue, y).as_ref(), Ok(&coefficients));
        });
        assert!(normalized == y, "train_forward and normalize differ: {layout:?}");
    }

    let pass = ForwardPass { x, coefficients: &coefficients, epilogue };
    let sums = gradient_sums(dy, pass).unwrap();
    let dx = with(&zeros, &mut |dx| assert_eq!(backward(Dy::View(dy), pass, None, dx).as_ref(), Ok(&sums)));
    let frozen = Coefficients::new(m.mean(), &m.var_unbiased().unwrap(), parameters).unwrap();
    let inferred = with(&zeros, &mut |y| infer(Input::View(x), &frozen, epilogue, y).unwrap());
    let over = with(&x_values, &mut |y| infer(Input::InPlace, &frozen, epilogue, y).unwrap());
    assert!(over == inferred, "infer in place and not differ: {layout:?}");
    let frozen_pass = ForwardPass { coefficients: &frozen, ..pass };
    let mut frozen_sums = None;
    let frozen_dx = with(&zeros, &mut |dx| {
        frozen_sums = Some(infer_backward(Dy::View(dy), frozen_pass, None, dx).unwrap());
    });
    let frozen_sums = frozen_sums.unwrap();

    // The gradient that passes is dy where y > 0, and for ReLU6 y < 6.
    let through = |y: &[u64]| {
        let Some(activation) = epilogue.activation else { return bits(&dy_values) };
        let ceiling = if activation == Activation::Relu6 { 6.0 } else { f64::INFINITY };
        let passes = |y: f64| y > 0.0 && y < ceiling;
        let each = dy_values.iter().zip(y);
        each.map(|(dy, &y)| if passes(f64::from_bits(y)) { dy.to_f64().to_bits() } else { 0 }).collect()
    };
    // Every place of dy, with dresidual and without it.
    for (dy, in_dx, in_dresidual) in
        [(Dy::View(dy), &zeros, &zeros), (Dy::InDx, &dy_values, &zeros), (Dy::InDresidual, &zeros, &dy_values)]
    {
        let check = |wanted: (&[u64], &[u64]), call: Backward<'_, T>| {
            let mut found = Vec::new();
            let dresidual =
                with(in_dresidual, &mut |dresidual| found = with(in_dx, &mut |dx| call(Some(dresidual), dx)));
            assert!((&found[..], &dresidual[..]) == wanted, "gradients with dresidual: {layout:?}");
            if !matches!(dy, Dy::InDresidual) {
                assert!(with(in_dx, &mut |dx| call(None, dx)) == wanted.0, "gradients without dresidual: {layout:?}");
            }
        };
        let passed: Vec<u64> = through(&y);
        check((&dx, &passed), &mut |r, dx| assert_eq!(backward(dy, pass, r, dx).as_ref(), Ok(&sums)));
        check((&dx, &passed), &mut |r, dx| gradient_apply(dy, pass, &sums, r, dx).unwrap());
        let passed: Vec<u64> = through(&inferred);
        check((&frozen_dx, &passed), &mut |r, dx| {
            assert_eq!(infer_backward(dy, frozen_pass, r, dx).as_ref(), Ok(&frozen_sums));
        });
    }

    let sums = [sums.dgamma(), sums.dbeta(), frozen_sums.dgamma(), m.mean(), m.m2()].map(bits);
    [y, dx, inferred, frozen_dx].into_iter().chain(sums).collect()
}
