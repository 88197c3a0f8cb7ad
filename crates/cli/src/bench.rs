//! `qkv bench`: throughput over lengths and head dims.
//!
//! The sweep keeps the width of the model (768 features in all heads together, as in BERT and GPT-2) and varies how it
//! is cut into heads, so that rows of one length do the same work. Full and causal attention of one shape are measured
//! side by side, each next to the machine's peak (see [`crate::measure`]).

use qkv::{AttentionSpec, Causal, Shape};
use serde::Serialize;

use crate::args::{ShapeArg, Sizes};
use crate::input::{Input, random};
use crate::measure::{Timing, Variant, interleaved, median, round_seconds, shape_of};
use crate::output::{Grid, Progress, Tone, paragraph, seconds_text, three_digits};
use crate::{Context, Failure, Report};

const LENGTHS: [usize; 4] = [128, 512, 2048, 4096];
/// Lengths of `--quick`.
const SHORT_LENGTHS: [usize; 3] = [128, 512, 2048];
const DIMS: [usize; 3] = [32, 64, 128];
/// Heads times head dim.
const WIDTH: usize = 768;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Document {
    version: &'static str,
    isa: &'static str,
    threads: usize,
    /// Rounds of which the medians are.
    rounds: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    #[serde(with = "ShapeFields")]
    shape: Shape,
    causal: bool,
    #[serde(flatten)]
    timing: Timing,
}

/// The sizes of a call as JSON has them.
#[derive(Serialize)]
#[serde(remote = "Shape")]
pub(crate) struct ShapeFields {
    batch: usize,
    query_heads: usize,
    kv_heads: usize,
    query_len: usize,
    key_len: usize,
    key_dim: usize,
    value_dim: usize,
}

pub(crate) fn run(sizes: &Sizes, context: &Context) -> Result<Report, Failure> {
    let (rounds, masks) = (sizes.rounds(), sizes.masks());
    let shapes = if sizes.shape.is_empty() { sweep(sizes.quick) } else { sizes.shape.clone() };
    let mut rows = Vec::new();
    let steps = shapes.len() * masks.len() * rounds;
    let mut progress = Progress::new(steps, steps as f64 * round_seconds());
    for shape in shapes {
        progress.doing(format!("measuring {shape}"));
        let input = random(shape, sizes.kv_heads)?;
        let timings =
            time(&input, masks, rounds, &mut progress).map_err(|f| f.about(&format!("--shape {shape}")))?;
        let shape = shape_of(&input.q, &input.k, &input.v);
        rows.extend(masks.iter().zip(timings).map(|(&causal, timing)| Row { shape, causal, timing }));
    }
    drop(progress);
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        isa: context.isa.kind().name(),
        threads: context.threads,
        rounds,
        rows,
    };
    Report::new(context, &document, || text(&document, context))
}

/// The shapes without `--shape`.
fn sweep(quick: bool) -> Vec<ShapeArg> {
    let lengths: &[usize] = if quick { &SHORT_LENGTHS } else { &LENGTHS };
    let shape = |dim, &length| ShapeArg { batch: 1, heads: WIDTH / dim, length, dim };
    DIMS.into_iter().flat_map(|dim| lengths.iter().map(move |length| shape(dim, length))).collect()
}

fn time(
    input: &Input,
    masks: &[bool],
    rounds: usize,
    progress: &mut Progress,
) -> Result<Vec<Timing>, Failure> {
    let mut variants = masks
        .iter()
        .map(|&causal| Variant::new(&input.q, &input.k, &input.v, spec(causal)))
        .collect::<Result<Vec<_>, _>>()?;
    interleaved(&mut variants, rounds, progress, |_| ())
}

/// Full, or causal with the last query seeing the last key.
pub(crate) fn spec(causal: bool) -> AttentionSpec<'static> {
    if causal { AttentionSpec::new().with_causal(Causal::BottomRight) } else { AttentionSpec::new() }
}

/// The name of a mask in tables.
pub(crate) fn mask_text(causal: bool) -> &'static str {
    if causal { "causal" } else { "full" }
}

/// A shape as `--shape` takes it; where queries and keys differ, "of queries/of keys".
pub(crate) fn shape_text(shape: &Shape) -> String {
    let pair = |a: usize, b: usize| if a == b { a.to_string() } else { format!("{a}/{b}") };
    format!(
        "{},{},{},{}",
        shape.batch,
        pair(shape.query_heads, shape.kv_heads),
        pair(shape.query_len, shape.key_len),
        pair(shape.key_dim, shape.value_dim)
    )
}

/// A percentage of the peak, which stands out where it is high.
pub(crate) fn percent_cell(percent: f64) -> (String, Tone) {
    let tone = if percent >= 70.0 { Tone::Good } else { Tone::Plain };
    (format!("{percent:.1} %"), tone)
}

fn text(document: &Document, context: &Context) -> String {
    let mut text = context.title();
    text.push('\n');
    let mut grid = Grid::new(2, ["b,h,s,d", "mask", "time", "GFLOP/s", "peak", "of peak"]);
    for row in &document.rows {
        let plain = |text: String| (text, Tone::Plain);
        grid.row_with([
            plain(shape_text(&row.shape)),
            plain(mask_text(row.causal).to_owned()),
            plain(seconds_text(row.timing.seconds)),
            plain(three_digits(row.timing.gflops)),
            (three_digits(row.timing.peak_gflops), Tone::Quiet),
            percent_cell(row.timing.percent_of_peak),
        ]);
    }
    text.push_str(&grid.text());
    text.push('\n');
    let rounds = document.rounds;
    text.push_str(&paragraph(&format!(
        "f32; medians of {rounds} rounds. GFLOP/s are useful ones: 2 (key dim + value dim) for each visible score. \
         The peak is that of fused multiply-adds on registers with the same threads, measured in the same rounds."
    )));
    let peaks = document.rows.iter().map(|row| row.timing.peak_gflops).collect();
    text.push_str(&paragraph(&format!("Median peak of the run: {} GFLOP/s.", three_digits(median(peaks)))));
    text
}
