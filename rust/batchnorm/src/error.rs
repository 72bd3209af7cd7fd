//! The errors of this crate: one enum, one variant for each kind, one `Display`.

use std::fmt;

/// Why a call failed. A call that fails changes nothing that was valid before it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// The tensor has fewer than two axes.
    Rank {
        /// Number of axes that the tensor has.
        rank: usize,
    },
    /// The channel axis does not exist in a tensor of this rank.
    ChannelAxis {
        /// The axis asked for (negative counts from the end).
        axis: isize,
        /// Number of axes that the tensor has.
        rank: usize,
    },
    /// The tensor has no channel.
    NoChannels,
    /// The tensor's size in bytes does not fit in 64 bits.
    Overflow,
    /// There is no memory for an array, whose length grows with the number of channels or of tasks.
    NoMemory {
        /// Bytes that the array takes.
        bytes: usize,
    },
    /// A buffer does not hold as many elements as its layout says.
    Elements {
        /// Name of the argument.
        argument: &'static str,
        /// Elements found.
        got: usize,
        /// Elements wanted.
        wanted: usize,
    },
    /// Two tensors of one call have different layouts.
    LayoutMismatch {
        /// Name of the argument.
        argument: &'static str,
    },
    /// A per-channel argument has another number of channels than the tensor.
    Channels {
        /// Name of the argument.
        argument: &'static str,
        /// Channels found.
        got: usize,
        /// Channels wanted.
        wanted: usize,
    },
    /// A parameter is NaN or infinite.
    NotFinite {
        /// Name of the argument.
        argument: &'static str,
        /// First channel where it is so.
        channel: usize,
        /// The value found there.
        value: f64,
    },
    /// A variance, sum of squares or count is negative.
    Negative {
        /// Name of the argument.
        argument: &'static str,
        /// First channel where it is so.
        channel: usize,
        /// The value found there.
        value: f64,
    },
    /// A coefficient is finite, but not in float32, in which 16-bit tensors are normalized.
    Range {
        /// Name of the coefficient.
        what: &'static str,
        /// First channel where it is out of range.
        channel: usize,
        /// The value found there.
        value: f64,
    },
    /// ε is negative, NaN or infinite.
    Eps {
        /// The value given.
        value: f64,
    },
    /// ε is zero in training, where a constant channel would be divided by zero.
    EpsZeroInTraining,
    /// ε is zero although the variance of a channel is zero.
    EpsZeroForZeroVariance {
        /// First channel where it is so.
        channel: usize,
    },
    /// A channel has too few values for the statistic that was asked for.
    TooFewValues {
        /// First channel where it is so.
        channel: usize,
        /// Number of values that the channel has.
        count: f64,
        /// Number of values that the statistic needs.
        wanted: u32,
    },
    /// Gradient sums are over another number of values than the moments of the forward pass.
    Counts {
        /// First channel where it is so.
        channel: usize,
        /// Number of values that the sums are over.
        got: f64,
        /// Number of values that the moments are over.
        wanted: f64,
    },
    /// The channels cannot be divided into so many groups.
    Groups {
        /// Number of groups asked for.
        groups: usize,
        /// Number of channels.
        channels: usize,
    },
    /// Two values have other numbers of groups.
    OtherGroups {
        /// Groups found.
        got: usize,
        /// Groups wanted.
        wanted: usize,
    },
    /// A way of whitening that does not exist.
    Method {
        /// The name given.
        got: String,
    },
    /// A number of steps where it has no place, or out of range.
    Steps {
        /// The number given.
        steps: u32,
        /// The name of the method.
        method: String,
    },
    /// A covariance with ε has no inverse, as far as float64 can tell.
    Singular {
        /// The group of channels.
        group: usize,
        /// The smallest eigenvalue of Λ+εI, or what is known of it.
        smallest: f64,
        /// The largest one.
        largest: f64,
    },
    /// The iteration did not come to an end.
    NotConverged {
        /// The group of channels.
        group: usize,
    },
    /// Two principal components have nearly the same variance, so that they have no derivative.
    EigenvalueGap {
        /// The group of channels.
        group: usize,
        /// The two components.
        pair: (usize, usize),
        /// Their variances.
        values: (f64, f64),
    },
    /// dy is to be read from the memory of dresidual, but there is no dresidual.
    NoDresidual,
    /// Bytes that `from_bytes` cannot read.
    Bytes {
        /// What was to be read.
        what: &'static str,
        /// What is wrong with the bytes.
        reason: &'static str,
    },
    /// A number of threads that cannot be had.
    Threads {
        /// What was asked for.
        got: String,
    },
    /// A source of threads that does not exist.
    ThreadSource {
        /// What was asked for.
        got: String,
    },
    /// A library that has no OpenMP team.
    Library {
        /// Its path or name.
        got: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An instruction-set level that is unknown or that this machine cannot run.
    Level {
        /// The name given, and where it stood.
        got: String,
        /// The names that this machine can run.
        wanted: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rank { rank } => write!(f, "x has rank {rank}; wanted rank 2 or more: (batch, channels, ...)"),
            Self::ChannelAxis { axis, rank } => write!(
                f,
                "channel_axis is {axis}; wanted an axis of a tensor of rank {rank}: 0 to {}, or -{rank} to -1",
                rank.saturating_sub(1)
            ),
            Self::NoChannels => write!(f, "x has 0 channels; wanted 1 or more"),
            Self::Overflow => write!(f, "x has more bytes than a 64-bit size can hold"),
            Self::NoMemory { bytes } => write!(f, "not enough memory for an array of {bytes} bytes"),
            Self::Elements { argument, got, wanted } => {
                write!(f, "{argument} holds {got} elements; wanted {wanted}, as its layout says")
            }
            Self::LayoutMismatch { argument } => {
                write!(f, "{argument} has another layout than x; wanted the same shape and memory order")
            }
            Self::Channels { argument, got, wanted } => {
                write!(f, "{argument} has {got} channels; wanted {wanted}")
            }
            Self::NotFinite { argument, channel, value } => {
                write!(f, "{argument} is {value} in channel {channel}; wanted a finite number")
            }
            Self::Negative { argument, channel, value } => {
                write!(f, "{argument} is {value} in channel {channel}; wanted 0 or more")
            }
            Self::Range { what, channel, value } => write!(
                f,
                "{what} is {value:e} in channel {channel}; wanted at most 3.4e38 for x of 16 bits, which is normalized in float32"
            ),
            Self::Eps { value } => write!(f, "eps is {value}; wanted a finite number, 0 or more"),
            Self::EpsZeroInTraining => {
                write!(f, "eps is 0 in training; wanted more than 0, since the variance of a batch may be 0")
            }
            Self::EpsZeroForZeroVariance { channel } => {
                write!(f, "eps is 0 although var is 0 in channel {channel}; wanted eps > 0, or var > 0 everywhere")
            }
            Self::TooFewValues { channel, count, wanted } => {
                write!(f, "moments have count {count} in channel {channel}; wanted {wanted} values or more")
            }
            Self::Counts { channel, got, wanted } => write!(
                f,
                "sums are over {got} values in channel {channel}; wanted {wanted}, as its moments: merge those of all parts"
            ),
            Self::Groups { groups, channels } => {
                write!(f, "groups is {groups}; wanted a divisor of the number of channels, {channels}")
            }
            Self::OtherGroups { got, wanted } => write!(f, "other has {got} groups of channels; wanted {wanted}"),
            Self::Method { got } => {
                write!(f, "method is {got:?}; wanted \"zca\", \"pca\", \"cholesky\" or \"iterative\"")
            }
            Self::Steps { steps, method } => {
                write!(f, "steps is {steps} for method {method:?}; wanted None, or 1 to 100 for method \"iterative\"")
            }
            Self::Singular { group, smallest, largest } => write!(
                f,
                "the covariance of group {group} of channels is singular with this eps: its smallest eigenvalue is {smallest:e}, \
                 its largest {largest:e}; wanted a larger eps or more rows; in training shrinkage helps too"
            ),
            Self::NotConverged { group } => write!(
                f,
                "the iteration did not converge for group {group} of channels; wanted a larger eps or another method"
            ),
            Self::EigenvalueGap { group, pair: (a, b), values: (first, second) } => write!(
                f,
                "principal components {a} and {b} of group {group} of channels have nearly the same variance, {first:e} and \
                 {second:e}, so that they have no derivative; wanted a relative gap of 1e-8 or more, or method \"zca\""
            ),
            Self::NoDresidual => write!(f, "dresidual is absent; wanted the tensor that holds dy"),
            Self::Bytes { what, reason } => write!(f, "data are not the bytes of {what}: {reason}"),
            Self::Threads { got } => write!(f, "the number of threads is {got}; wanted a whole number from 1 to 1024"),
            Self::ThreadSource { got } => {
                write!(f, "the source of threads is {got}; wanted \"own\" without a library, or \"openmp\"")
            }
            Self::Library { got, reason } => {
                write!(f, "library is {got:?}; wanted an OpenMP runtime with GOMP_parallel: {reason}")
            }
            Self::Level { got, wanted } => {
                write!(f, "the SIMD level is {got}; wanted one that this machine can run: {wanted}")
            }
        }
    }
}

impl std::error::Error for Error {}

/// Makes `KINDS` and `kind` from one list. The match is exhaustive, so a variant missing from the list does not compile.
macro_rules! kinds {
    ($($name:ident)+) => {
        impl Error {
            /// The names of all variants.
            pub const KINDS: &[&str] = &[$(stringify!($name)),+];

            /// The name of this variant.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Self::$name { .. } => stringify!($name)),+
                }
            }
        }
    };
}

kinds! {
    Rank ChannelAxis NoChannels Overflow Elements LayoutMismatch Channels NotFinite Negative Eps EpsZeroInTraining
    EpsZeroForZeroVariance TooFewValues Counts Bytes Threads Level Range NoDresidual
    NoMemory ThreadSource Library Groups OtherGroups Method Steps Singular NotConverged EigenvalueGap
}

impl Error {
    /// Checks that a parameter has no NaN and no infinity; the error names the first channel that has.
    pub(crate) fn check_finite(argument: &'static str, values: &[f64]) -> Result<(), Self> {
        // Without a way out of the loop it takes a fraction of the time.
        if values.iter().fold(true, |all, v| all & v.is_finite()) {
            return Ok(());
        }
        match values.iter().position(|v| !v.is_finite()) {
            Some(channel) => Err(Self::NotFinite { argument, channel, value: values[channel] }),
            None => Ok(()),
        }
    }

    /// Checks the same of matrices with a row of `d` numbers for each channel.
    pub(crate) fn check_finite_rows(argument: &'static str, matrices: &[f64], d: usize) -> Result<(), Self> {
        match matrices.iter().position(|v| !v.is_finite()) {
            Some(k) => Err(Self::NotFinite { argument, channel: k / d, value: matrices[k] }),
            None => Ok(()),
        }
    }

    /// The number of channels in each of so many groups.
    pub(crate) fn check_groups(groups: usize, channels: usize) -> Result<usize, Self> {
        match channels.checked_div(groups) {
            Some(d) if d * groups == channels => Ok(d),
            _ => Err(Self::Groups { groups, channels }),
        }
    }

    /// Checks that no value is below 0; the error names the first channel that has one.
    pub(crate) fn check_not_negative(argument: &'static str, values: &[f64]) -> Result<(), Self> {
        match values.iter().position(|&v| v < 0.0) {
            Some(channel) => Err(Self::Negative { argument, channel, value: values[channel] }),
            None => Ok(()),
        }
    }

    /// Checks that counts are finite and not negative.
    pub(crate) fn check_counts(count: &[f64]) -> Result<(), Self> {
        Self::check_finite("count", count)?;
        Self::check_not_negative("count", count)
    }

    /// Checks that a per-channel argument has as many channels as wanted.
    pub(crate) fn check_channels(argument: &'static str, got: usize, wanted: usize) -> Result<(), Self> {
        if got == wanted { Ok(()) } else { Err(Self::Channels { argument, got, wanted }) }
    }
}
