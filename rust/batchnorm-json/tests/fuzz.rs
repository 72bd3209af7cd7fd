//! Whatever the bytes are, reading them ends with a value or an error, and what is left of a request reads as before.

#![allow(clippy::panic, clippy::expect_used, reason = "a test may fail")]

use batchnorm_json::{Limits, Numbers, cut_data};
use serde_json::Value;

mod common;
use common::Random;

/// A request as the protocol has them.
fn request(random: &mut Random) -> Vec<u8> {
    let mut text = br#"{"inputs":[{"name":"x","#.to_vec();
    text.extend_from_slice(random.choose(&[r#""datatype":"FP32","#, r#""datatype":"FP64","#, ""]).as_bytes());
    text.extend_from_slice(br#""data":["#);
    let (rows, columns) = (random.below(3), random.below(4));
    for row in 0..rows {
        text.extend_from_slice(if row > 0 { b",[" } else { b"[" });
        for column in 0..columns {
            if column > 0 {
                text.push(b',');
            }
            text.extend_from_slice(random.decimal().as_bytes());
        }
        text.push(b']');
    }
    text.extend_from_slice(br#"],"shape":[2,2]}],"parameters":"#);
    text.extend(random.json(3));
    text.push(b'}');
    text
}

fn numbers(value: &Value, found: &mut Vec<f64>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| numbers(item, found)),
        Value::Null => found.push(f64::NAN),
        number => found.push(number.as_f64().expect("a number")),
    }
}

fn fuzz(count: u64) {
    let mut random = Random::new(count);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..count {
        let mut text = request(&mut random);
        for _ in 0..random.below(3) {
            random.damage(&mut text);
        }
        let Ok(cut) = cut_data(&text, Limits { depth: 20, numbers: 100 }) else {
            refused += 1;
            continue;
        };
        taken += 1;
        // The oracle agrees, wherever it takes the text: it knows no tokens, and has a range for integers too.
        let Ok(whole) = serde_json::from_slice::<Value>(&text) else { continue };
        let head: Value = serde_json::from_slice(&cut.head).expect("the head is JSON");
        let Some(place) = head["inputs"][0]["data"][0].as_u64().filter(|_| whole["inputs"][0]["data"].is_array())
        else {
            continue;
        };
        let mut wanted = Vec::new();
        numbers(&whole["inputs"][0]["data"], &mut wanted);
        let same = match &cut.arrays[place as usize].numbers {
            Numbers::F64(values) => values.iter().map(|value| value.to_bits()).eq(wanted.iter().map(|v| v.to_bits())),
            Numbers::F32(values) => {
                values.iter().map(|value| value.to_bits()).eq(wanted.iter().map(|&v| (v as f32).to_bits()))
            }
        };
        assert!(same, "{}", String::from_utf8_lossy(&text));
    }
    println!("{count} inputs: {taken} taken, {refused} refused");
    assert_eq!(taken + refused, count);
    assert!(taken > count / 5 && refused > count / 5, "{taken} taken, {refused} refused");
}

#[test]
fn damaged_requests() {
    fuzz(20_000);
}

#[test]
#[ignore = "takes a minute: make test-all"]
fn many_damaged_requests() {
    fuzz(3_000_000);
}
