//! The floating-point mode of a pass: round to nearest, no flush to zero, whatever the host program has set.

#![allow(unsafe_code, reason = "the control register of the processor")]

#[cfg(target_arch = "x86_64")]
mod register {
    use std::arch::asm;

    /// All exceptions masked, round to nearest, neither flush-to-zero nor denormals-are-zero.
    pub(super) const STANDARD: u64 = 0x1F80;
    /// Rounding mode, flush-to-zero, denormals-are-zero and the exception masks; the rest are sticky flags.
    pub(super) const CONTROL: u64 = 0xFFC0;

    pub(super) fn read() -> u64 {
        let mut value = 0u32;
        // SAFETY: MXCSR is stored into a local of its size.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
        value.into()
    }

    pub(super) fn write(value: u64) {
        let value = value as u32;
        // SAFETY: `value` is one that MXCSR held, or `STANDARD`; neither has a reserved bit set.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
    }
}

#[cfg(target_arch = "aarch64")]
mod register {
    use std::arch::asm;

    /// Round to nearest, no flush-to-zero, default NaN off, no traps.
    pub(super) const STANDARD: u64 = 0;
    /// Every bit of FPCR is a control bit.
    pub(super) const CONTROL: u64 = u64::MAX;

    pub(super) fn read() -> u64 {
        let value: u64;
        // SAFETY: reading FPCR has no effect.
        unsafe { asm!("mrs {}, fpcr", out(reg) value, options(nostack, preserves_flags)) };
        value
    }

    pub(super) fn write(value: u64) {
        // SAFETY: `value` is one that FPCR held, or `STANDARD`.
        unsafe { asm!("msr fpcr, {}", in(reg) value, options(nostack, preserves_flags)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod register {
    pub(super) const STANDARD: u64 = 0;
    pub(super) const CONTROL: u64 = 0;
    pub(super) fn read() -> u64 {
        0
    }
    pub(super) fn write(_: u64) {}
}

/// A guard that puts this thread in the standard floating-point mode, and restores the previous mode when it is dropped.
///
/// Arithmetic under the guard reads its operands from memory and writes its results to memory. To the compiler, both
/// changes of the mode may read and write any memory, so it cannot move such arithmetic across them.
pub(crate) struct FloatMode {
    found: Option<u64>,
}

impl FloatMode {
    pub(crate) fn standard() -> Self {
        let found = register::read();
        let differs = (found ^ register::STANDARD) & register::CONTROL != 0;
        if differs {
            register::write(register::STANDARD);
        }
        Self { found: differs.then_some(found) }
    }
}

impl Drop for FloatMode {
    fn drop(&mut self) {
        if let Some(found) = self.found {
            register::write(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_host_that_flushes_to_zero_gets_its_mode_back() {
        const FLUSHING: u64 = 0x1F80 | 0x8040;
        let before = register::read();
        register::write(FLUSHING);
        let flushed = black_box(f64::MIN_POSITIVE) * black_box(0.5);
        let guard = FloatMode::standard();
        let kept = black_box(f64::MIN_POSITIVE) * black_box(0.5);
        drop(guard);
        let after = register::read();
        register::write(before);
        assert_eq!(flushed, 0.0, "the host's mode was not set, so this test checks nothing");
        assert!(kept > 0.0);
        assert_eq!(after & register::CONTROL, FLUSHING & register::CONTROL);
    }
}
