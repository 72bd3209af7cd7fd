//! Times every pass on the two families and all types, beside a plain copy: `cargo bench -p batchnorm`. Without
//! `--bench`, which `cargo bench` passes, each runs once on small tensors, so that `cargo test` keeps this alive.
//!
//! With an argument, only rows whose name contains it run: `cargo bench -p batchnorm -- f16`.

#![allow(clippy::unwrap_used, reason = "a benchmark that fails should stop")]

use batchnorm::{
    Activation, Coefficients, Dy, Element, Epilogue, Error, ForwardPass, Input, Layout, Parameters, View, ViewMut,
    backward, bf16, copy, f16, get_num_threads, infer, moments, simd_level, train_forward,
};
use std::time::{Duration, Instant};

const ROUNDS: usize = 15;
const REST: Duration = Duration::from_millis(2);

struct Run {
    timed: bool,
    only: String,
    ran: usize,
}

impl Run {
    /// Calls once, or prints the median of `ROUNDS` in milliseconds and in bytes of x and y moved a second.
    fn measure(&mut self, name: &str, bytes: usize, mut call: impl FnMut() -> Result<(), Error>) {
        if !name.contains(&self.only) {
            return;
        }
        self.ran += 1;
        call().unwrap();
        if !self.timed {
            return;
        }
        let mut times: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                std::thread::sleep(REST);
                let start = Instant::now();
                call().unwrap();
                start.elapsed()
            })
            .collect();
        times.sort();
        let median = times[ROUNDS / 2].as_secs_f64();
        println!("{name:<40} {:>9.3} ms {:>7.1} GB/s", median * 1e3, 2.0 * bytes as f64 / median / 1e9);
    }

    fn verbs<T: Element>(&mut self, dtype: &str, family: &str, layout: Layout) {
        let values = |step: usize| (0..layout.len()).map(move |i| T::from_f64((i * step % 1013) as f64 / 256.0 - 1.0));
        let (x, dy): (Vec<T>, Vec<T>) = (values(17).collect(), values(29).collect());
        let mut out = x.clone();
        let bytes = size_of_val(&x[..]);
        let (x, dy) = (View::new(&x, layout).unwrap(), View::new(&dy, layout).unwrap());
        let mut out = ViewMut::new(&mut out, layout).unwrap();
        let m = moments(x).unwrap();
        let coefficients = Coefficients::new(m.mean(), &m.var().unwrap(), Parameters::default()).unwrap();
        let nothing = Epilogue::default();
        let relu = Epilogue { activation: Some(Activation::Relu), residual: Some(dy) };
        let (_, trained) = train_forward(Input::View(x), Parameters::default(), nothing, &mut out).unwrap();
        let name = |verb: &str| format!("{verb} {dtype} {family}");
        self.measure(&name("copy"), bytes, || copy(x, None, &mut out, false));
        self.measure(&name("copy, streaming"), bytes, || copy(x, None, &mut out, true));
        self.measure(&name("moments"), bytes, || moments(x).map(drop));
        self.measure(&name("infer"), bytes, || infer(Input::View(x), &coefficients, nothing, &mut out));
        self.measure(&name("infer, residual, relu"), bytes, || infer(Input::View(x), &coefficients, relu, &mut out));
        for (follows, epilogue) in [("", nothing), (", residual, relu", relu)] {
            let train = || train_forward(Input::View(x), Parameters::default(), epilogue, &mut out).map(drop);
            self.measure(&name(&format!("train_forward{follows}")), bytes, train);
            let pass = ForwardPass { x, coefficients: &trained, epilogue };
            let back = || backward(Dy::View(dy), pass, None, &mut out).map(drop);
            self.measure(&name(&format!("backward{follows}")), bytes, back);
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let timed = arguments.iter().any(|a| a == "--bench");
    let only = arguments.into_iter().find(|a| !a.starts_with('-')).unwrap_or_default();
    let mut run = Run { timed, only, ran: 0 };
    let rows = if timed { 32 } else { 2 };
    for (family, layout) in [
        ("planar", Layout::new(rows, 64, 56 * 56).unwrap()),
        ("interleaved", Layout::new(rows * 56 * 56, 64, 1).unwrap()),
    ] {
        run.verbs::<f32>("f32", family, layout);
        run.verbs::<f64>("f64", family, layout);
        run.verbs::<f16>("f16", family, layout);
        run.verbs::<bf16>("bf16", family, layout);
    }
    assert!(run.ran > 0, "no verb, type or family is named {:?}", run.only);
    println!("{} ran, {} threads, {}", run.ran, get_num_threads().unwrap(), simd_level().unwrap().name());
}
