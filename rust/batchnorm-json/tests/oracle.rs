//! Reading and printing beside the standard library and `serde_json`, on seeded random texts.

#![allow(clippy::panic, clippy::expect_used, reason = "a test may fail")]

use batchnorm_json::{Array, Build, Error, Limits, NonFinite, Numbers, Scalar, cut_data, parse, put_data};
use serde_json::{Map, Value, json};

mod common;
use common::Random;

const LIMITS: Limits = Limits { depth: 100, numbers: 1 << 20 };

/// Makes `serde_json`'s values, which know no number that is not finite.
struct Values;

impl Build for Values {
    type Value = Value;
    type Error = Error;

    fn scalar(&mut self, scalar: Scalar<'_>) -> Result<Value, Error> {
        Ok(match scalar {
            Scalar::Null => Value::Null,
            Scalar::Boolean(value) => json!(value),
            Scalar::Integer(digits) => serde_json::from_str(digits).unwrap_or_else(|error| panic!("{digits}: {error}")),
            Scalar::Float(value) => json!(value),
            Scalar::String(text) => json!(text),
        })
    }
    fn array(&mut self) -> Result<Value, Error> {
        Ok(json!([]))
    }
    fn push(&mut self, array: &mut Value, item: Value) -> Result<(), Error> {
        array.as_array_mut().expect("an array").push(item);
        Ok(())
    }
    fn object(&mut self) -> Result<Value, Error> {
        Ok(Value::Object(Map::new()))
    }
    fn insert(&mut self, object: &mut Value, name: &str, value: Value) -> Result<(), Error> {
        object.as_object_mut().expect("an object").insert(name.to_owned(), value);
        Ok(())
    }
}

fn read(text: &[u8]) -> Result<Value, Error> {
    parse(text, 100, &mut Values)
}

/// Whether a text has a token that JSON itself does not know, or an integer that `serde_json` makes infinite.
fn beyond_the_oracle(text: &[u8]) -> bool {
    let has = |part: &[u8]| text.windows(part.len()).any(|window| window == part);
    has(b"NaN") || has(b"Infinity") || text.split(|byte| !byte.is_ascii_digit()).any(|digits| digits.len() > 300)
}

#[test]
fn random_values_are_read_as_by_the_oracle() {
    let mut random = Random::new(1);
    for _ in 0..20_000 {
        let text = random.json(4);
        let wanted: Value = serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        assert_eq!(read(&text), Ok(wanted), "{}", String::from_utf8_lossy(&text));
    }
}

#[test]
fn damaged_texts_are_refused_where_the_oracle_refuses() {
    let mut random = Random::new(2);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..100_000 {
        let mut text = random.json(3);
        random.damage(&mut text);
        if beyond_the_oracle(&text) {
            continue;
        }
        match (read(&text), serde_json::from_slice::<Value>(&text)) {
            (Ok(got), Ok(wanted)) => {
                assert_eq!(got, wanted, "{}", String::from_utf8_lossy(&text));
                taken += 1;
            }
            (Err(_), Err(_)) => refused += 1,
            (got, wanted) => panic!("{}: {got:?}, wanted {wanted:?}", String::from_utf8_lossy(&text)),
        }
    }
    assert!(taken > 10_000 && refused > 10_000, "{taken} were taken, {refused} refused");
}

#[test]
fn every_escaped_code_unit_and_the_ends_of_surrogate_pairs() {
    let mut taken = 0;
    let mut compare = |text: String| {
        let (got, wanted) = (read(text.as_bytes()), serde_json::from_str::<Value>(&text));
        assert_eq!(got.as_ref().ok(), wanted.as_ref().ok(), "{text}");
        taken += u32::from(got.is_ok());
    };
    for unit in 0..=0xFFFF_u32 {
        compare(format!(r#""a\u{unit:04x}b""#));
    }
    let ends = [0xD7FF, 0xD800, 0xD801, 0xDBFF, 0xDC00, 0xDC01, 0xDFFF, 0xE000];
    for high in ends {
        for low in ends {
            compare(format!(r#""\u{high:04X}\u{low:04X}""#));
        }
    }
    // All but the surrogates; of the pairs those of two characters, and those of a high one and a low one.
    assert_eq!(taken, 0x1_0000 - 0x800 + 4 + 9);
}

/// The one `data` array of an input with this datatype.
fn data(numbers: &[u8], datatype: &str) -> Result<Array, Error> {
    let text = [br#"{"inputs":[{"datatype":""#, datatype.as_bytes(), br#"","data":"#, numbers, b"}]}"].concat();
    cut_data(&text, LIMITS).map(|request| {
        let [array] = <[Array; 1]>::try_from(request.arrays).expect("one array");
        array
    })
}

#[test]
fn numbers_have_the_bits_of_the_standard_library() {
    let mut random = Random::new(3);
    for _ in 0..3_000 {
        let texts: Vec<String> = (0..100).map(|_| random.decimal()).collect();
        let list = format!("[{}]", texts.join(","));
        let wide: Vec<f64> = texts.iter().map(|text| text.parse().expect("a number")).collect();
        let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        if wide.iter().all(|value| value.is_finite()) {
            let Ok(Array { numbers: Numbers::F64(got), shape }) = data(list.as_bytes(), "FP64") else {
                panic!("{list} is not taken as FP64");
            };
            assert_eq!(shape, [100]);
            assert!(bits(&got) == bits(&wide), "{list}");
        } else {
            assert_eq!(data(list.as_bytes(), "FP64"), Err(Error::OutOfRange("float64")));
        }
        let narrow: Vec<f32> = wide.iter().map(|&value| value as f32).collect();
        if narrow.iter().all(|value| value.is_finite()) {
            let Ok(Array { numbers: Numbers::F32(got), .. }) = data(list.as_bytes(), "FP32") else {
                panic!("{list} is not taken as FP32");
            };
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert!(bits(&got) == bits(&narrow), "{list}");
        } else {
            assert_eq!(data(list.as_bytes(), "FP32"), Err(Error::OutOfRange("FP32")));
        }
    }
}

#[test]
fn halves_between_neighbours_are_rounded_to_even() {
    let mut random = Random::new(4);
    for _ in 0..20_000 {
        // The midpoint of two float64 between 2^26 and 2^53, exactly: up to 27 binary places.
        let value = f64::from_bits((1023 + 26 + random.below(27)) << 52 | random.next() >> 12);
        let (below, above) = (value, f64::from_bits(value.to_bits() + 1));
        let half = format!("{:.60}", below).parse::<f64>().expect("a number");
        assert_eq!(half.to_bits(), below.to_bits());
        let digits = midpoint(below, above);
        let list = format!("[{digits},{digits}1,-{digits}]");
        let Ok(Array { numbers: Numbers::F64(got), .. }) = data(list.as_bytes(), "FP64") else {
            panic!("{list} is not taken");
        };
        let even = if below.to_bits() % 2 == 0 { below } else { above };
        assert_eq!(got, [even, above, -even], "{list}");
    }
}

/// The midpoint of two neighbours from 2^26 on, in decimal digits, at most 27 of them after the point.
fn midpoint(below: f64, above: f64) -> String {
    let places = 27;
    let scaled = |value: f64| (value * f64::from(1 << places)) as u128;
    let twice = scaled(below) + scaled(above); // over 2^(places + 1)
    let (whole, mut rest) = (twice >> (places + 1), twice & ((1 << (places + 1)) - 1));
    let mut text = format!("{whole}.");
    loop {
        rest *= 10;
        text.push(char::from(b'0' + (rest >> (places + 1)) as u8));
        rest &= (1 << (places + 1)) - 1;
        if rest == 0 {
            return text;
        }
    }
}

#[test]
fn printed_numbers_are_the_shortest_that_give_the_bits_back() {
    let mut random = Random::new(5);
    for _ in 0..3_000 {
        let wide: Vec<f64> = (0..100).map(|_| f64::from_bits(random.next())).filter(|v| v.is_finite()).collect();
        let text = put_data(b"", &wide, b"", NonFinite::Tokens).expect("memory");
        let read: Vec<f64> = serde_json::from_slice(&text).expect("numbers");
        assert!(read.iter().zip(&wide).all(|(read, value)| read.to_bits() == value.to_bits()));
        let narrow: Vec<f32> =
            (0..100).map(|_| f32::from_bits(random.next() as u32)).filter(|v| v.is_finite()).collect();
        let text = put_data(b"", &narrow, b"", NonFinite::Tokens).expect("memory");
        let read: Vec<f64> = serde_json::from_slice(&text).expect("numbers");
        assert_eq!(read.len(), narrow.len());
        assert!(read.iter().zip(&narrow).all(|(&read, value)| (read as f32).to_bits() == value.to_bits()));
        // The standard library's shortest texts have as many digits.
        let digits = |text: &str| {
            let mantissa = text.split(['e', 'E']).next().unwrap_or_default();
            mantissa.bytes().filter(u8::is_ascii_digit).map(char::from).collect::<String>().trim_matches('0').len()
        };
        let printed = String::from_utf8(text).expect("ASCII");
        for (number, value) in printed.trim_matches(['[', ']']).split(',').zip(&narrow) {
            assert_eq!(digits(number), digits(&format!("{value:e}")), "{number}");
        }
    }
}

#[test]
fn what_is_printed_around_and_in_place_of_numbers() {
    let values = [1.5_f32, f32::NAN, -f32::INFINITY, f32::INFINITY, -0.0];
    let print = |non_finite| put_data(b"before", &values, b"after", non_finite).expect("memory");
    assert_eq!(print(NonFinite::Tokens), b"before[1.5,NaN,-Infinity,Infinity,-0.0]after");
    assert_eq!(print(NonFinite::Null), b"before[1.5,null,null,null,-0.0]after");
    assert_eq!(put_data::<f64>(b"a", &[], b"b", NonFinite::Null).expect("memory"), b"a[]b");
    // By way of float64 its shortest text, 7.038531e-26, is read as a neighbour.
    let misread = f32::from_bits(0x15AE_43FD);
    let text = put_data(b"", &[misread, -misread], b"", NonFinite::Tokens).expect("memory");
    let read: Vec<f64> = serde_json::from_slice(&text).expect("numbers");
    assert_eq!(read.iter().map(|&read| read as f32).collect::<Vec<_>>(), [misread, -misread]);
}
