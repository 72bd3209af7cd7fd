//! Conversion of decimal numbers to float64, correctly rounded.

/// A number at the start of a text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decimal {
    /// The nearest float64; infinite if the number is beyond its range.
    pub(crate) value: f64,
    /// Number of bytes of the number's text.
    pub(crate) length: usize,
    /// Whether the number has neither a fraction nor an exponent.
    pub(crate) integer: bool,
}

/// Powers of ten that float64 holds exactly.
const TENS: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20,
    1e21, 1e22,
];

/// Powers of five that fit 64 bits.
const FIVES: [u64; 28] = {
    let mut fives = [1; 28];
    let mut power = 1;
    while power < fives.len() {
        fives[power] = 5 * fives[power - 1];
        power += 1;
    }
    fives
};

/// Powers of ten that a number is multiplied by when up to eight digits are appended.
const SHIFTS: [u64; 9] = [1, 10, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000];

/// Number of decimal digits that always fit 64 bits.
const MAX_DIGITS: usize = 19;

/// Reads the number at the start of `text`, by the grammar of JSON (no tokens), or returns where the text violates it.
#[inline]
pub(crate) fn decimal(text: &[u8]) -> Result<Decimal, usize> {
    let negative = text.first() == Some(&b'-');
    let start = usize::from(negative);
    let (mut mantissa, mut at) = whole_digits(text, start);
    if at == start || (at > start + 1 && text[start] == b'0') {
        return Err(start + usize::from(at > start));
    }
    let mut integer = true;
    let mut count = at - start;
    let mut exponent = 0;
    if text.get(at) == Some(&b'.') {
        integer = false;
        let point = at + 1;
        (mantissa, at) = fraction_digits(text, point, mantissa);
        if at == point {
            return Err(at);
        }
        count += at - point;
        exponent = -((at - point) as i64);
    }
    if let Some(b'e' | b'E') = text.get(at) {
        integer = false;
        let (given, end) = exponent_at(text, at + 1)?;
        exponent += given;
        at = end;
    }
    let magnitude = match exponent {
        _ if count > MAX_DIGITS => None,
        // Both operands are exact, so the one operation rounds correctly.
        -22..0 if mantissa < 1 << 53 => Some(mantissa as f64 / TENS[exponent.unsigned_abs() as usize]),
        0..=22 if mantissa < 1 << 53 => Some(mantissa as f64 * TENS[exponent as usize]),
        -27..0 => Some(quotient(mantissa, exponent.unsigned_abs() as usize)),
        _ => None,
    };
    let value = match magnitude {
        Some(magnitude) => f64::from_bits(magnitude.to_bits() | u64::from(negative) << 63),
        None => by_the_standard_library(&text[..at]),
    };
    Ok(Decimal { value, length: at, integer })
}

/// Reads digits from `at` on; returns their value, modulo 2^64, and where they end.
#[inline]
fn whole_digits(text: &[u8], mut at: usize) -> (u64, usize) {
    let mut number: u64 = 0;
    while let Some(&byte) = text.get(at)
        && byte.is_ascii_digit()
    {
        number = number.wrapping_mul(10).wrapping_add(u64::from(byte - b'0'));
        at += 1;
    }
    (number, at)
}

/// Appends the digits from `at` on to a number; returns its value, modulo 2^64, and where they end.
///
/// Processors predict the number of digits badly, so numbers of usual length take one path without a branch.
#[inline]
fn fraction_digits(text: &[u8], mut at: usize, mut number: u64) -> (u64, usize) {
    while let Some(chunk) = text[at..].first_chunk::<16>() {
        let chunk = u128::from_le_bytes(*chunk);
        let (first, first_count) = leading_digits(chunk as u64);
        let (second, second_count) = leading_digits((chunk >> 64) as u64);
        let second_count = if first_count == 8 { second_count } else { 0 };
        number = number.wrapping_mul(SHIFTS[first_count]).wrapping_add(eight(first, first_count));
        number = number.wrapping_mul(SHIFTS[second_count]).wrapping_add(eight(second, second_count));
        at += first_count + second_count;
        if second_count < 8 {
            return (number, at);
        }
    }
    while let Some(&byte) = text.get(at)
        && byte.is_ascii_digit()
    {
        number = number.wrapping_mul(10).wrapping_add(u64::from(byte - b'0'));
        at += 1;
    }
    (number, at)
}

/// The values of eight bytes as digits, the first in the lowest byte, and the number of digits before the first other byte.
#[inline]
fn leading_digits(text: u64) -> (u64, usize) {
    let values = text ^ 0x3030_3030_3030_3030;
    // A carry out of a byte that is not a digit changes only bytes after it.
    let others = (values.wrapping_add(0x0606_0606_0606_0606) | values) & 0xF0F0_F0F0_F0F0_F0F0;
    (values, (others.trailing_zeros() / 8) as usize)
}

/// The value of the first `count` of eight digits, of which the first is in the lowest byte.
#[inline]
fn eight(digits: u64, count: usize) -> u64 {
    // Shifts out the bytes after the digits, and shifts in zeros before them.
    let digits = digits.checked_shl(64 - 8 * count as u32).unwrap_or(0);
    let pairs = (digits.wrapping_mul(10 * 256 + 1) >> 8) & 0x00FF_00FF_00FF_00FF;
    let fours = (pairs.wrapping_mul(100 * 65536 + 1) >> 16) & 0x0000_FFFF_0000_FFFF;
    fours.wrapping_mul((10_000 << 32) + 1) >> 32
}

/// The float64 nearest to a number divided by a power of ten, up to 10^27.
#[inline]
fn quotient(number: u64, power: usize) -> f64 {
    if number == 0 {
        return 0.0;
    }
    let five = FIVES[power];
    let (up, down) = (number.leading_zeros(), five.leading_zeros());
    let dividend = u128::from(number << up) << 62;
    let divisor = u128::from(five << down);
    // 62 or 63 bits, and whether there are more: enough to round to 53 as the exact quotient would.
    let bits = dividend / divisor;
    let bits = bits as u64 | u64::from(bits * divisor != dividend);
    let exponent = i64::from(down) - i64::from(up) - 62 - power as i64;
    bits as i64 as f64 * f64::from_bits(((1023 + exponent) as u64) << 52)
}

/// Reads the exponent after an `e`; returns it, limited to where every number is 0 or infinite, and where it ends.
fn exponent_at(text: &[u8], mut at: usize) -> Result<(i64, usize), usize> {
    let negative = text.get(at) == Some(&b'-');
    if let Some(b'-' | b'+') = text.get(at) {
        at += 1;
    }
    let start = at;
    let mut value: i64 = 0;
    while let Some(&byte) = text.get(at)
        && byte.is_ascii_digit()
    {
        value = (value * 10 + i64::from(byte - b'0')).min(1 << 32);
        at += 1;
    }
    if at == start { Err(at) } else { Ok((if negative { -value } else { value }, at)) }
}

/// Reads a valid number of any length.
#[cold]
#[inline(never)]
fn by_the_standard_library(number: &[u8]) -> f64 {
    // It takes all that JSON's grammar does, and more.
    std::str::from_utf8(number).ok().and_then(|number| number.parse().ok()).unwrap_or(f64::NAN)
}
