//! `qkv compare`: speed, error and memory of qkv beside those of the naive reference, input by input.
//!
//! For each input and mask, in this order: one call of qkv (which refuses what does not fit), one naive call whose heap
//! is watched, qkv's heap on threads that have never run it, the timing rounds (peak, qkv, and naive again as long as
//! it is short), and last the exact result, from which both are measured.

use std::time::{Duration, Instant};

use qkv::reference::naive;
use qkv::{AttentionError, Shape, Tensor};
use serde::Serialize;

use crate::accuracy::{Distance, exact, tolerance};
use crate::args::CompareArgs;
use crate::bench::{ShapeFields, mask_text, percent_cell, shape_text, spec};
use crate::input::{Input, built_in, from_file, random};
use crate::measure::{Timing, Variant, interleaved, median, round_seconds, shape_of};
use crate::memory::{bytes_text, comparison_bytes, peak_during, require};
use crate::output::{Grid, Progress, Tone, error_text, paragraph, seconds_text, three_digits};
use crate::{Context, Failure, Report};

/// Time for naive calls beyond the first, for one row.
const NAIVE_TIME: Duration = Duration::from_millis(500);

/// Time for calls whose heap is watched: on a busy machine a thread may wait that long for its first turn.
const SCRATCH_TIME: Duration = Duration::from_millis(50);

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Document {
    version: &'static str,
    isa: &'static str,
    threads: usize,
    /// Rounds of which the medians are.
    rounds: usize,
    passed: bool,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    #[serde(with = "ShapeFields")]
    shape: Shape,
    causal: bool,
    /// Of the naive computation, on one thread.
    naive_seconds: f64,
    /// Naive time over qkv's.
    ratio: f64,
    qkv: Timing,
    /// Of qkv, against f64.
    error: Distance,
    naive_error: Distance,
    /// The largest error that passes.
    tolerance: f64,
    /// Whether qkv's error is tolerated, and that of the output that came with the input.
    passed: bool,
    memory: Memory,
    /// Against the output that came with the input.
    stored: Option<Stored>,
}

/// Bytes on the heap beyond inputs and outputs.
#[derive(Clone, Copy, Debug, Serialize)]
struct Memory {
    naive: usize,
    /// A call on threads that have not run qkv before: the scratch of all of them.
    qkv: usize,
    /// The next call, which finds the scratch in place.
    qkv_again: usize,
}

/// Another program's output for the same input.
#[derive(Clone, Copy, Debug, Serialize)]
struct Stored {
    /// Its error against f64.
    error: Distance,
    /// The largest difference between it and qkv's output.
    max_difference_to_qkv: f64,
    /// Whether its error is tolerated.
    passed: bool,
}

pub(crate) fn run(args: &CompareArgs, context: &Context) -> Result<Report, Failure> {
    let sizes = &args.sizes;
    let (rounds, masks) = (sizes.rounds(), sizes.masks());
    let inputs = match (&args.input, sizes.shape.as_slice()) {
        (Some(path), _) => from_file(path, args.prefix.as_deref())?,
        (None, []) => built_in(!sizes.quick)?,
        (None, shapes) => {
            shapes.iter().map(|&shape| random(shape, sizes.kv_heads)).collect::<Result<Vec<_>, _>>()?
        }
    };
    let mut progress = Progress::new(
        inputs.len() * masks.len() * (rounds + STEPS_BESIDE_ROUNDS),
        inputs.iter().map(|input| expected_seconds(input, rounds)).sum::<f64>() * masks.len() as f64,
    );
    let mut rows = Vec::new();
    for input in &inputs {
        for &causal in masks {
            // An output that came along was computed without a mask, unless the user says otherwise.
            let stored = input.stored.as_ref().filter(|_| !causal || (sizes.causal && args.input.is_some()));
            let row = compare(input, causal, stored, rounds, &mut progress);
            rows.push(row.map_err(|failure| failure.about(&input.name))?);
        }
    }
    drop(progress);

    let complaints = rows.iter().flat_map(complaints).collect::<Vec<_>>();
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        isa: context.isa.kind().name(),
        threads: context.threads,
        rounds,
        passed: complaints.is_empty(),
        rows,
    };
    let built_in = args.input.is_none() && sizes.shape.is_empty();
    let report = Report::new(context, &document, || text(&document, context, built_in))?;
    Ok(Report { complaints, ..report })
}

/// The naive call, the heap of qkv, the exact result.
const STEPS_BESIDE_ROUNDS: usize = 3;

/// Time of one row, roughly: textbook loops do some GFLOP/s.
fn expected_seconds(input: &Input, rounds: usize) -> f64 {
    shape_of(&input.q, &input.k, &input.v).flops(None) / 2e9 + rounds as f64 * round_seconds()
}

fn compare(
    input: &Input,
    causal: bool,
    stored: Option<&Tensor>,
    rounds: usize,
    progress: &mut Progress,
) -> Result<Row, Failure> {
    let Input { name, q, k, v, .. } = input;
    let label = format!("{name}, {}", mask_text(causal));
    let spec = spec(causal);
    let shape = shape_of(q, k, v);
    require("the comparison", comparison_bytes(q.shape(), shape.key_len, shape.value_dim))?;
    let variant = Variant::new(q, k, v, spec.clone())?;

    progress.doing(format!("{label}: naive"));
    let timed_naive = || {
        let start = Instant::now();
        let result = naive(q.view(), k.view(), v.view(), &spec);
        (result, start.elapsed().as_secs_f64())
    };
    let ((result, first), naive_peak) = peak_during(timed_naive);
    // Its output is no scratch.
    let outputs = size_of_val(result.output.data()) + size_of_val(result.lse.as_slice());
    let naive_output = result.output;
    progress.step();

    progress.doing(format!("{label}: memory"));
    let mut variants = [variant];
    let (qkv, qkv_again) = scratch(&mut variants[0])?;
    let memory = Memory { naive: naive_peak.saturating_sub(outputs), qkv, qkv_again };
    progress.step();

    progress.doing(format!("{label}: qkv"));
    let mut naive_times = vec![first];
    let mut left = NAIVE_TIME.as_secs_f64() - first;
    let timings = interleaved(&mut variants, rounds, progress, |_| {
        if left > 0.0 {
            let (_, seconds) = timed_naive();
            left -= seconds;
            naive_times.push(seconds);
        }
    })?;
    let (qkv, naive_seconds) = (timings[0], median(naive_times));

    progress.doing(format!("{label}: exact"));
    let out = variants[0].out().data();
    let exact = exact(q, k, v, &spec);
    let (error, naive_error) =
        (Distance::between(out, &exact), Distance::between(naive_output.data(), &exact));
    let tolerance = tolerance(naive_error, v);
    let stored = stored.map(|stored| {
        let out: Vec<f64> = out.iter().map(|&x| f64::from(x)).collect();
        let error = Distance::between(stored.data(), &exact);
        let max_difference_to_qkv = Distance::between(stored.data(), &out).max;
        Stored { error, max_difference_to_qkv, passed: error.max <= tolerance }
    });
    progress.step();
    Ok(Row {
        name: name.clone(),
        shape,
        causal,
        naive_seconds,
        ratio: naive_seconds / qkv.seconds.max(1e-12),
        qkv,
        error,
        naive_error,
        tolerance,
        passed: error.max <= tolerance && stored.is_none_or(|stored| stored.passed),
        memory,
        stored,
    })
}

/// Most bytes on the heap during calls on new threads, and during a call after them.
///
/// Threads keep their scratch, so the program's own would show nothing; new ones show all. One short call may be over
/// before the second thread is awake, hence calls until [`SCRATCH_TIME`] has passed.
fn scratch(variant: &mut Variant<'_>) -> Result<(usize, usize), Failure> {
    let threads = rayon::current_num_threads();
    let calls = |variant: &mut Variant<'_>| -> Result<(), AttentionError> {
        let start = Instant::now();
        variant.call()?;
        while start.elapsed() < SCRATCH_TIME {
            variant.call()?;
        }
        Ok(())
    };
    let watched = rayon::ThreadPoolBuilder::new().num_threads(threads).build_scoped(
        |thread| thread.run(),
        |pool| {
            // So that all threads have started, and allocated what threads allocate.
            pool.broadcast(|_| ());
            pool.install(|| -> Result<_, AttentionError> {
                let (result, first) = peak_during(|| calls(variant));
                result?;
                let (result, again) = peak_during(|| variant.call());
                result?;
                Ok((first, again))
            })
        },
    );
    // A thread counts as ended a moment before its scratch is freed, and the next measurement begins with a count.
    std::thread::sleep(Duration::from_millis(2));
    Ok(watched.map_err(|error| Failure::new(format!("cannot start {threads} threads: {error}")))??)
}

/// What is wrong with a row, if anything: qkv's output, the one that came along.
fn complaints(row: &Row) -> impl Iterator<Item = String> {
    let stored = row.stored.filter(|stored| !stored.passed).map(|stored| ("the stored output", stored.error));
    let qkv = (row.error.max > row.tolerance).then_some(("qkv", row.error));
    qkv.into_iter().chain(stored).map(|(whose, error)| {
        format!(
            "{}, {}: the largest error of {whose} is {}, tolerated are {} (4 x the naive error of {}, and 4 ulp of the \
             largest value)",
            row.name,
            mask_text(row.causal),
            error_text(error.max),
            error_text(row.tolerance),
            error_text(row.naive_error.max)
        )
    })
}

fn text(document: &Document, context: &Context, built_in: bool) -> String {
    let mut text = context.title();
    if built_in {
        text.push_str(&paragraph(
            "Input: queries, keys and values of all-MiniLM-L6-v2 reading 212 tokens of Moby-Dick; \"tiled\" is layer 5 \
             with the text repeated (see qkv compare --help).",
        ));
    }
    text.push('\n');
    text.push_str(&speed(document).text());
    text.push('\n');
    text.push_str(&error_and_memory(document).text());
    text.push('\n');
    for row in &document.rows {
        if let Some(stored) = row.stored {
            text.push_str(&paragraph(&format!(
                "{}: the output stored {} is within {} of qkv's and {} of f64's{}",
                row.name,
                if built_in { "by transformers (f32)" } else { "with it" },
                error_text(stored.max_difference_to_qkv),
                error_text(stored.error.max),
                if stored.passed {
                    ".".to_owned()
                } else {
                    format!(", tolerated are {}: FAILED.", error_text(row.tolerance))
                },
            )));
        }
    }
    let peak = median(document.rows.iter().map(|row| row.qkv.peak_gflops).collect());
    text.push_str(&paragraph(&format!(
        "Naive: the textbook's three steps in f32, plain loops on one thread. qkv: {} thread{}, medians of {} rounds. \
         Peak: {} GFLOP/s of fused multiply-adds, measured in the same rounds. Causal FLOP: visible scores only. \
         Errors: against the same steps in f64; an output passes with at most 4 x the naive error + 4 ulp of the \
         largest value. Memory: heap beyond inputs and output, for qkv the scratch of all threads, which they keep.",
        document.threads,
        if document.threads == 1 { "" } else { "s" },
        document.rounds,
        three_digits(peak),
    )));
    text
}

fn speed(document: &Document) -> Grid {
    let mut grid = Grid::new(3, ["input", "b,h,s,d", "mask", "naive", "qkv", "faster", "GFLOP/s", "of peak"]);
    for row in &document.rows {
        let plain = |text: String| (text, Tone::Plain);
        grid.row_with([
            plain(row.name.clone()),
            plain(shape_text(&row.shape)),
            plain(mask_text(row.causal).to_owned()),
            plain(seconds_text(row.naive_seconds)),
            plain(seconds_text(row.qkv.seconds)),
            (format!("{} x", three_digits(row.ratio)), Tone::Good),
            plain(three_digits(row.qkv.gflops)),
            percent_cell(row.qkv.percent_of_peak),
        ]);
    }
    grid
}

fn error_and_memory(document: &Document) -> Grid {
    let header = [
        "input",
        "mask",
        "max error\nqkv",
        "\nnaive",
        "RMS error\nqkv",
        "\nnaive",
        "memory\nqkv",
        "\nnaive",
        "verdict",
    ];
    let mut grid = Grid::new(2, header);
    for row in &document.rows {
        let plain = |text: String| (text, Tone::Plain);
        let verdict = if row.passed { ("ok", Tone::Good) } else { ("FAILED", Tone::Bad) };
        grid.row_with([
            plain(row.name.clone()),
            plain(mask_text(row.causal).to_owned()),
            plain(error_text(row.error.max)),
            plain(error_text(row.naive_error.max)),
            plain(error_text(row.error.rms)),
            plain(error_text(row.naive_error.rms)),
            plain(bytes_text(row.memory.qkv as f64)),
            plain(bytes_text(row.memory.naive as f64)),
            (verdict.0.to_owned(), verdict.1),
        ]);
    }
    grid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input() -> Input {
        let tensor = |seed: usize| {
            Tensor::from_fn([1, 2, 70, 8], |[_, h, s, d]| ((h * 31 + s * 7 + d * 3 + seed) as f32).sin())
                .unwrap()
        };
        Input { name: "some".to_owned(), q: tensor(1), k: tensor(2), v: tensor(3), stored: None }
    }

    #[test]
    fn a_row_is_consistent() {
        let row = compare(&input(), true, None, 1, &mut Progress::new(0, 0.0)).unwrap();
        assert!(row.passed && row.error.max > 0.0 && row.error.max < 1e-5, "{row:?}");
        assert_eq!(row.tolerance, 4.0 * row.naive_error.max + 4.0 * 2.0f64.powi(-24));
        assert!(row.stored.is_none());
    }

    #[test]
    fn an_output_that_came_along_is_measured() {
        let input = input();
        let zeros = Tensor::zeros([1, 2, 70, 8]).unwrap();
        let row = compare(&input, false, Some(&zeros), 1, &mut Progress::new(0, 0.0)).unwrap();
        let stored = row.stored.unwrap();
        // Both distances are the largest output, up to the rounding of qkv.
        assert!(stored.error.max > 0.01, "{stored:?}");
        assert!((stored.error.max - stored.max_difference_to_qkv).abs() < 1e-5, "{stored:?}");
        assert!(!stored.passed && !row.passed && row.error.max <= row.tolerance);
        let all: Vec<String> = complaints(&row).collect();
        assert_eq!(all.len(), 1);
        assert!(all[0].starts_with("some, full: the largest error of the stored output is "), "{all:?}");
    }

    #[test]
    fn a_failed_row_says_what_failed() {
        let mut row = compare(&input(), false, None, 1, &mut Progress::new(0, 0.0)).unwrap();
        row.error.max = 1.0;
        let text = complaints(&row).next().unwrap_or_default();
        assert!(text.starts_with("some, full: the largest error of qkv is 1.0e0, tolerated are "), "{text}");
    }
}
