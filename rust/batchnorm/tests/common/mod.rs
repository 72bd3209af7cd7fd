//! What the tests of the contract share: seeded tensors, and the bits of everything that a layer computes.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use batchnorm::{
    Activation, Coefficients, Element, Epilogue, Layout, View, ViewMut, backward, gate, gradient_apply, gradient_sums,
    infer, infer_backward, infer_in_place, moments, normalize, train_forward, train_forward_in_place,
};

pub(crate) const EPS: f64 = 1e-5;

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

/// Everything that a layer computes, as bits: alone, and with a residual and an activation.
pub(crate) fn everything<T: Element>(layout: Layout, mean: f64) -> Vec<Vec<u64>> {
    let residual = tensor::<T>(layout, 3, 0.0);
    let residual = Some(View::new(&residual, layout).unwrap());
    let follows = [Epilogue::default(), Epilogue { activation: Some(Activation::Relu), residual }];
    follows.into_iter().flat_map(|epilogue| all_with(layout, mean, epilogue)).collect()
}

fn all_with<T: Element>(layout: Layout, mean: f64, epilogue: Epilogue<View<'_, T>>) -> Vec<Vec<u64>> {
    let (x, dy) = (tensor::<T>(layout, 1, mean), tensor::<T>(layout, 2, 0.0));
    let (x, dy) = (View::new(&x, layout).unwrap(), View::new(&dy, layout).unwrap());
    let (gamma, beta) = parameters(layout.channels());
    let (gamma, beta) = (Some(&gamma[..]), Some(&beta[..]));
    let zero = vec![T::from_f64(0.0); layout.len()];

    let mut y = zero.clone();
    let (m, coefficients) =
        train_forward(x, gamma, beta, EPS, epilogue, &mut ViewMut::new(&mut y, layout).unwrap()).unwrap();
    let mut halves = zero.clone();
    assert_eq!(moments(x).unwrap(), m, "train_forward and moments differ: {layout:?}");
    let from_halves =
        normalize(x, &m, gamma, beta, EPS, epilogue, &mut ViewMut::new(&mut halves, layout).unwrap()).unwrap();
    assert_eq!(from_halves, coefficients);
    assert_eq!(bits(&halves), bits(&y), "train_forward and normalize differ: {layout:?}");

    let mut dx = zero.clone();
    let sums = backward(Some(dy), x, &coefficients, epilogue, &mut ViewMut::new(&mut dx, layout).unwrap()).unwrap();
    assert_eq!(gradient_sums(dy, x, &coefficients, epilogue).unwrap(), sums);
    gradient_apply(Some(dy), x, &coefficients, epilogue, &sums, &mut ViewMut::new(&mut halves, layout).unwrap())
        .unwrap();
    assert_eq!(bits(&halves), bits(&dx), "backward and gradient_apply differ: {layout:?}");

    let frozen = Coefficients::new(m.mean(), &m.var_unbiased().unwrap(), gamma, beta, EPS).unwrap();
    let mut z = zero.clone();
    infer(x, &frozen, epilogue, &mut ViewMut::new(&mut z, layout).unwrap()).unwrap();
    let mut in_place = tensor::<T>(layout, 1, mean);
    infer_in_place(&frozen, epilogue, &mut ViewMut::new(&mut in_place, layout).unwrap()).unwrap();
    assert_eq!(bits(&in_place), bits(&z), "in place and not differ: {layout:?}");
    let mut over = tensor::<T>(layout, 1, mean);
    let again =
        train_forward_in_place(gamma, beta, EPS, epilogue, &mut ViewMut::new(&mut over, layout).unwrap()).unwrap();
    assert_eq!(again, (m.clone(), coefficients.clone()));
    assert_eq!(bits(&over), bits(&y), "train_forward in place and not differ: {layout:?}");
    let mut over = tensor::<T>(layout, 2, 0.0);
    assert_eq!(
        backward(None, x, &coefficients, epilogue, &mut ViewMut::new(&mut over, layout).unwrap()).unwrap(),
        sums
    );
    assert_eq!(bits(&over), bits(&dx), "dx over dy and not differ: {layout:?}");
    let mut gated = zero.clone();
    gate(Some(dy), x, &coefficients, epilogue, &mut ViewMut::new(&mut gated, layout).unwrap()).unwrap();
    let through = View::new(&gated, layout).unwrap();
    let nothing = Epilogue::default();
    assert_eq!(
        backward(Some(through), x, &coefficients, nothing, &mut ViewMut::new(&mut over, layout).unwrap()),
        Ok(sums.clone())
    );
    assert_eq!(bits(&over), bits(&dx), "gradients through the activation in one step and two differ: {layout:?}");
    let mut frozen_dx = zero;
    let frozen_sums =
        infer_backward(Some(dy), x, &frozen, epilogue, &mut ViewMut::new(&mut frozen_dx, layout).unwrap()).unwrap();

    let sums = [sums.dgamma(), sums.dbeta(), frozen_sums.dgamma(), m.mean(), m.m2()].map(bits);
    [bits(&y), bits(&dx), bits(&z), bits(&frozen_dx), bits(&gated)].into_iter().chain(sums).collect()
}
