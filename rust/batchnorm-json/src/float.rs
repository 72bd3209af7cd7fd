//! The two types of numbers that travel as JSON.

/// A type of numbers that travels as JSON: float32 or float64.
pub trait Float: private::Sealed {}

impl Float for f32 {}
impl Float for f64 {}

/// Numbers of a `data` array, in the type that the tensor says.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    /// Those of a tensor whose datatype is FP32, rounded to float64 and from there to float32.
    F32(Vec<f32>),
    /// Those of every other tensor, rounded to float64.
    F64(Vec<f64>),
}

impl Numbers {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

pub(crate) mod private {
    use super::{MISREAD, Numbers};

    /// What reading and printing need to know of a type.
    pub trait Sealed: Copy {
        /// Its name in errors.
        const NAME: &'static str;
        /// About the length of its usual numbers in JSON, with the comma.
        const USUAL: usize;

        /// The nearest value of this type.
        fn rounded(wide: f64) -> Self;
        /// The same value in float64.
        fn wide(self) -> f64;
        /// The shortest text of a finite value that gives it back.
        fn shortest(self, buffer: &mut zmij::Buffer) -> &str;
        /// Numbers of this type.
        fn numbers(values: Vec<Self>) -> Numbers;
    }

    impl Sealed for f32 {
        const NAME: &'static str = "FP32";
        const USUAL: usize = 12;

        #[inline]
        fn rounded(wide: f64) -> Self {
            wide as Self
        }
        #[inline]
        fn wide(self) -> f64 {
            f64::from(self)
        }
        #[inline]
        fn shortest(self, buffer: &mut zmij::Buffer) -> &str {
            if self.abs().to_bits() == MISREAD {
                buffer.format_finite(f64::from(self))
            } else {
                buffer.format_finite(self)
            }
        }
        fn numbers(values: Vec<Self>) -> Numbers {
            Numbers::F32(values)
        }
    }

    impl Sealed for f64 {
        const NAME: &'static str = "float64";
        const USUAL: usize = 21;

        #[inline]
        fn rounded(wide: f64) -> Self {
            wide
        }
        #[inline]
        fn wide(self) -> f64 {
            self
        }
        #[inline]
        fn shortest(self, buffer: &mut zmij::Buffer) -> &str {
            buffer.format_finite(self)
        }
        fn numbers(values: Vec<Self>) -> Numbers {
            Numbers::F64(values)
        }
    }
}

/// Readers of JSON round to float64 and then to float32. Of all float32 (all were tried) this one and its negative
/// alone have a shortest text, 7.038531e-26, which so becomes a neighbour; a float64 has more digits.
const MISREAD: u32 = 0x15AE_43FD;
