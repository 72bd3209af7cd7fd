//! Seeded random texts, good and damaged.

/// A source of random numbers (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn digits(&mut self, most: u64) -> String {
        (0..1 + self.below(most)).map(|_| char::from(b'0' + self.below(10) as u8)).collect()
    }

    /// A number of JSON's grammar, as long and as far from 1 as the rules of rounding care about.
    pub(crate) fn decimal(&mut self) -> String {
        let sign = self.choose(&["", "-"]);
        match self.below(8) {
            0 => format!("{sign}{}", f64::from_bits(self.next() >> 2)).replace("inf", "0").replace("NaN", "0"),
            1 => format!("{sign}{}", f32::from_bits(self.next() as u32 >> 2)),
            2 => format!("{sign}{:e}", f64::from_bits(0x7FDF_FFFF_FFFF_FFFF & self.next() >> 1)),
            3 => format!("{sign}{}", self.below(1000)),
            _ => {
                let most = self.choose(&[1, 8, 9, 17, 25]);
                let whole =
                    if self.below(2) == 0 { "0".into() } else { format!("{}{}", 1 + self.below(9), self.digits(most)) };
                let most = self.choose(&[2, 8, 9, 17, 18, 30]);
                let fraction = if self.below(4) == 0 { String::new() } else { format!(".{}", self.digits(most)) };
                let exponent = match self.below(4) {
                    0 => format!("{}{}{}", self.choose(&["e", "E"]), self.choose(&["", "+", "-"]), self.below(35)),
                    _ => String::new(),
                };
                format!("{sign}{whole}{fraction}{exponent}")
            }
        }
    }

    fn string(&mut self) -> String {
        const PIECES: [&str; 14] =
            ["a", "inputs", "data", "é", "𝄞", r"\n", r#"\""#, r"\\", r"\/", r"\u00e9", r"\ud834\udd1e", "[", "}", " "];
        (0..self.below(4)).map(|_| self.choose(&PIECES)).collect()
    }

    /// A text of JSON, nested up to `depth`.
    pub(crate) fn json(&mut self, depth: u64) -> Vec<u8> {
        let mut text = Vec::new();
        self.value(depth, &mut text);
        text
    }

    fn blank(&mut self, text: &mut Vec<u8>) {
        if self.below(6) == 0 {
            text.push(self.choose(b" \n\r\t"));
        }
    }

    fn value(&mut self, depth: u64, text: &mut Vec<u8>) {
        self.blank(text);
        match self.below(if depth > 0 { 7 } else { 4 }) {
            0 => text.extend_from_slice(self.choose(&["null", "true", "false"]).as_bytes()),
            1 => text.extend_from_slice(format!("\"{}\"", self.string()).as_bytes()),
            2 | 3 => loop {
                let number = self.decimal();
                if number.parse().is_ok_and(f64::is_finite) {
                    text.extend_from_slice(number.as_bytes());
                    break;
                }
            },
            4 | 5 => {
                text.push(b'[');
                for item in 0..self.below(4) {
                    if item > 0 {
                        text.push(b',');
                    }
                    self.value(depth - 1, text);
                }
                self.blank(text);
                text.push(b']');
            }
            _ => {
                text.push(b'{');
                for member in 0..self.below(4) {
                    if member > 0 {
                        text.push(b',');
                    }
                    self.blank(text);
                    text.extend_from_slice(format!("\"{}\"", self.string()).as_bytes());
                    self.blank(text);
                    text.push(b':');
                    self.value(depth - 1, text);
                }
                self.blank(text);
                text.push(b'}');
            }
        }
        self.blank(text);
    }

    /// Changes a text in one to three places.
    pub(crate) fn damage(&mut self, text: &mut Vec<u8>) {
        const PIECES: [&str; 22] = [
            "[", "]", "{", "}", ",", ":", "\"", "\\", "0", "1", "-", ".", "e", "E+", "null", "\\ud800", "\\u12",
            "\u{FEFF}", " ", "\0", "\n", "1e999",
        ];
        for _ in 0..1 + self.below(3) {
            let at = self.below(text.len() as u64 + 1) as usize;
            match self.below(4) {
                0 if at < text.len() => text[at] = self.next() as u8,
                1 => drop(text.splice(at..at, self.choose(&PIECES).bytes())),
                2 => text.truncate(at),
                _ => drop(text.drain(at..(at + 1 + self.below(3) as usize).min(text.len()))),
            }
        }
    }
}
