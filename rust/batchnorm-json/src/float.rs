//! The two float types that are sent as JSON numbers.

/// A float type that is sent as JSON numbers: float32 or float64.
pub trait Float: private::Sealed {}

impl Float for f32 {}
impl Float for f64 {}

/// The numbers of a `data` array, in the type of the tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    /// Numbers of a tensor of datatype FP32, rounded to float64 and then to float32.
    F32(Vec<f32>),
    /// Numbers of any other tensor, rounded to float64.
    F64(Vec<f64>),
}

impl Numbers {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

pub(crate) mod private {
    use super::{MISREAD, Numbers};

    /// The operations on a type that reading and printing need.
    pub trait Sealed: Copy {
        /// The name of the type in errors.
        const NAME: &'static str;
        /// The typical length of a number in JSON, with its comma.
        const USUAL: usize;

        /// The nearest value of this type.
        fn rounded(wide: f64) -> Self;
        /// Converts to float64, exactly.
        fn wide(self) -> f64;
        /// The shortest text that reads back as this finite value.
        fn shortest(self, buffer: &mut zmij::Buffer) -> &str;
        /// Wraps numbers of this type in a [`Numbers`].
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

/// The one float32 (with its negative) whose shortest text, 7.038531e-26, does not read back as itself.
///
/// Readers of JSON round to float64 and then to float32, which makes its neighbour of that text. All float32 were tried. It
/// is therefore printed with the digits of float64.
const MISREAD: u32 = 0x15AE_43FD;
