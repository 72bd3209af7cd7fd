//! The numerical contract from outside, without Python.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failing unwrap is a failing test")]

mod common;
mod modules;
mod widths;

use batchnorm::{
    Activation, Coefficients, Dy, Element, Epilogue, Error, ForwardPass, GradientSums, Input, Layout, Moments,
    Parameters, View, ViewMut, backward, bf16, f16, get_num_threads, gradient_sums, infer, infer_backward, moments,
    set_num_threads, set_simd_level, simd_level, simd_levels, train_forward,
};
use common::{EPS, everything, own_settings, parameters, tensor};

/// Layouts (outer, channels, inner) just below and above lane, cache-line, block and family widths.
const LAYOUTS: [(usize, usize, usize); 16] = [
    (2, 1, 1),
    (3, 5, 1),
    (257, 17, 1),
    (1500, 70, 1),
    (9, 3, 2),
    (300, 5, 31),
    (7, 3, 32),
    (5, 20, 33),
    (90, 18, 49),
    (4, 16, 784),
    (3, 2, 4096),
    (2, 3, 4097),
    (2, 17, 9000),
    (70_000, 3, 1),
    (1, 1, 64 * 4096 + 5),
    (40, 2, 5000),
];

/// The values of one channel.
fn channel<T: Element>(x: &[T], layout: Layout, c: usize) -> Vec<f64> {
    let (outer, channels, inner) = (layout.outer(), layout.channels(), layout.inner());
    let at = |o: usize| &x[(o * channels + c) * inner..(o * channels + c + 1) * inner];
    (0..outer).flat_map(|o| at(o).iter().map(|v| v.to_f64())).collect()
}

/// Sum by Neumaier's compensation: twice the precision of float64.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let (mut total, mut lost) = (0.0f64, 0.0);
    for v in values {
        let t = total + v;
        lost += if total.abs() >= v.abs() { (total - t) + v } else { (v - t) + total };
        total = t;
    }
    total + lost
}

fn same_bits<T: Element>() {
    for (outer, channels, inner) in LAYOUTS {
        let layout = Layout::new(outer, channels, inner).unwrap();
        set_num_threads(1).unwrap();
        set_simd_level(Some("baseline")).unwrap();
        let wanted = everything::<T>(layout, 3.0);
        let mut ran = Vec::new();
        for threads in [1, 2, 3, 8] {
            set_num_threads(threads).unwrap();
            for level in simd_levels() {
                set_simd_level(Some(level.name())).unwrap();
                assert!(everything::<T>(layout, 3.0) == wanted, "{layout:?} on {threads} threads at {level:?}");
                ran.push((get_num_threads().unwrap(), simd_level().unwrap()));
            }
        }
        ran.sort_by_key(|&(threads, level)| (threads, level.name()));
        ran.dedup();
        assert_eq!(ran.len(), 4 * simd_levels().len());
    }
}

/// One test for all types, since the number of threads and the level belong to the process.
#[test]
fn bits_do_not_depend_on_threads_or_levels() {
    let _settings = own_settings();
    same_bits::<f32>();
    same_bits::<f64>();
    same_bits::<f16>();
    same_bits::<bf16>();
    set_simd_level(None).unwrap();
}

#[test]
fn relu_at_zero_and_the_least_number() {
    let _settings = own_settings();
    relu_at_the_least_number::<f32>(2f64.powi(-149));
    relu_at_the_least_number::<f16>(2f64.powi(-24));
    relu_at_the_least_number::<bf16>(2f64.powi(-133));
    set_simd_level(None).unwrap();
}

/// Half the least positive number rounds to 0, and so no gradient passes there; a little more does. A β of -0 leaves
/// -0 as it is, and ReLU makes it 0. Ten values are computed one by one, forty as vectors.
fn relu_at_the_least_number<T: Element>(least: f64) {
    for (outer, inner) in [(1, 40), (40, 1), (1, 10), (10, 1)] {
        let (layout, len) = (Layout::new(outer, 1, inner).unwrap(), outer * inner);
        let parameters = Parameters { gamma: Some(&[0.5]), beta: Some(&[-0.0]), eps: 0.0 };
        let coefficients = Coefficients::new(&[0.0], &[1.0], parameters).unwrap();
        let epilogue = Epilogue { activation: Some(Activation::Relu), residual: None };
        let values = [-1.0, -least, -0.0, 0.0, least, 2.0 * least, 3.0 * least, 1.0, f64::INFINITY, f64::NAN];
        let x: Vec<T> = (0..len).map(|i| T::from_f64(values[i % 10])).collect();
        let dy = vec![T::from_f64(3.0); len];
        let (mut y, mut dx, mut dresidual) = (dy.clone(), dy.clone(), dy.clone());
        let (x, dy) = (View::new(&x, layout).unwrap(), View::new(&dy, layout).unwrap());
        for level in simd_levels() {
            set_simd_level(Some(level.name())).unwrap();
            infer(Input::View(x), &coefficients, epilogue, &mut ViewMut::new(&mut y, layout).unwrap()).unwrap();
            let pass = ForwardPass { x, coefficients: &coefficients, epilogue };
            let mut dx = ViewMut::new(&mut dx, layout).unwrap();
            let mut to = ViewMut::new(&mut dresidual, layout).unwrap();
            infer_backward(Dy::View(dy), pass, Some(&mut to), &mut dx).unwrap();
            for (i, (y, passed)) in y.iter().zip(&dresidual).enumerate() {
                let y = y.to_f64();
                assert_eq!(passed.to_f64(), if y > 0.0 { 3.0 } else { 0.0 }, "{level:?} {i}");
                assert!(!y.is_sign_negative() || y.is_nan(), "{level:?} {i}");
                assert_eq!(y > 0.0, (5..9).contains(&(i % 10)), "{level:?} {i}");
                assert_eq!(y.is_nan(), i % 10 == 9);
            }
        }
    }
}

#[test]
fn relu6_at_six_and_the_number_before_it() {
    let _settings = own_settings();
    relu6_at_six::<f64>(2f64.powi(-50));
    relu6_at_six::<f32>(2f64.powi(-21));
    relu6_at_six::<f16>(2f64.powi(-8));
    relu6_at_six::<bf16>(2f64.powi(-5));
    set_simd_level(None).unwrap();
}

/// β is a quarter of the distance between numbers below 6, and x goes up to 6 in such distances. So v lies at a quarter, at
/// the middle (which rounds to 6) and at three quarters of the last distance, and just above 6. Ten values are computed one
/// by one, forty as vectors.
fn relu6_at_six<T: Element>(step: f64) {
    for (outer, inner) in [(1, 40), (40, 1), (1, 10), (10, 1)] {
        let (layout, len) = (Layout::new(outer, 1, inner).unwrap(), outer * inner);
        let values =
            [f64::NEG_INFINITY, -1.0, -0.0, 1.0, 6.0 - 2.0 * step, 6.0 - step, 6.0, 6.0 + 2.0 * step, 1e4, f64::NAN];
        let x: Vec<T> = (0..len).map(|i| T::from_f64(values[i % 10])).collect();
        let dy = vec![T::from_f64(3.0); len];
        let (mut y, mut dx, mut dresidual) = (dy.clone(), dy.clone(), dy.clone());
        let (x, dy) = (View::new(&x, layout).unwrap(), View::new(&dy, layout).unwrap());
        let epilogue = Epilogue { activation: Some(Activation::Relu6), residual: None };
        for quarters in [0.0, 1.0, 2.0, 3.0] {
            // In float64 there is nothing between neighbours.
            let beta = if size_of::<T>() == 8 { 0.0 } else { quarters / 4.0 * step };
            let parameters = Parameters { gamma: None, beta: Some(&[beta]), eps: 0.0 };
            let coefficients = Coefficients::new(&[0.0], &[1.0], parameters).unwrap();
            for level in simd_levels() {
                set_simd_level(Some(level.name())).unwrap();
                infer(Input::View(x), &coefficients, epilogue, &mut ViewMut::new(&mut y, layout).unwrap()).unwrap();
                let pass = ForwardPass { x, coefficients: &coefficients, epilogue };
                let mut dx = ViewMut::new(&mut dx, layout).unwrap();
                let mut to = ViewMut::new(&mut dresidual, layout).unwrap();
                infer_backward(Dy::View(dy), pass, Some(&mut to), &mut dx).unwrap();
                for (i, (y, passed)) in y.iter().zip(&dresidual).enumerate() {
                    let (y, v) = (y.to_f64(), values[i % 10] + beta);
                    let wanted = if v.is_nan() { v } else { T::from_f64(v.clamp(0.0, 6.0)).to_f64() };
                    assert!(y == wanted || (y.is_nan() && v.is_nan()), "{level:?} {quarters} {i}: {y} {wanted}");
                    assert!(!y.is_sign_negative() || y.is_nan(), "{level:?} {i}");
                    assert_eq!(passed.to_f64(), if y > 0.0 && y < 6.0 { 3.0 } else { 0.0 }, "{level:?} {quarters} {i}");
                    // The last number below 6 is y itself, or rounds to 6 from the middle on.
                    let below_six = beta < step / 2.0;
                    assert!(i % 10 != 5 || (y < 6.0) == below_six, "{level:?} {quarters}");
                }
            }
        }
    }
}

/// Outputs from 8 MiB on are written with non-temporal stores, wherever in a cache line their rows begin and end: whole
/// tensors, short rows of one channel, and the last columns of wide rows.
#[test]
fn large_outputs_have_the_bits_of_small_ones() {
    large_output::<f64>(2, 1, (1 << 19) + 9);
    large_output::<f32>(60_000, 1, 40);
    large_output::<f16>(1030, 4096 + 20, 1);
}

fn large_output<T: Element>(outer: usize, channels: usize, inner: usize) {
    let [layout, sample] = [outer, 1].map(|outer| Layout::new(outer, channels, inner).unwrap());
    let x = tensor::<T>(layout, 4, 0.0);
    assert!(size_of_val(&x[..]) >= 8 << 20 && sample.len() * size_of::<T>() < 8 << 20);
    let (gamma, beta) = parameters(channels);
    let parameters = Parameters { gamma: Some(&gamma), beta: Some(&beta), eps: EPS };
    let coefficients = Coefficients::new(&beta, &vec![1.0; channels], parameters).unwrap();
    let infer_to = |x: &[T], y: &mut [T], layout| {
        let (x, mut y) = (View::new(x, layout).unwrap(), ViewMut::new(y, layout).unwrap());
        infer(Input::View(x), &coefficients, Epilogue::default(), &mut y).unwrap();
    };
    let mut wanted = x.clone();
    for (x, y) in x.chunks(sample.len()).zip(wanted.chunks_mut(sample.len())) {
        infer_to(x, y, sample);
    }
    for offset in [0, 1, 5] {
        let mut memory = vec![T::from_f64(7.0); offset + x.len()];
        infer_to(&x, &mut memory[offset..], layout);
        let same = memory[offset..].iter().zip(&wanted).all(|(a, b)| a.to_f64().to_bits() == b.to_f64().to_bits());
        assert!(same, "{layout:?}, {offset} elements into memory");
    }
}

/// What the high part of the mean leaves over shows where x is the high part. Ten values are computed one by one, forty
/// as vectors.
#[test]
fn the_mean_of_16_bit_tensors_has_two_parts() {
    mean_in_two_parts::<f16>();
    mean_in_two_parts::<bf16>();
}

fn mean_in_two_parts<T: Element>() {
    let parameters = Parameters { gamma: Some(&[2f64.powi(20)]), beta: None, eps: 0.0 };
    let coefficients = Coefficients::new(&[1.0 + 2f64.powi(-30)], &[1.0], parameters).unwrap();
    for (outer, inner) in [(1, 40), (40, 1), (1, 10), (10, 1)] {
        let layout = Layout::new(outer, 1, inner).unwrap();
        let mut y = vec![T::from_f64(1.0); layout.len()];
        let mut view = ViewMut::new(&mut y, layout).unwrap();
        infer(Input::InPlace, &coefficients, Epilogue::default(), &mut view).unwrap();
        assert!(y.iter().all(|y| y.to_f64() == -2f64.powi(-10)), "{layout:?}: {}", y[0].to_f64());
    }
}

#[test]
fn statistics_are_accurate_at_any_mean() {
    for (outer, channels, inner) in LAYOUTS {
        let layout = Layout::new(outer, channels, inner).unwrap();
        for mean in [0.0, 1e2, 1e6] {
            let x = tensor::<f64>(layout, 5, mean);
            let m = moments(View::new(&x, layout).unwrap()).unwrap();
            for c in 0..channels {
                let values = channel(&x, layout, c);
                let n = values.len() as f64;
                let about = sum(values.iter().map(|v| v - mean)) / n; // exact mean, less `mean`
                let m2 = sum(values.iter().map(|v| ((v - mean) - about).powi(2)));
                let kappa = mean / (m2 / n).sqrt();
                assert!((m.mean()[c] - mean - about).abs() <= 1e-15 * (1.0 + mean), "{layout:?} {mean}");
                assert!((m.m2()[c] - m2).abs() <= 1e-15 * (10.0 + kappa) * m2, "{layout:?} {mean}: {} {m2}", m.m2()[c]);
            }
        }
    }
}

/// The pivot of a block is the mean of its first values. Here these lie far from all others, so one pass about the pivot
/// loses accuracy, by a factor of up to the block's length over the number of those values. The second pass, about the
/// mean, must prevent that.
#[test]
fn outliers_at_the_start_of_a_block_cost_no_accuracy() {
    // One block each: long runs of one channel, short runs of channels that are summed together (of more channels than
    // there are tasks), columns.
    for (outer, channels, inner, outliers, spread) in
        [(1, 40, 4096, 16, 0.01), (64, 130, 64, 16, 0.01), (256, 40, 1, 8, 0.0)]
    {
        let layout = Layout::new(outer, channels, inner).unwrap();
        let (scale, rest) = (tensor::<f64>(layout, 17, 1.5), tensor::<f64>(layout, 7, 0.0));
        let mut x = vec![0.0; layout.len()];
        for (i, x) in x.iter_mut().enumerate() {
            let (place, c) = (i % inner + i / (channels * inner) * inner, i / inner % channels);
            let distance = 100.0 * scale[c * inner];
            let first = if place < outliers { distance } else { 0.0 };
            *x = first + distance * (0.3 * rest[c * inner] + spread * rest[i]);
        }
        let m = moments(View::new(&x, layout).unwrap()).unwrap();
        let mut needed = 0;
        for c in 0..channels {
            let values = channel(&x, layout, c);
            let n = values.len() as f64;
            let mean = sum(values.iter().copied()) / n;
            let m2 = sum(values.iter().map(|v| (v - mean).powi(2)));
            let most = 1e-15 * (10.0 + mean.abs() / (m2 / n).sqrt()) * m2;
            assert!((m.m2()[c] - m2).abs() <= most, "{layout:?}: {} {m2}", m.m2()[c]);
            let pivot = values[..outliers].iter().sum::<f64>() / outliers as f64;
            let lanes = |f: fn(f64) -> f64| {
                (0..16).map(|l| values[l..].iter().step_by(16).map(|v| f(v - pivot)).sum::<f64>()).sum::<f64>()
            };
            let one_pass = lanes(|d| d * d) - lanes(|d| d).powi(2) / n;
            needed += usize::from((one_pass - m2).abs() > most);
        }
        assert!(needed > 0, "{layout:?}: one pass is accurate enough here, so this shows nothing");
    }
}

#[test]
fn a_constant_channel_gives_beta_and_no_variance() {
    for (outer, channels, inner) in LAYOUTS {
        let layout = Layout::new(outer, channels, inner).unwrap();
        for value in [0.1, 1e300, 1e-300, -7.3e9] {
            let x = vec![value; layout.len()];
            let (_, beta) = parameters(channels);
            let mut y = vec![0.0; layout.len()];
            let view = View::new(&x, layout).unwrap();
            let (m, _) = train_forward(
                Input::View(view),
                Parameters { gamma: None, beta: Some(&beta), eps: EPS },
                Epilogue::default(),
                &mut ViewMut::new(&mut y, layout).unwrap(),
            )
            .unwrap();
            assert!(m.mean().iter().all(|&mean| mean == value) && m.m2().iter().all(|&m2| m2 == 0.0), "{layout:?}");
            for (c, b) in beta.iter().enumerate() {
                assert!(channel(&y, layout, c).iter().all(|y| y == b), "{layout:?} {value}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_channel() {
    for (outer, channels, inner) in [(600, 5, 1), (9, 5, 4), (6, 5, 50), (3, 20, 5000)] {
        let layout = Layout::new(outer, channels, inner).unwrap();
        for bad in [f64::NAN, f64::INFINITY] {
            let clean = tensor::<f64>(layout, 3, 1.0);
            let mut x = clean.clone();
            x[2 * inner] = bad; // channel 2
            let [(m, y), (wanted, wanted_y)] = [&x, &clean].map(|x| {
                let mut y = vec![0.0; layout.len()];
                let view = View::new(x, layout).unwrap();
                let (m, _) = train_forward(
                    Input::View(view),
                    Parameters::default(),
                    Epilogue::default(),
                    &mut ViewMut::new(&mut y, layout).unwrap(),
                )
                .unwrap();
                (m, y)
            });
            for c in 0..channels {
                if c == 2 {
                    assert!(m.m2()[c].is_nan() && channel(&y, layout, c).iter().all(|y| y.is_nan()));
                } else {
                    assert_eq!((m.mean()[c], m.m2()[c]), (wanted.mean()[c], wanted.m2()[c]));
                    assert_eq!(channel(&y, layout, c), channel(&wanted_y, layout, c));
                }
            }
        }
    }
}

#[test]
fn moments_and_sums_merge_and_travel() {
    let one = Moments::new(vec![2.0, 0.0], vec![1.0, 0.0], vec![0.5, 0.0]).unwrap();
    let other = Moments::new(vec![1.0, 3.0], vec![4.0, 5.0], vec![0.0, 6.0]).unwrap();
    let merged = one.merge(&other).unwrap();
    assert_eq!((merged.count(), merged.mean(), merged.m2()), (&[3.0, 3.0][..], &[2.0, 5.0][..], &[6.5, 6.0][..]));
    let bytes = merged.to_bytes().unwrap();
    assert_eq!(Moments::from_bytes(&bytes), Ok(merged.clone()));
    assert!(matches!(Moments::from_bytes(&bytes[1..]), Err(Error::Bytes { .. })));
    assert!(matches!(Moments::from_bytes(&[&bytes[..], &[0]].concat()), Err(Error::Bytes { .. })));
    assert!(matches!(one.var(), Err(Error::TooFewValues { channel: 1, .. })));

    let sums = GradientSums::new(vec![2.0], vec![3.0], vec![4.0]).unwrap();
    let twice = sums.merge(&sums).unwrap();
    assert_eq!((twice.count(), twice.dgamma(), twice.dbeta()), (&[4.0][..], &[6.0][..], &[8.0][..]));
    assert_eq!(GradientSums::from_bytes(&twice.to_bytes().unwrap()), Ok(twice));
}

/// Errors that cannot occur from Python, since the binding makes buffers and layouts agree.
#[test]
fn mismatched_buffers_are_errors() {
    let (layout, other) = (Layout::new(4, 2, 1).unwrap(), Layout::new(2, 4, 1).unwrap());
    let x = [0.0f32; 8];
    assert!(matches!(View::new(&x[1..], layout), Err(Error::Elements { argument: "x", got: 7, wanted: 8 })));
    let mut y = [0.0f32; 8];
    assert!(matches!(ViewMut::new(&mut y[1..], layout), Err(Error::Elements { argument: "out", .. })));
    let view = View::new(&x, layout).unwrap();
    let coefficients = Coefficients::new(&[0.0; 2], &[1.0; 2], Parameters::default()).unwrap();
    let mismatch = |argument| Err::<(), _>(Error::LayoutMismatch { argument });
    let mut y = ViewMut::new(&mut y, other).unwrap();
    assert_eq!(infer(Input::View(view), &coefficients, Epilogue::default(), &mut y), mismatch("out"));
    let pass = ForwardPass { x: view, coefficients: &coefficients, epilogue: Epilogue::default() };
    let (dy, other_dy) = (View::new(&x, layout).unwrap(), View::new(&x, other).unwrap());
    assert_eq!(gradient_sums(other_dy, pass).map(drop), mismatch("dy"));
    assert_eq!(backward(Dy::View(dy), pass, None, &mut y).map(drop), mismatch("out"));
    let residual = Epilogue { residual: Some(other_dy), activation: None };
    let mut dx = [0.0f32; 8];
    let mut dx = ViewMut::new(&mut dx, layout).unwrap();
    assert_eq!(infer(Input::View(view), &coefficients, residual, &mut dx), mismatch("residual"));
    assert_eq!(backward(Dy::View(other_dy), pass, None, &mut dx).map(drop), mismatch("dy"));
    assert_eq!(backward(Dy::View(dy), pass, Some(&mut y), &mut dx).map(drop), mismatch("dresidual"));
    assert_eq!(infer_backward(Dy::InDresidual, pass, None, &mut dx), Err(Error::NoDresidual));
}
