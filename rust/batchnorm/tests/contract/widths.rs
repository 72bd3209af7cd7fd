//! Every pass at every length near lanes and cache lines, at every level: small enough for `make memcheck`, which runs these
//! tests under Valgrind, where each tensor has an allocation of its own.

use crate::common::{everything, own_settings};
use batchnorm::{Element, Layout, bf16, f16, set_num_threads, set_simd_level, simd_level, simd_levels};

/// Twice the elements of a cache line of the narrowest type, and one more.
const LONGEST: usize = 2 * 32 + 1;

fn widths<T: Element>() -> usize {
    let mut compared = 0;
    for n in 1..=LONGEST {
        for (outer, channels, inner) in [(2, n, 1), (n + 1, 3, 1), (2, 2, n), (1, 1, n + 1)] {
            let layout = Layout::new(outer, channels, inner).unwrap();
            set_simd_level(Some("baseline")).unwrap();
            let wanted = everything::<T>(layout, 3.0);
            for level in simd_levels() {
                assert_eq!(set_simd_level(Some(level.name())), simd_level());
                assert!(everything::<T>(layout, 3.0) == wanted, "{layout:?} at {level:?}");
                compared += 1;
            }
        }
    }
    compared
}

#[test]
fn every_width_of_every_type() {
    let _settings = own_settings();
    set_num_threads(2).unwrap();
    let compared = [widths::<f32>(), widths::<f64>(), widths::<f16>(), widths::<bf16>()];
    assert_eq!(compared, [4 * LONGEST * simd_levels().len(); 4]);
    // Past the caches, where outputs are streamed, by two threads.
    let large = Layout::new(32_813, 64, 1).unwrap();
    set_simd_level(Some("baseline")).unwrap();
    let wanted = everything::<f64>(large, 3.0);
    set_simd_level(None).unwrap();
    assert!(everything::<f64>(large, 3.0) == wanted);
    println!("levels: {:?}", simd_levels());
}
