//! The JSON reader: the grammar, and the interface to what builds values.

use crate::Error;
use crate::decimal::{Decimal, decimal};
use std::borrow::Cow;

/// Largest number of digits of an integer: Python does not convert longer ones from text.
const MAX_INTEGER: usize = 4300;

/// Builds values from the contents of a JSON text.
pub trait Build {
    /// A JSON value.
    type Value;
    /// Why a text cannot be read, or a value cannot be made.
    type Error: From<Error>;

    /// Makes a value that has no parts, or returns why it cannot be made.
    fn scalar(&mut self, scalar: Scalar<'_>) -> Result<Self::Value, Self::Error>;
    /// Makes an empty array, or returns why it cannot be made.
    fn array(&mut self) -> Result<Self::Value, Self::Error>;
    /// Appends an item to an array, or returns why that is not possible.
    fn push(&mut self, array: &mut Self::Value, item: Self::Value) -> Result<(), Self::Error>;
    /// Makes an empty object, or returns why it cannot be made.
    fn object(&mut self) -> Result<Self::Value, Self::Error>;
    /// Sets a member of an object, or returns why that is not possible; if two have one name, the last counts.
    fn insert(&mut self, object: &mut Self::Value, name: &str, value: Self::Value) -> Result<(), Self::Error>;
}

/// A JSON value without parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scalar<'a> {
    /// The literal `null`.
    Null,
    /// The literals `true` and `false`.
    Boolean(bool),
    /// A number without fraction and exponent: up to 4300 digits, after a minus sign if it is negative.
    Integer(&'a str),
    /// Any other number, rounded to float64; infinite or NaN only if the text has such a token.
    Float(f64),
    /// A string, without its quotes and escapes.
    String(&'a str),
}

/// Reads a whole JSON text.
///
/// # Errors
/// The text is malformed or nested deeper than `max_depth`, or a value cannot be made.
pub fn parse<B: Build>(text: &[u8], max_depth: u8, build: &mut B) -> Result<B::Value, B::Error> {
    let mut reader = Reader::new(text, max_depth)?;
    let value = reader.value(build)?;
    reader.finish()?;
    Ok(value)
}

/// A reader at a position in a text.
#[derive(Clone)]
pub(crate) struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    depth: u8,
    max_depth: u8,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(text: &'a [u8], max_depth: u8) -> Result<Self, Error> {
        if text.starts_with(b"\xEF\xBB\xBF") {
            return Err(Error::ByteOrderMark);
        }
        Ok(Self { text, at: 0, depth: 0, max_depth })
    }

    /// Number of bytes of the text that have been read.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Skips blanks; returns the byte after them.
    #[inline]
    pub(crate) fn peek(&mut self) -> Option<u8> {
        while let Some(&byte) = self.text.get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Some(byte);
            }
            self.at += 1;
        }
        None
    }

    /// Checks that nothing but blanks is left.
    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        if self.peek().is_some() { Err(self.malformed("something follows the end of it")) } else { Ok(()) }
    }

    /// Skips the next value.
    pub(crate) fn skip(&mut self) -> Result<(), Error> {
        self.value(&mut Nothing)
    }

    fn value<B: Build>(&mut self, build: &mut B) -> Result<B::Value, B::Error> {
        match self.peek() {
            Some(b'{') => {
                let mut object = build.object()?;
                self.object(|reader, name| {
                    let value = reader.value(build)?;
                    build.insert(&mut object, &name, value)
                })?;
                Ok(object)
            }
            Some(b'[') => {
                let mut array = build.array()?;
                self.array(|reader| {
                    let item = reader.value(build)?;
                    build.push(&mut array, item)
                })?;
                Ok(array)
            }
            Some(b'"') => {
                let string = self.string()?;
                build.scalar(Scalar::String(&string))
            }
            Some(b't') => {
                self.literal("true")?;
                build.scalar(Scalar::Boolean(true))
            }
            Some(b'f') => {
                self.literal("false")?;
                build.scalar(Scalar::Boolean(false))
            }
            Some(b'n') => {
                self.literal("null")?;
                build.scalar(Scalar::Null)
            }
            _ => {
                let scalar = self.number_as_written()?;
                build.scalar(scalar)
            }
        }
    }

    /// Reads the object that comes next; `each` gets the name of each member and must read its value.
    pub(crate) fn object<E: From<Error>>(
        &mut self,
        mut each: impl FnMut(&mut Self, Cow<'a, str>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.open()?;
        if self.peek() == Some(b'}') {
            self.close();
            return Ok(());
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.malformed("a name in quotes is expected").into());
            }
            let name = self.string()?;
            if self.peek() != Some(b':') {
                return Err(self.malformed("':' is expected").into());
            }
            self.at += 1;
            each(self, name)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.close();
                    return Ok(());
                }
                _ => return Err(self.malformed("',' or '}' is expected").into()),
            }
        }
    }

    /// Reads the array that comes next; `each` must read each item.
    #[inline]
    pub(crate) fn array<E: From<Error>>(&mut self, mut each: impl FnMut(&mut Self) -> Result<(), E>) -> Result<(), E> {
        self.open()?;
        if self.peek() == Some(b']') {
            self.close();
            return Ok(());
        }
        loop {
            each(self)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.close();
                    return Ok(());
                }
                _ => return Err(self.malformed("',' or ']' is expected").into()),
            }
        }
    }

    fn open(&mut self) -> Result<(), Error> {
        if self.depth == self.max_depth {
            return Err(Error::TooDeep(self.max_depth));
        }
        self.depth += 1;
        self.at += 1;
        Ok(())
    }

    fn close(&mut self) {
        self.depth -= 1;
        self.at += 1;
    }

    /// Reads the string that comes next.
    pub(crate) fn string(&mut self) -> Result<Cow<'a, str>, Error> {
        let start = self.at + 1;
        let mut escapes = false;
        self.at = start;
        loop {
            match self.text.get(self.at) {
                Some(b'"') => break,
                Some(b'\\') => {
                    escapes = true;
                    self.at += 2;
                }
                Some(0..0x20) => return Err(self.malformed("a control character stands in a string")),
                Some(_) => self.at += 1,
                None => return Err(self.malformed("a string does not end")),
            }
        }
        let (text, end) = (self.text, self.at);
        let raw = std::str::from_utf8(&text[start..end]).map_err(|error| {
            self.at = start + error.valid_up_to();
            self.malformed("a string is not UTF-8")
        })?;
        let string = if escapes { Cow::Owned(self.unescaped(raw, start)?) } else { Cow::Borrowed(raw) };
        self.at = end + 1;
        Ok(string)
    }

    /// Decodes the escapes of the string that starts at `start` of the text.
    fn unescaped(&mut self, raw: &str, start: usize) -> Result<String, Error> {
        let mut string = String::new();
        string.try_reserve_exact(raw.len())?; // no escape is shorter than what it stands for
        let mut rest = raw;
        while let Some(at) = rest.find('\\') {
            string.push_str(&rest[..at]);
            rest = &rest[at..];
            let Some((character, after)) = escape(rest) else {
                self.at = start + raw.len() - rest.len();
                return Err(self.malformed("an escape in a string stands for no character"));
            };
            string.push(character);
            rest = after;
        }
        string.push_str(rest);
        Ok(string)
    }

    /// Skips the given word, which must come next.
    pub(crate) fn literal(&mut self, word: &'static str) -> Result<(), Error> {
        if !self.text[self.at..].starts_with(word.as_bytes()) {
            return Err(self.malformed("a value is expected"));
        }
        self.at += word.len();
        Ok(())
    }

    /// Reads the number that comes next; it is infinite if it is beyond the range of float64 or the token `Infinity`.
    #[inline]
    pub(crate) fn number(&mut self) -> Result<f64, Error> {
        match decimal(&self.text[self.at..]) {
            Ok(Decimal { value, length, .. }) => {
                self.at += length;
                Ok(value)
            }
            Err(end) => self.token(end),
        }
    }

    /// Whether the number just read is a token: no other number ends with a letter.
    pub(crate) fn ended_in_token(&self) -> bool {
        self.at.checked_sub(1).and_then(|last| self.text.get(last)).is_some_and(u8::is_ascii_alphabetic)
    }

    /// Reads the token of a number that is not finite; `end` is where reading it as a finite one failed.
    #[cold]
    fn token(&mut self, end: usize) -> Result<f64, Error> {
        const TOKENS: [(&[u8], f64); 3] =
            [(b"NaN", f64::NAN), (b"Infinity", f64::INFINITY), (b"-Infinity", f64::NEG_INFINITY)];
        let rest = &self.text[self.at..];
        if let Some((token, value)) = TOKENS.iter().find(|(token, _)| rest.starts_with(token)) {
            self.at += token.len();
            return Ok(*value);
        }
        let reason = if end == 0 { "a value is expected" } else { "a number breaks off" };
        self.at += end;
        Err(self.malformed(reason))
    }

    /// Reads the number that comes next, integers as their digits.
    fn number_as_written(&mut self) -> Result<Scalar<'a>, Error> {
        let start = self.at;
        let text = &self.text[start..];
        match decimal(text) {
            Ok(Decimal { length, integer: true, .. }) => {
                if length > MAX_INTEGER {
                    return Err(self.malformed("an integer has more than 4300 digits"));
                }
                self.at += length;
                // Digits are UTF-8.
                let digits = std::str::from_utf8(&text[..length]);
                digits.map(Scalar::Integer).map_err(|_| self.malformed("a number is not UTF-8"))
            }
            Ok(Decimal { value, .. }) if value.is_infinite() => {
                Err(self.malformed("a number is beyond the range of float64"))
            }
            Ok(Decimal { value, length, .. }) => {
                self.at += length;
                Ok(Scalar::Float(value))
            }
            Err(end) => self.token(end).map(Scalar::Float),
        }
    }

    /// The error that the text is malformed at this position.
    #[cold]
    pub(crate) fn malformed(&self, reason: &'static str) -> Error {
        let before = &self.text[..self.at.min(self.text.len())];
        let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        Error::Malformed { reason, line, column: 1 + before.len() - line_start }
    }
}

/// Reads the escape at the start of a text: the character that it stands for, and what follows it.
fn escape(text: &str) -> Option<(char, &str)> {
    let rest = text.strip_prefix('\\')?;
    let kind = rest.chars().next()?;
    let after = &rest[kind.len_utf8()..];
    let character = match kind {
        '"' | '\\' | '/' => kind,
        'b' => '\u{8}',
        'f' => '\u{C}',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        'u' => {
            let (unit, after) = four_hexadecimals(after)?;
            if !(0xD800..0xDC00).contains(&unit) {
                return Some((char::from_u32(unit)?, after));
            }
            let (low, after) = four_hexadecimals(after.strip_prefix("\\u")?)?;
            let low = low.checked_sub(0xDC00).filter(|&low| low < 0x400)?;
            return Some((char::from_u32(0x1_0000 + ((unit - 0xD800) << 10) + low)?, after));
        }
        _ => return None,
    };
    Some((character, after))
}

fn four_hexadecimals(text: &str) -> Option<(u32, &str)> {
    let (digits, after) = text.split_at_checked(4)?;
    // `from_str_radix` would take a sign.
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some((u32::from_str_radix(digits, 16).ok()?, after))
}

/// A [`Build`] that discards all values.
struct Nothing;

impl Build for Nothing {
    type Value = ();
    type Error = Error;

    fn scalar(&mut self, _: Scalar<'_>) -> Result<(), Error> {
        Ok(())
    }
    fn array(&mut self) -> Result<(), Error> {
        Ok(())
    }
    fn push(&mut self, (): &mut (), (): ()) -> Result<(), Error> {
        Ok(())
    }
    fn object(&mut self) -> Result<(), Error> {
        Ok(())
    }
    fn insert(&mut self, (): &mut (), _: &str, (): ()) -> Result<(), Error> {
        Ok(())
    }
}
