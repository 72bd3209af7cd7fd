//! Times what a JSON request of 32 by 256 numbers costs: taking its numbers out, and printing as many.
//!
//! Medians of many runs, which alternate, so that a busy machine disturbs all alike.

use batchnorm_json::{Limits, NonFinite, cut_data, put_data};
use std::hint::black_box;
use std::time::Instant;

const COUNT: usize = 32 * 256;

fn main() {
    // Run without arguments by `cargo test`: that it works is all that is asked for then.
    let rounds = if std::env::args().any(|argument| argument == "--bench") { 2000 } else { 1 };
    let mut random = 1_u64;
    let normal = std::iter::repeat_with(|| {
        // The sum of twelve uniform numbers is nearly normal.
        let sum: f64 = (0..12)
            .map(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 11) as f64 / (1_u64 << 53) as f64
            })
            .sum();
        sum - 6.0
    });
    let values: Vec<f32> = normal.take(COUNT).map(|value| value as f32).collect();
    let wide: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
    let request = |numbers: &[u8]| {
        [br#"{"inputs":[{"name":"x","shape":[32,256],"datatype":"FP32","data":"#, numbers, b"}]}"].concat()
    };
    let print = |values: &[f32]| put_data(b"", values, b"", NonFinite::Tokens).unwrap_or_default();
    let short = request(&print(&values));
    // As Python prints float32 from lists: with the digits of a float64.
    let long = request(&put_data(b"", &wide, b"", NonFinite::Tokens).unwrap_or_default());
    let limits = Limits { depth: 100, numbers: COUNT };
    let read = |text: &[u8]| cut_data(text, limits).map_or(0, |request| request.arrays.len());
    let mut times: [(&str, Vec<f64>); 3] =
        [("read, digits of float32", vec![]), ("read, digits of float64", vec![]), ("print float32", vec![])];
    for _ in 0..rounds {
        for (which, (_, times)) in times.iter_mut().enumerate() {
            let begin = Instant::now();
            let done = match which {
                0 => read(black_box(&short)),
                1 => read(black_box(&long)),
                _ => print(black_box(&values)).len(),
            };
            times.push(begin.elapsed().as_secs_f64());
            assert!(black_box(done) > 0, "nothing was read or printed");
        }
    }
    for (name, times) in &mut times {
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        println!(
            "{name:<25} {:7.1} µs, {:5.2} ns a number; the least {:5.2} ns",
            median * 1e6,
            median * 1e9 / COUNT as f64,
            times[0] * 1e9 / COUNT as f64
        );
    }
}
