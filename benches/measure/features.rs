//! `measure features`: what each mask and score option costs, beside the same call without it, in one run.
//!
//! In every round each pair has one turn: a stretch of calls without the option, one with it, one without again; the
//! figure is the ratio of the times, in the middle of the rounds. Rows in which the option leaves less to do are set
//! against the work that is left.

use std::error::Error;
use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use qkv::rule::{RuleLanes, ScoreRule};
use qkv::simd::Simd;
use qkv::{
    AttentionSpec, Bias, BlockMask, Broadcast, Causal, Outputs, Packed, T5Bias, Tensor, Window,
    attention_into, attention_packed, attention_with_rule,
};
use qkv_benches::{Environment, Random, median, quartiles, seconds_per_call};

/// What `measure features` can be told.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rounds, of which the medians are printed.
    #[arg(long, default_value = "9", value_parser = crate::positive)]
    rounds: usize,
    /// Least length of each stretch, in seconds.
    #[arg(long, default_value = "0.06", value_parser = crate::seconds)]
    seconds: Duration,
    /// Rows whose name contains this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
}

/// A call without an option and one with it.
struct Pair<'a> {
    name: &'static str,
    without: Box<dyn FnMut() + 'a>,
    with: Box<dyn FnMut() + 'a>,
    /// The work of `with` over that of `without`: 1 where the option leaves as much to do.
    work: f64,
    /// The most that the time may be, over time without x work.
    goal: f64,
}

/// ALiBi as a caller would write it, to be compared with the built-in one.
#[derive(Clone, Copy)]
struct OwnAlibi {
    slope: f32,
}

impl ScoreRule for OwnAlibi {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, lanes: &RuleLanes<S>, key: usize, scores: S::F32) -> S::F32 {
        let distance = s.abs(s.sub(lanes.position, s.splat(key as f32)));
        s.mul_add(distance, s.splat(-self.slope), scores)
    }
}

/// Queries, keys, values and an output of one shape.
struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: [usize; 4],
}

impl Inputs {
    fn new(shape: [usize; 4]) -> Result<Self, Box<dyn Error>> {
        let mut random = Random::new(1);
        let mut tensor = || Tensor::from_fn(shape, |_| random.next_f32());
        Ok(Self { q: tensor()?, k: tensor()?, v: tensor()?, shape })
    }

    /// A call with this spec, into an output of its own.
    fn call<'a>(&'a self, spec: AttentionSpec<'a>) -> Result<Box<dyn FnMut() + 'a>, Box<dyn Error>> {
        let mut out = Tensor::zeros(self.shape)?;
        let mut call = move || {
            let outputs = Outputs::new(out.view_mut());
            attention_into(self.q.view(), self.k.view(), self.v.view(), &spec, outputs)
        };
        // Once for its errors; what follows is the same call.
        call()?;
        Ok(Box::new(move || call().expect("it has run before")))
    }

    fn call_with_rule<'a, R: ScoreRule + 'a>(
        &'a self,
        rule: R,
    ) -> Result<Box<dyn FnMut() + 'a>, Box<dyn Error>> {
        let mut out = Tensor::zeros(self.shape)?;
        let spec = AttentionSpec::new();
        let mut call = move || {
            let outputs = Outputs::new(out.view_mut());
            attention_with_rule(self.q.view(), self.k.view(), self.v.view(), &spec, rule, outputs)
        };
        call()?;
        Ok(Box::new(move || call().expect("it has run before")))
    }

    fn call_packed<'a>(&'a self, ends: &'a [usize]) -> Result<Box<dyn FnMut() + 'a>, Box<dyn Error>> {
        let mut out = Tensor::zeros(self.shape)?;
        let spec = AttentionSpec::new();
        let packed = Packed { query_ends: ends, key_ends: ends };
        let mut call = move || {
            let outputs = Outputs::new(out.view_mut());
            attention_packed(self.q.view(), self.k.view(), self.v.view(), packed, &spec, outputs)
        };
        call()?;
        Ok(Box::new(move || call().expect("it has run before")))
    }
}

const HEADS: usize = 4;
const LENGTH: usize = 2048;
const LONG: usize = 4096;
const WINDOW: usize = 256;

/// Runs the rounds and prints the table.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let mut random = Random::new(2);
    let usual = Inputs::new([1, HEADS, LENGTH, 64])?;
    let long = Inputs::new([1, HEADS, LONG, 64])?;
    let plain = AttentionSpec::new;

    let bias = random.vector(HEADS * LENGTH * LENGTH);
    let bias = Bias::F32(Broadcast::from_slice(&bias, [1, HEADS, LENGTH, LENGTH])?);
    let mask: Vec<bool> = random.vector(LENGTH * LENGTH).into_iter().map(|x| x < 0.6).collect();
    let mask = Broadcast::from_slice(&mask, [1, 1, LENGTH, LENGTH])?;
    let slopes = [0.5, 0.25, 0.125, 0.0625];
    let table = random.vector(32 * HEADS);
    let t5 = T5Bias { table: &table, buckets: 32, max_distance: 128, bidirectional: true };
    let blocks = LENGTH / 128;
    let sparse: Vec<[usize; 4]> = (0..blocks)
        .flat_map(|i| (0..blocks).filter(move |j| (i * 7 + j * 3) % 10 == 0).map(move |j| [0, 0, i, j]))
        .collect();
    let density = sparse.len() as f64 / (blocks * blocks) as f64;
    let sparse = BlockMask::from_indices([1, 1, blocks, blocks], [128, 128], sparse)?;
    // A window of 256 keys, the query's own among them.
    let visible: usize = (0..LONG).map(|i| (i + 1).min(WINDOW)).sum();
    let of_causal = visible as f64 / (LONG * (LONG + 1) / 2) as f64;
    let mut ends = vec![0];
    for _ in 0..64 {
        let length = 1 + ((random.next_f32() + 1.0) * 256.0) as usize;
        ends.push(ends[ends.len() - 1] + length.min(512));
    }
    let packed = Inputs::new([1, 12, ends[64], 64])?;
    let packed_scores: usize = ends.windows(2).map(|pair| (pair[1] - pair[0]).pow(2)).sum();
    let short = Inputs::new([1, 12, 512, 64])?;
    let causal = || plain().with_causal(Causal::TopLeft);

    let mut pairs = Vec::new();
    let mut add = |name, without, with, work, goal| pairs.push(Pair { name, without, with, work, goal });
    let base = || usual.call(plain());
    add("additive bias (1, H, S, S)", base()?, usual.call(plain().with_bias(bias))?, 1.0, 1.06);
    add("boolean mask (1, 1, S, S)", base()?, usual.call(plain().with_mask(mask))?, 1.0, 1.06);
    add("key lengths", base()?, usual.call(plain().with_key_lengths(&[LENGTH - 1]))?, 1.0, 1.06);
    add("ALiBi", base()?, usual.call(plain().with_alibi_slopes(&slopes))?, 1.0, 1.25);
    add("T5 bias", base()?, usual.call(plain().with_t5_bias(t5))?, 1.0, 1.25);
    add("soft cap", base()?, usual.call(plain().with_softcap(30.0))?, 1.0, 1.25);
    add("sinks", base()?, usual.call(plain().with_sinks(&slopes))?, 1.0, 1.02);
    let built_in = usual.call(plain().with_alibi_slopes(&[0.25; HEADS]))?;
    add("vector rule against ALiBi", built_in, usual.call_with_rule(OwnAlibi { slope: 0.25 })?, 1.0, 1.05);
    let window = causal().with_window(Window::new(Some(WINDOW - 1), None));
    add("window 256, S 4096, causal", long.call(causal())?, long.call(window)?, of_causal, 1.0 / 0.75);
    add(
        "block-sparse, 10 %",
        base()?,
        usual.call(plain().with_block_mask(&sparse))?,
        density,
        0.14 / density,
    );
    let of_512 = packed_scores as f64 / (512 * 512) as f64;
    add("64 packed sequences", short.call(plain())?, packed.call_packed(&ends)?, of_512, 1.1);
    pairs.retain(|pair| {
        options.filter.is_empty() || options.filter.iter().any(|text| pair.name.contains(text))
    });

    let mut ratios = vec![Vec::new(); pairs.len()];
    for round in 0..options.rounds {
        for turn in 0..pairs.len() {
            let at = (turn + round) % pairs.len();
            let pair = &mut pairs[at];
            let before = seconds_per_call(options.seconds, &mut pair.without);
            let with = seconds_per_call(options.seconds, &mut pair.with);
            let after = seconds_per_call(options.seconds, &mut pair.without);
            ratios[at].push(2.0 * with / (before + after));
        }
    }

    writeln!(io::stdout(), "{}", Environment::read()?)?;
    writeln!(
        io::stdout(),
        "time with the option over time without, {} rounds; in brackets the quartiles",
        options.rounds
    )?;
    writeln!(io::stdout(), "per work: divided by the share of the work that is left\n")?;
    writeln!(
        io::stdout(),
        "{:28} {:>8} {:^18} {:>9} {:>9}",
        "option",
        "ratio",
        "(quartiles)",
        "per work",
        "at most"
    )?;
    for (pair, ratios) in pairs.iter().zip(&ratios) {
        let (low, high) = quartiles(ratios);
        let ratio = median(ratios);
        let per_work = ratio / pair.work;
        let verdict = if per_work <= pair.goal { "met" } else { "no" };
        writeln!(
            io::stdout(),
            "{:28} {ratio:>8.3} {:^18} {per_work:>9.3} {:>9.3} {verdict}",
            pair.name,
            format!("({low:.3} to {high:.3})"),
            pair.goal
        )?;
    }
    Ok(())
}
