//! Requests: the arrays that are taken out of them, their types, and the errors of invalid ones.

#![allow(clippy::panic, clippy::expect_used, reason = "a test may fail")]

use batchnorm_json::{Array, Error, Limits, Numbers, Request, cut_data};

const LIMITS: Limits = Limits { depth: 100, numbers: 1000 };

fn cut(text: &str) -> Result<Request, Error> {
    cut_data(text.as_bytes(), LIMITS)
}

/// The `data` array of a request.
fn data(numbers: &str) -> Result<Array, Error> {
    cut(&format!(r#"{{"inputs":[{{"data":{numbers}}}]}}"#)).map(|request| request.arrays[0].clone())
}

fn reason(text: &str) -> String {
    cut(text).expect_err("an error is wanted").to_string()
}

#[track_caller]
fn assert_cut(text: &str, head: &str, arrays: &[&[f64]]) {
    let request = cut(text).expect("it is good");
    assert_eq!(String::from_utf8_lossy(&request.head), head);
    let found: Vec<_> = request.arrays.into_iter().map(|array| array.numbers).collect();
    let wanted: Vec<_> = arrays.iter().map(|numbers| Numbers::F64(numbers.to_vec())).collect();
    assert_eq!(found, wanted);
}

#[test]
fn arrays_are_cut_and_the_rest_stays() {
    let text = " {\"inputs\" : [ {\"data\" : [1 , 2] , \"a\":[3]} ]}\n";
    assert_cut(text, " {\"inputs\" : [ {\"data\" : [0] , \"a\":[3]} ]}\n", &[&[1.0, 2.0]]);
    // Names are compared as they read.
    assert_cut(r#"{"in\u0070uts":[{"d\u0061ta":[1]}]}"#, r#"{"in\u0070uts":[{"d\u0061ta":[0]}]}"#, &[&[1.0]]);
    // Two members of a name are both cut, and known by their numbers.
    let text = r#"{"inputs":[{"data":[1],"data":[2]}],"inputs":[{"data":[3]}]}"#;
    let head = r#"{"inputs":[{"data":[0],"data":[1]}],"inputs":[{"data":[2]}]}"#;
    assert_cut(text, head, &[&[1.0], &[2.0], &[3.0]]);
}

#[test]
fn nothing_is_cut_elsewhere() {
    for text in [
        r#"{"data":[1],"inputs":{"data":[2]}}"#,
        r#"{"inputs":[[{"data":[1]}],{"x":{"data":[2]}}],"outputs":[{"data":[3]}]}"#,
        r#"{"inputs":[{"data":"[1]"},{"data":null},{"data":1}]}"#,
        "[1]",
        r#""inputs""#,
    ] {
        assert_cut(text, text, &[]);
    }
}

#[test]
fn numbers_have_the_type_of_their_tensor() {
    let types = |members: &str| {
        let request = cut(&format!(r#"{{"inputs":[{{{members}}}]}}"#)).expect("it is good");
        request.arrays.into_iter().map(|array| array.numbers).collect::<Vec<_>>()
    };
    assert_eq!(types(r#""datatype":"FP32","data":[0.1]"#), [Numbers::F32(vec![0.1])]);
    assert_eq!(types(r#""data":[0.1],"datatype":"FP32""#), [Numbers::F32(vec![0.1])]);
    for members in [
        r#""data":[0.1]"#,
        r#""datatype":"FP64","data":[0.1]"#,
        r#""datatype":32,"data":[0.1]"#,
        r#""data":[0.1],"datatype":"FP64""#,
        // The last counts.
        r#""datatype":"FP32","data":[0.1],"datatype":"FP64""#,
        r#""datatype":"FP32","data":[0.1],"datatype":null"#,
    ] {
        assert_eq!(types(members), [Numbers::F64(vec![0.1])], "{members}");
    }
    assert_eq!(
        types(r#""data":[0.1],"datatype":"FP32","data":[0.1]"#),
        [Numbers::F32(vec![0.1]), Numbers::F32(vec![0.1])]
    );
    // The datatype of each object applies to its own array.
    let text = r#"{"inputs":[{"datatype":"FP32"},{"data":[0.1]}]}"#;
    assert_eq!(cut(text).expect("it is good").arrays[0].numbers, Numbers::F64(vec![0.1]));
}

#[test]
fn a_number_beyond_the_range_is_refused() {
    let largest = Numbers::F64(vec![1e308, -0.0, 5e-324]);
    assert_eq!(data("[1e308,-1e-400,5e-324]").expect("they are in range").numbers, largest);
    let infinite = Numbers::F64(vec![f64::INFINITY, f64::NEG_INFINITY]);
    assert_eq!(data("[Infinity,-Infinity]").expect("they are tokens").numbers, infinite);
    for number in ["1e309", "-1e309", &("1".to_owned() + &"0".repeat(400)), &"1".repeat(5000)] {
        assert_eq!(data(&format!("[0,{number}]")), Err(Error::OutOfRange("float64")), "{number}");
    }
    for (before, after) in [(r#""datatype":"FP32","#, ""), ("", r#","datatype":"FP32""#)] {
        let single = |number: &str| cut(&format!(r#"{{"inputs":[{{{before}"data":[{number}]{after}}}]}}"#));
        // The last float64 that rounds to the largest float32, and the next.
        let largest = single("3.4028235677973362e38").expect("it is in range").arrays[0].numbers.clone();
        assert_eq!(largest, Numbers::F32(vec![f32::MAX]));
        assert_eq!(single("3.4028235677973366e38"), Err(Error::OutOfRange("FP32")));
        let infinite = single("-Infinity").expect("it is a token").arrays[0].numbers.clone();
        assert_eq!(infinite, Numbers::F32(vec![f32::NEG_INFINITY]));
    }
}

#[test]
fn nested_arrays_have_a_shape() {
    let shape = |numbers| data(numbers).expect("it is good").shape;
    assert_eq!(shape("[]"), [0]);
    assert_eq!(shape("[[1,2,3]]"), [1, 3]);
    assert_eq!(shape("[[],[]]"), [2, 0]);
    assert_eq!(shape("[ [ [ 1 ] , [ null ] ] ]"), [1, 2, 1]);
    assert_eq!(shape(&("[".repeat(64) + &"]".repeat(64))).len(), 64);
    let deep = "[".repeat(65) + &"]".repeat(65);
    for ragged in "[1,[2]] [[1],2] [[],2] [[1,2],[3]] [[],[3]] [[[1]],[2]] [[],[[]]] [[1],[[]]] [[[]],[1]]"
        .split(' ')
        .chain([deep.as_str()])
    {
        assert_eq!(data(ragged), Err(Error::Ragged), "{ragged}");
    }
}

#[test]
fn other_items_than_numbers_are_named() {
    for (item, found) in
        [("\"1\"", "a string"), ("{}", "an object"), ("true", "true or false"), ("false", "true or false")]
    {
        assert_eq!(data(&format!("[1,{item}]")), Err(Error::NotANumber(found)));
    }
}

#[test]
fn malformed_texts_say_what_is_wrong_and_where() {
    let bad = "[1 [1, [1,] [,1] [01] [+1] [.5] [1.] [1e] [1e+] [0x1] [1_0] [nan] [inf] [-NaN] [Infinit] [--1] [-] [nul] \
               [1]] [[1] [1} [\0";
    for numbers in bad.split(' ').chain(["[1 2]", "[\u{1}1]", "[\u{FEFF}1]"]) {
        assert!(matches!(data(numbers), Err(Error::Malformed { .. })), "{numbers}: {:?}", data(numbers));
    }
    let prefix = "the JSON of the request is malformed: ";
    for (text, wanted) in [
        ("", "a value is expected, at line 1 column 1"),
        ("hello", "a value is expected, at line 1 column 1"),
        ("{\"inputs\":[", "a value is expected, at line 1 column 12"),
        ("{\n \"a\" 1}", "':' is expected, at line 2 column 6"),
        ("{a:1}", "a name in quotes is expected, at line 1 column 2"),
        ("{\"a\":1,}", "a name in quotes is expected, at line 1 column 8"),
        ("{\"a\":1]", "',' or '}' is expected, at line 1 column 7"),
        ("[1}", "',' or ']' is expected, at line 1 column 3"),
        ("{} {}", "something follows the end of it, at line 1 column 4"),
        ("[\"a", "a string does not end, at line 1 column 4"),
        ("[\"a\\", "a string does not end, at line 1 column 5"),
        ("[\"a\nb\"]", "a control character stands in a string, at line 1 column 4"),
        ("[\"\\x\"]", "an escape in a string stands for no character, at line 1 column 3"),
        ("[\"a\\ud800\"]", "an escape in a string stands for no character, at line 1 column 4"),
        ("[\"\\udc00\\ud800\"]", "an escape in a string stands for no character, at line 1 column 3"),
        ("[\"\\u+123\"]", "an escape in a string stands for no character, at line 1 column 3"),
        ("[1.]", "a number breaks off, at line 1 column 4"),
        ("[01]", "a number breaks off, at line 1 column 3"),
        ("[1e400]", "a number is beyond the range of float64, at line 1 column 2"),
        (&format!("[{}]", "1".repeat(4301)), "an integer has more than 4300 digits, at line 1 column 2"),
    ] {
        assert_eq!(reason(text), format!("{prefix}{wanted}"), "{text}");
    }
    let not_utf8 = cut_data(b"{\"inputs\":\"a\xFF\"}", LIMITS).expect_err("it is not UTF-8");
    assert_eq!(not_utf8.to_string(), format!("{prefix}a string is not UTF-8, at line 1 column 13"));
}

#[test]
fn a_byte_order_mark_is_named() {
    let wanted = "the JSON begins with a byte-order mark (EF BB BF); send UTF-8 without it";
    assert_eq!(reason("\u{FEFF}{}"), wanted);
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
    assert!(cut(&nested(99)).is_ok());
    assert_eq!(cut(&nested(100)), Err(Error::TooDeep(100)));
    assert_eq!(cut(&"[".repeat(1_000_000)), Err(Error::TooDeep(100)));
    assert_eq!(cut(&"{\"a\":".repeat(101)), Err(Error::TooDeep(100)));
    // Depth is given back.
    assert!(cut(&format!("[{}[]]", "[[]],".repeat(1000))).is_ok());
    // The largest limit is within a thread's stack.
    let deepest = "[".repeat(255) + &"]".repeat(255);
    assert!(cut_data(deepest.as_bytes(), Limits { depth: 255, numbers: 0 }).is_ok());
}

#[test]
fn numbers_and_arrays_are_bounded() {
    let limited = |text: &str| cut_data(text.as_bytes(), Limits { depth: 100, numbers: 3 });
    assert!(limited(r#"{"inputs":[{"data":[1,2,3]}]}"#).is_ok());
    for text in [
        r#"{"inputs":[{"data":[1,2,3,4]}]}"#,
        r#"{"inputs":[{"data":[[1,2],[3,4]]}]}"#,
        r#"{"inputs":[{"data":[1,2,3,4"#,
        r#"{"inputs":[{"data":[1,2]},{"data":[1,2]}]}"#,
    ] {
        assert_eq!(limited(text), Err(Error::TooManyNumbers), "{text}");
    }
    let many = |count: usize| format!(r#"{{"inputs":[{}{{}}]}}"#, r#"{"data":[]},"#.repeat(count));
    assert!(cut(&many(64)).is_ok());
    assert_eq!(cut(&many(65)), Err(Error::TooManyArrays(64)));
}
