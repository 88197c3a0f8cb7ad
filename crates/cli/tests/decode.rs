//! `qkv bench decode` from outside: what it prints, and what it refuses. Measured times never decide a test.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Small enough for a moment.
const SMALL: [&str; 6] = ["--shape", "2,4,80,32", "--kv-heads", "2", "--repeat", "1"];

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
    command.args(args).stdin(Stdio::null()).env_remove("RUST_BACKTRACE").output().expect("the program starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// The standard output of a run that succeeds and says nothing on standard error.
fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!((output.status.code(), err), (Some(0), ""), "{args:?}: {out}");
    out.to_owned()
}

fn decode(args: &[&str]) -> Vec<String> {
    ["bench", "decode"].iter().chain(args).map(ToString::to_string).collect()
}

fn json(args: &[&str]) -> Value {
    let args = decode(args);
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    args.push("--json");
    serde_json::from_str(&succeeds(&args)).expect("one JSON document")
}

fn assert_width(text: &str) {
    for line in text.lines() {
        assert!(line.chars().count() <= 100 && !line.contains('\u{1b}'), "{line}");
    }
}

#[test]
fn the_table_has_a_row_for_each_storage_and_fits() {
    let text = succeeds(&[&["bench", "decode"], &SMALL[..]].concat());
    assert_width(&text);
    for column in ["b,h,keys,d", "storage", "time", "tokens/s", "GB/s", "bandwidth", "of roofline"] {
        assert!(text.contains(column), "{column}: {text}");
    }
    let rows: Vec<&str> = text.lines().filter(|line| line.trim_start().starts_with("2,4/2,80,32")).collect();
    assert_eq!(rows.len(), 4, "{text}");
    for (row, storage) in rows.iter().zip(["f32", "bf16", "f16", "int8"]) {
        assert!(row.split_whitespace().nth(1) == Some(storage) && row.ends_with('%'), "{row}");
    }
    assert!(text.contains("another copy of the cache") && text.contains("four times the L3 cache"), "{text}");
    // Sizes that are too wide for their column wrap, and lines stay short.
    let wide = ["bench", "decode", "--shape", "1,1000,1000,2", "--storage", "f32", "--repeat", "1"];
    assert_width(&succeeds(&wide));
}

#[test]
fn json_has_the_fields() {
    let document = json(&[&SMALL[..], &["--queries", "3", "--threads", "2"]].concat());
    assert_eq!(document["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&document["threads"], &document["rounds"]), (&Value::from(2), &Value::from(1)));
    assert!(document["isa"].is_string() && document["l3"].is_u64(), "{document}");
    let rows = document["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    // Rows of a key and a value; int8 has a scale beside each.
    for (row, (storage, row_bytes)) in
        rows.iter().zip([("f32", 256), ("bf16", 128), ("f16", 128), ("int8", 72)])
    {
        assert_eq!((&row["storage"], &row["page_size"]), (&Value::from(storage), &Value::Null));
        assert_eq!(row["bytes"], 2 * 2 * 80 * row_bytes, "{row}");
        // Rows see 78, 79 and 80 keys.
        assert_eq!(row["flops"], f64::from(2 * 4 * (78 + 79 + 80) * 2 * 64), "{row}");
        for (size, expected) in [
            ("batch", 2),
            ("query_heads", 4),
            ("kv_heads", 2),
            ("query_len", 3),
            ("key_len", 80),
            ("key_dim", 32),
            ("value_dim", 32),
        ] {
            assert_eq!(row["shape"][size], expected, "{row}");
        }
        let number = |field: &str| row[field].as_f64().unwrap_or(f64::NAN);
        for field in [
            "copies",
            "seconds",
            "tokens_per_second",
            "gbytes_per_second",
            "bandwidth_gbytes_per_second",
            "peak_gflops",
            "percent_of_roofline",
        ] {
            assert!(number(field) > 0.0, "{field}: {row}");
        }
        // One round, so the medians are of one measurement and fit each other.
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9 * b;
        assert!(close(number("tokens_per_second"), 6.0 / number("seconds")), "{row}");
        assert!(close(number("gbytes_per_second"), number("bytes") / number("seconds") / 1e9), "{row}");
        let roofline = (number("bytes") / number("bandwidth_gbytes_per_second"))
            .max(number("flops") / number("peak_gflops"));
        assert!(close(number("percent_of_roofline"), roofline / number("seconds") / 1e7), "{row}");
        assert!(
            number("copies") * number("bytes") >= 4.0 * document["l3"].as_f64().unwrap_or(0.0).min(2.5e8)
        );
    }
}

#[test]
fn storage_and_shapes_can_be_chosen() {
    let args = ["--shape", "1,2,20,8", "--shape", "2,2,9,4", "--storage", "int8,f16", "--repeat", "2"];
    let document = json(&args);
    let rows = document["rows"].as_array().expect("rows");
    let found: Vec<_> =
        rows.iter().map(|row| (row["shape"]["key_len"].as_u64(), row["storage"].as_str())).collect();
    let (int8, f16) = (Some("int8"), Some("f16"));
    assert_eq!(found, [(Some(20), int8), (Some(20), f16), (Some(9), int8), (Some(9), f16)]);
    assert_eq!(document["rounds"], 2);
}

#[test]
fn without_a_shape_the_first_is_also_paged() {
    let document = json(&["--quick", "--repeat", "1"]);
    let rows = document["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 13);
    let paged: Vec<usize> = (0..13).filter(|&row| rows[row]["page_size"] == 16).collect();
    assert_eq!(paged, [4]);
    assert_eq!((&rows[4]["storage"], &rows[4]["shape"]), (&Value::from("f32"), &rows[0]["shape"]));
    let keys = |row: usize| rows[row]["shape"]["key_len"].as_u64();
    assert_eq!([keys(0), keys(5), keys(9)], [Some(2048), Some(256), Some(1024)]);
}

#[test]
fn bad_arguments_are_refused_in_one_line() {
    for (args, because) in [
        (&["--shape", "1,2,3"][..], "3 numbers, expected 4"),
        (&["--shape", "1,2,x,4"], "length is \"x\""),
        (&["--shape", "0,2,16,8"], "batch is 0, expected at least 1"),
        (&["--shape", "1,0,16,8"], "heads is 0, expected at least 1"),
        (&["--shape", "1,2,0,8"], "--shape 1,2,0,8: keys is 0, expected at least 1"),
        (&["--shape", "1,2,16,0"], "head dim is 0, expected at least 1"),
        (&["--shape", "1,4,16,8", "--kv-heads", "0"], "--kv-heads is 0, expected at least 1"),
        (&["--shape", "1,4,16,8", "--kv-heads", "3"], "4 heads, expected a multiple of the 3"),
        // Refused before anything is measured, whichever shape it is.
        (&["--shape", "1,4,16,8", "--shape", "1,3,16,8", "--kv-heads", "2"], "--shape 1,3,16,8: 3 heads"),
        (&["--shape", "1,1,99999999999,64"], "of memory"),
        (&["--shape", "1,1,1,99999999999"], "of memory"),
        (&["--shape", "99999999999,99999999999,99999999999,99999999999"], "of memory"),
        (&["--shape", "1,1,18446744073709551615,1"], "of memory"),
        (&["--kv-heads", "2"], "--shape"),
        (&["--queries", "0"], "expected a number from 1 to 4096"),
        (&["--shape", "1,2,4,8", "--queries", "5"], "--queries 5, expected at most the 4 keys"),
        (&["--storage", "f64"], "f64"),
        (&["--storage", ""], "--storage"),
        (&["--repeat", "0"], "expected a number from 1 to 10000"),
        (&["--causal"], "--causal"),
        (&["more"], "more"),
    ] {
        let args = decode(args);
        let output = run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!((output.status.code(), out), (Some(2), ""), "{args:?}: {err}");
        assert!(err.starts_with("error: ") && err.lines().count() == 1, "{args:?}: {err}");
        assert!(err.contains(because) && !err.contains("panicked"), "{args:?}: \"{because}\" not in {err}");
    }
}

#[test]
fn common_options_may_come_first_and_others_may_not() {
    let args = ["bench", "--json", "decode", "--shape", "1,1,8,4", "--storage", "f32", "--repeat", "1"];
    assert!(serde_json::from_str::<Value>(&succeeds(&args)).is_ok());
    // Options of `bench` would be lost.
    let output = run(&["bench", "--quick", "decode"]);
    let err = text(&output.stderr);
    assert_eq!((output.status.code(), err.lines().count()), (Some(2), 1));
    assert!(err.contains("come after decode"), "{err}");
}

#[test]
fn help_explains_it() {
    assert!(succeeds(&["--help"]).contains("qkv bench decode"));
    assert!(succeeds(&["bench", "--help"]).contains("decode"));
    for flag in ["-h", "--help"] {
        let help = succeeds(&["bench", "decode", flag]);
        assert_width(&help);
        assert!(help.contains("Examples:\n  qkv bench decode"), "{help}");
        for option in
            ["--shape", "--kv-heads", "--storage", "--queries", "--repeat", "--quick", "--json", "--threads"]
        {
            assert!(help.contains(option), "{option}: {help}");
        }
    }
    let help = succeeds(&["bench", "decode", "--help"]).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        help.contains("each step reads another copy") && help.contains("four times the L3 cache"),
        "{help}"
    );
    assert!(help.matches("Example: ").count() >= 9, "{help}");
}
