//! The program from outside: exit codes, what goes to which stream, and the shape of what it prints.
//!
//! Measured times appear in the output but never decide a test. Inputs are small, or the built-in ones with --quick.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use qkv::simd::{Isa, IsaKind};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

const SUBCOMMANDS: [&str; 4] = ["info", "bench", "compare", "walkthrough"];
/// Small enough for a moment, large enough for two threads.
const SMALL: &str = "1,2,96,16";

fn qkv(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
    command.args(args).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
    command
}

fn run(args: &[&str]) -> Output {
    qkv(args).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// A run that succeeds and says nothing on standard error; its standard output.
fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{args:?}: {out}{err}");
    // Neither progress nor diagnostics: the stream is no terminal, and all went well.
    assert_eq!(err, "", "{args:?}");
    out.to_owned()
}

/// A comparison that fails; what it says on both streams.
fn fails(args: &[&str]) -> (String, String) {
    let output = run(args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{args:?}: {out}{err}");
    (out.to_owned(), err.to_owned())
}

/// A run that is refused: exit code 2, nothing on standard output, one line on standard error that contains `because`.
fn refused(command: &mut Command, because: &[&str]) {
    let output = command.output().expect("the program starts");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{command:?}: {out}{err}");
    assert_eq!(out, "", "{command:?}");
    assert!(
        err.starts_with("error: ") && err.ends_with('\n') && err.lines().count() == 1,
        "{command:?}: {err}"
    );
    for because in because {
        assert!(err.contains(because), "{command:?}: \"{because}\" is not in {err}");
    }
    assert!(!err.contains("panicked") && !err.contains("backtrace"), "{command:?}: {err}");
}

fn json(args: &[&str]) -> Value {
    let mut args = args.to_vec();
    args.push("--json");
    serde_json::from_str(&succeeds(&args)).expect("one JSON document")
}

fn assert_width(text: &str, of: &[&str]) {
    for line in text.lines() {
        assert!(line.chars().count() <= 100, "{of:?}: {line}");
        assert!(!line.contains('\u{1b}'), "{of:?}: colours although no terminal: {line}");
    }
}

/// A file that is gone after the test.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("qkv-cli-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).expect("the directory for temporary files takes files");
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("UTF-8")
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The bytes of a safetensors file; values are small and differ.
fn safetensors(tensors: &[(&str, Dtype, &[usize])]) -> Vec<u8> {
    let values: Vec<u8> = (0..4096u16).flat_map(|i| (f32::from(i % 97) / 97.0 - 0.5).to_le_bytes()).collect();
    let views: HashMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|&(name, dtype, shape)| {
            let bytes = dtype.bitsize() / 8 * shape.iter().product::<usize>();
            (name, TensorView::new(dtype, shape.to_vec(), &values[..bytes]).expect("a valid tensor"))
        })
        .collect();
    safetensors::serialize(views, None).expect("a valid file")
}

#[test]
fn help_explains_everything_with_examples() {
    let root = succeeds(&["--help"]);
    for subcommand in SUBCOMMANDS {
        assert!(root.contains(subcommand), "{root}");
        for flag in ["--help", "-h"] {
            let help = succeeds(&[subcommand, flag]);
            assert!(help.contains("Examples:\n  qkv "), "{help}");
            assert!(
                help.contains("--json") && help.contains("--threads") && help.contains("--isa"),
                "{help}"
            );
            assert_width(&help, &[subcommand, flag]);
        }
        assert!(succeeds(&[subcommand, "--help"]).contains("Example: "));
    }
    assert_width(&root, &["--help"]);
    assert!(succeeds(&["--version"]).starts_with("qkv "));
}

#[test]
fn bad_command_lines_are_refused_in_one_line() {
    for (args, because) in [
        (&["nonsense"][..], "nonsense"),
        (&["--nonsense"], "--nonsense"),
        (&["compare", "--shape"], "--shape"),
        (&["compare", "--shape", "1,2,3"], "3 numbers, expected 4"),
        (&["compare", "--shape", "1,2,x,4"], "length is \"x\""),
        (&["compare", "--shape", "1,-2,3,4"], "heads is \"-2\""),
        (&["compare", "--kv-heads", "2"], "--shape"),
        (&["compare", "--prefix", "layer0"], "--input"),
        (&["compare", "--shape", SMALL, "--input", "x"], "cannot be used with"),
        (&["compare", "--repeat", "0"], "expected a number from 1 to 10000"),
        (&["bench", "--threads", "0"], "expected a number from 1 to 4096"),
        (&["bench", "--threads", "many"], "expected a number from 1 to 4096"),
        (&["bench", "--isa", "mmx"], "unknown instruction set \"mmx\""),
        (&["walkthrough", "--dim", "3"], "expected a number from 4 to 8"),
        (&["walkthrough", "--sentence", " "], "0 words, expected 1 to 12"),
        (&["walkthrough", "--sentence", "a b c d e f g h i j k l m"], "13 words, expected 1 to 12"),
    ] {
        refused(&mut qkv(args), &[because]);
    }
}

#[test]
fn shapes_that_do_not_work_are_refused() {
    for subcommand in ["compare", "bench"] {
        for (shape, kv_heads, because) in [
            ("0,1,1,1", None, "--shape 0,1,1,1: batch is 0, expected at least 1"),
            ("1,2,0,8", None, "--shape 1,2,0,8: length is 0, expected at least 1"),
            ("1,0,16,8", None, "heads is 0"),
            ("1,2,16,0", None, "head dim is 0"),
            ("1,4,16,8", Some("0"), "heads is 0"),
            ("1,4,16,8", Some("3"), "4 heads, expected a multiple of the 3"),
            ("1,4,16,8", Some("8"), "4 heads, expected a multiple of the 8"),
            // More than any machine has: refused before anything is allocated.
            ("1,1,99999999999,64", None, "of memory"),
            ("1,1,1,99999999999", None, "of memory"),
            ("99999999999,99999999999,99999999999,99999999999", None, "of memory"),
            ("1152921504606846976,1,1,64", None, "of memory"),
            ("1,1,18446744073709551615,1", None, "of memory"),
        ] {
            let mut command = qkv(&[subcommand, "--shape", shape]);
            if let Some(kv_heads) = kv_heads {
                command.args(["--kv-heads", kv_heads]);
            }
            refused(&mut command, &[because]);
        }
    }
    // The tensors would fit any machine, the naive reference's scores fit none.
    refused(&mut qkv(&["compare", "--shape", "1,1,9999999,1"]), &["the comparison needs", "of memory"]);
}

#[test]
fn files_that_do_not_work_are_refused() {
    let shape: &[usize] = &[2, 24, 8];
    let (f32, f16) = (Dtype::F32, Dtype::F16);
    let whole = safetensors(&[("q", f32, shape), ("k", f32, shape), ("v", f32, shape)]);
    for (name, bytes, because) in [
        ("empty", vec![], &["not a complete safetensors file"][..]),
        ("short", whole[..whole.len() - 5].to_vec(), &["not a complete safetensors file"]),
        ("header", whole[..40].to_vec(), &["not a complete safetensors file"]),
        ("text", b"query, key, value\n".repeat(100), &["not a complete safetensors file"]),
        (
            "dtype",
            safetensors(&[("q", f32, shape), ("k", f16, shape), ("v", f32, shape)]),
            &["tensor k has dtype F16, expected F32"],
        ),
        (
            "rank",
            safetensors(&[("q", f32, shape), ("k", f32, shape), ("v", f32, &[24, 8])]),
            &["tensor v has rank 2 (shape [24, 8]), expected 4"],
        ),
        ("missing", safetensors(&[("a.q", f32, shape), ("a.k", f32, shape)]), &["tensor a.v is missing"]),
        ("names", safetensors(&[("query", f32, shape)]), &["found tensors query, expected q, k and v"]),
        (
            "heads",
            safetensors(&[("q", f32, &[3, 24, 8]), ("k", f32, shape), ("v", f32, shape)]),
            &["3 heads, expected a multiple of the 2"],
        ),
        (
            "dim",
            safetensors(&[("q", f32, shape), ("k", f32, &[2, 24, 6]), ("v", f32, shape)]),
            &["key: head dim is 6, expected 8"],
        ),
        (
            "length",
            safetensors(&[("q", f32, shape), ("k", f32, shape), ("v", f32, &[2, 23, 8])]),
            &["value: length is 23, expected 24"],
        ),
        (
            "nothing",
            safetensors(&[("q", f32, shape), ("k", f32, &[2, 0, 8]), ("v", f32, &[2, 0, 8])]),
            &["tensor k has shape [2, 0, 8], expected sizes of at least 1"],
        ),
    ] {
        let file = TempFile::new(name, &bytes);
        refused(&mut qkv(&["compare", "--input", file.path()]), because);
    }
    refused(&mut qkv(&["compare", "--input", "/no/such/file"]), &["cannot read /no/such/file"]);
    let directory = std::env::temp_dir();
    refused(&mut qkv(&["compare", "--input", directory.to_str().expect("UTF-8")]), &["cannot read"]);
    let file = TempFile::new("prefix", &whole);
    refused(&mut qkv(&["compare", "--input", file.path(), "--prefix", "b"]), &["expected b.q, b.k and b.v"]);
}

#[test]
fn instruction_sets_that_are_not_there_are_refused() {
    let missing = IsaKind::ALL.into_iter().filter(|&kind| Isa::with_kind(kind).is_err());
    for kind in missing {
        for subcommand in SUBCOMMANDS {
            refused(qkv(&[subcommand]).env("QKV_ISA", kind.name()), &["instruction set", kind.name()]);
            refused(&mut qkv(&[subcommand, "--isa", kind.name()]), &["instruction set", kind.name()]);
        }
    }
    refused(qkv(&["walkthrough"]).env("QKV_ISA", "sse9"), &["unknown instruction set \"sse9\""]);
}

#[test]
fn instruction_sets_can_be_chosen() {
    for isa in Isa::available() {
        let name = isa.kind().name();
        let by_option = json(&["bench", "--shape", SMALL, "--repeat", "1", "--isa", name]);
        assert_eq!(by_option["isa"], name);
        let output =
            qkv(&["bench", "--shape", SMALL, "--repeat", "1", "--json"]).env("QKV_ISA", name).output();
        let by_environment: Value = serde_json::from_slice(&output.expect("starts").stdout).expect("JSON");
        assert_eq!(by_environment["isa"], name);
    }
    // The option has the last word, whatever the environment says.
    let output = qkv(&["walkthrough", "--isa", "portable"]).env("QKV_ISA", "sse9").output().expect("starts");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn info_has_its_fields() {
    let info = json(&["info", "--threads", "1"]);
    assert_eq!(info["threads"], 1);
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert!(
        info["isa"]["available"].as_array().is_some_and(|all| all.contains(&info["isa"]["active"])),
        "{info}"
    );
    for cache in ["l1d", "l2", "l3"] {
        assert!(info["caches"][cache].is_u64(), "{info}");
    }
    for rate in ["peak_gflops", "peak_gflops_one_thread", "read_gbytes_per_second"] {
        assert!(info["measured"][rate].as_f64().is_some_and(|rate| rate > 0.0), "{rate}: {info}");
    }
    let text = succeeds(&["info"]);
    assert_width(&text, &["info"]);
    assert!(text.contains("FMA peak") && text.contains("instruction sets"), "{text}");
}

#[test]
fn bench_has_its_rows() {
    let args = ["bench", "--shape", SMALL, "--shape", "2,4,40,8", "--kv-heads", "2", "--repeat", "1"];
    let bench = json(&args);
    let rows = bench["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    for row in rows {
        for field in ["seconds", "gflops", "peak_gflops", "percent_of_peak"] {
            assert!(row[field].as_f64().is_some_and(|x| x > 0.0), "{field}: {row}");
        }
        assert_eq!(row["shape"]["kv_heads"], 2);
    }
    assert_width(&succeeds(&args), &args);
    let causal = json(&["bench", "--shape", SMALL, "--causal", "--repeat", "1", "--threads", "2"]);
    assert_eq!(causal["threads"], 2);
    assert_eq!(causal["rows"].as_array().map(Vec::len), Some(1));
    assert_eq!(causal["rows"][0]["causal"], true);
}

#[test]
fn compare_on_random_input_passes() {
    let args = ["compare", "--shape", SMALL, "--shape", "1,4,50,24", "--kv-heads", "2", "--repeat", "1"];
    let compare = json(&args);
    assert_eq!(compare["passed"], true);
    let rows = compare["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    for row in rows {
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        assert!(number(&row["naive_seconds"]) > 0.0 && number(&row["qkv"]["seconds"]) > 0.0, "{row}");
        assert!(number(&row["ratio"]) > 0.0 && number(&row["qkv"]["percent_of_peak"]) > 0.0, "{row}");
        assert!(number(&row["error"]["max"]) <= number(&row["tolerance"]), "{row}");
        assert!(number(&row["error"]["rms"]) <= number(&row["error"]["max"]), "{row}");
        assert!(number(&row["naive_error"]["max"]) > 0.0, "{row}");
        // The naive reference holds at least its square of scores.
        let length = number(&row["shape"]["query_len"]);
        assert!(number(&row["memory"]["naive"]) >= 4.0 * length * length, "{row}");
        assert!(row["memory"]["qkv"].is_u64() && row["memory"]["qkv_again"].is_u64(), "{row}");
    }
    assert_width(&succeeds(&args), &args);
}

#[test]
fn compare_on_the_real_input_passes_and_knows_the_stored_output() {
    let args = ["compare", "--quick", "--repeat", "1"];
    let compare = json(&args);
    assert_eq!(compare["passed"], true);
    let rows = compare["rows"].as_array().expect("rows");
    let found: Vec<_> = rows.iter().map(|row| (row["name"].as_str(), row["causal"].as_bool())).collect();
    let (first, last) = (Some("layer 0"), Some("layer 5"));
    assert_eq!(found, [(first, Some(false)), (first, Some(true)), (last, Some(false)), (last, Some(true))]);
    for row in rows {
        let stored = &row["stored"];
        assert_eq!(stored.is_null(), row["causal"] == true, "{row}");
        if !stored.is_null() {
            // testdata/README.md: 4.7e-6 and 1.0e-6.
            assert!(stored["error"]["max"].as_f64().is_some_and(|max| max > 0.0 && max < 1e-5), "{row}");
            assert!(stored["max_difference_to_qkv"].as_f64().is_some_and(|max| max < 2e-5), "{row}");
        }
    }
    let text = succeeds(&args);
    assert_width(&text, &args);
    assert!(text.contains("transformers") && text.contains("verdict"), "{text}");
}

#[test]
fn compare_takes_the_users_tensors() {
    let f32 = Dtype::F32;
    let bytes = safetensors(&[
        ("q", f32, &[4, 10, 8]),
        ("k", f32, &[2, 24, 8]),
        ("v", f32, &[2, 24, 6]),
        ("net.1.q", f32, &[2, 1, 17, 8]),
        ("net.1.k", f32, &[2, 1, 17, 8]),
        ("net.1.v", f32, &[2, 1, 17, 8]),
        ("net.1.out", f32, &[2, 1, 17, 8]),
    ]);
    let file = TempFile::new("good", &bytes);
    let (both, err) = fails(&["compare", "--input", file.path(), "--repeat", "1", "--json"]);
    let both: Value = serde_json::from_str(&both).expect("one JSON document");
    let rows = both["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[0]["shape"]["query_heads"], 4);
    assert_eq!(rows[0]["shape"]["value_dim"], 6);
    assert_eq!(rows[2]["name"], "net.1");
    // The stored output here is nonsense, nothing else is wrong.
    assert!(rows[2]["stored"]["max_difference_to_qkv"].as_f64().is_some_and(|x| x > 0.0));
    assert_eq!((&both["passed"], &rows[2]["stored"]["passed"]), (&Value::from(false), &Value::from(false)));
    let passed: Vec<_> = rows.iter().map(|row| row["passed"].as_bool()).collect();
    assert_eq!(passed, [true, true, false, true].map(Some));
    let complaint = "failed: net.1, full: the largest error of the stored output is ";
    assert!(err.starts_with(complaint) && err.lines().count() == 1, "{err}");
    let one = ["compare", "--input", file.path(), "--prefix", "net.1", "--causal", "--repeat", "1"];
    let (text, err) = fails(&one);
    assert!(
        text.contains("net.1: the output stored with it is within ") && text.contains("FAILED."),
        "{text}"
    );
    assert_eq!(text.matches("FAILED").count(), 2, "{text}");
    assert!(err.starts_with("failed: net.1, causal: the largest error of the stored output is "), "{err}");
    assert_width(&text, &one);
    assert!(json(&["compare", "--quick", "--repeat", "1"])["rows"][0]["stored"]["passed"] == true);
}

#[test]
fn the_exit_code_is_the_verdict() {
    // Scores near 100 whose products are exact in f32: the naive error is next to nothing here, and a kernel that keeps
    // scores in units of log 2 has rounded them. Whichever way that goes, code, stream and document must agree.
    let key = |x: f32| [x, 0.0, 0.0, 0.0];
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (q, k, v) = (
        bytes(&[1.0; 4]),
        bytes(&[key(200.0), key(200.02)].concat()),
        bytes(&[key(1.0), key(-1.0)].concat()),
    );
    let view = |bytes, rows| TensorView::new(Dtype::F32, vec![1, rows, 4], bytes).expect("a valid tensor");
    let tensors = [("q", view(&q, 1)), ("k", view(&k, 2)), ("v", view(&v, 2))];
    let file = TempFile::new("verdict", &safetensors::serialize(tensors, None).expect("a valid file"));
    let output = run(&["compare", "--input", file.path(), "--repeat", "1", "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let passed = document["passed"].as_bool().expect("a verdict");
    assert_eq!(output.status.code(), Some(if passed { 0 } else { 1 }));
    let err = text(&output.stderr);
    assert_eq!(err.is_empty(), passed, "{err}");
    assert!(passed || err.starts_with("failed: q, k, v, full: the largest error of qkv is "), "{err}");
}

#[test]
fn walkthrough_shows_the_steps() {
    let sentence = "colourless green ideas sleep furiously in incomprehensible silence near the old river";
    for args in [
        &["walkthrough"][..],
        &["walkthrough", "--causal", "--dim", "8", "--sentence", sentence],
        &["walkthrough", "--sentence", "one"],
        &["walkthrough", "--sentence", "öde 東京 \u{1b}[31mrot"],
    ] {
        let text = succeeds(args);
        assert_width(&text, args);
        assert!(text.contains("Step 3: output") && text.contains("The numbers are the same."), "{text}");
        let steps = json(args);
        assert_eq!(steps["passed"], true);
        let words = steps["tokens"].as_array().map_or(0, Vec::len);
        for sum in steps["row_sums"].as_array().expect("sums") {
            assert!(sum.as_f64().is_some_and(|sum| (sum - 1.0).abs() < 1e-9), "{steps}");
        }
        assert_eq!(steps["weights"].as_array().map(Vec::len), Some(words));
        // A hidden score is null.
        let causal = args.contains(&"--causal");
        assert_eq!(steps["masked"][0][words - 1].is_null(), causal && words > 1);
    }
}

#[test]
fn a_reader_who_goes_away_is_no_error() {
    let mut child = qkv(&["bench", "--shape", SMALL, "--repeat", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // Closed long before the program writes.
    drop(child.stdout.take());
    let status = child.wait().expect("the program ends");
    let err = BufReader::new(child.stderr.take().expect("piped")).lines().count();
    assert_eq!((status.code(), err), (Some(0), 0));
}

#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_written_is_no_success() {
    for args in [&["--help"][..], &["--version"], &["bench", "--help"], &["walkthrough"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
        let output = qkv(args).stdout(full).output().expect("the program starts");
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert!(err.starts_with("error: cannot write the ") && err.lines().count() == 1, "{args:?}: {err}");
    }
}
