//! The command line: what can be asked, with the help that explains it.
//!
//! Options of one meaning have one definition: [`Common`] for every subcommand, [`Sizes`] for those that compute on
//! tensors; those of [`DecodeArgs`] mean something else, a cache. Everything is checked here as far as the words alone allow; what depends on other words, on the machine or
//! on a file is checked where it is used.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use qkv::cache::Storage;
use qkv::simd::IsaKind;

const OVERVIEW: &str = "\
Examples:
  qkv                                     the comparison on the real inputs that come with it
  qkv compare --shape 1,12,1024,64        on random input of that shape
  qkv compare --input mine.safetensors    on your own q, k and v
  qkv bench --quick --json                throughput for scripts
  qkv bench decode                        one step of decoding over a cache, in four storage types
  qkv walkthrough --sentence \"to be or not to be\"

Exit code: 0 done, 1 a comparison failed its tolerance, 2 bad arguments or bad input.
Environment: QKV_ISA forces an instruction set, RAYON_NUM_THREADS sets the threads, NO_COLOR turns colours off.";

/// Attention on CPUs in one fused pass, measured and compared.
///
/// Without a subcommand, runs `compare`.
#[derive(Debug, Parser)]
#[command(name = "qkv", bin_name = "qkv", version, max_term_width = 100, after_help = OVERVIEW)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What every subcommand takes.
#[derive(Args, Debug)]
pub(crate) struct Common {
    /// Print one JSON document on standard output instead of text.
    ///
    /// Sizes are in bytes, times in seconds; a number that is not finite is null. Example: qkv info --json
    #[arg(long, global = true, help_heading = "Common options")]
    pub(crate) json: bool,

    /// Compute on N threads; the default is RAYON_NUM_THREADS, else one for each CPU.
    ///
    /// Example: qkv bench --threads 1
    #[arg(long, global = true, value_name = "N", value_parser = at_most::<4096>, help_heading = "Common options")]
    pub(crate) threads: Option<usize>,

    /// Use this instruction set: portable, avx2, avx512, neon or simd128.
    ///
    /// The default is QKV_ISA, else the best that the CPU has. `qkv info` lists what there is. Example: qkv compare
    /// --isa portable
    #[arg(long, global = true, value_name = "NAME", value_parser = IsaKind::parse, help_heading = "Common options")]
    pub(crate) isa: Option<IsaKind>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the CPU, its caches and instruction sets, its measured peak and bandwidth.
    ///
    /// The peak is that of fused multiply-adds on registers (2 FLOP each), the bandwidth that of reading a buffer much
    /// larger than the caches; both are the median of short rounds.
    #[command(after_help = INFO)]
    Info,
    /// Measure throughput over lengths and head dims.
    ///
    /// Without --shape sweeps lengths 128 to 4096 and head dims 32, 64 and 128 of a model of width 768, full and
    /// causal, in f32. Every round measures the machine's peak and then each variant, so that both see the same
    /// machine; the medians are shown. Causal FLOP are those of visible scores.
    ///
    /// `qkv bench decode` measures steps of decoding instead; `qkv bench decode --help` explains it.
    #[command(after_help = BENCH)]
    Bench(BenchArgs),
    /// Compare speed, error and memory with the naive reference.
    ///
    /// Without --input and --shape the inputs are real: queries, keys and values of two layers of all-MiniLM-L6-v2 that
    /// read 212 tokens of Moby-Dick, and long inputs made of them by repeating the text. Copy r of the text has queries
    /// and keys turned like rotary positions turn them, with r as the position (feature pair i by the angle r *
    /// 10000^(-i / pairs)), and values scaled by 1 + r / 16, so that no two copies are equal. For head dim 64,
    /// neighbouring heads are joined.
    ///
    /// The naive reference is the textbook's three steps in f32 on one thread: scores, softmax, weighted sum. Errors
    /// are against the same steps in f64. qkv, and an output stored with the input, fails where its largest error is
    /// above 4 times the naive one plus 4 units in the last place of the largest value.
    #[command(after_help = COMPARE)]
    Compare(CompareArgs),
    /// Show each step of attention on a short sentence.
    ///
    /// Prints the tokens, their embeddings, Q, K and V, the scores, the scaled and masked scores, the softmax with its
    /// row sums and the output; then computes the same with qkv and shows that it agrees.
    #[command(after_help = WALKTHROUGH)]
    Walkthrough(WalkthroughArgs),
}

const INFO: &str = "\
Examples:
  qkv info
  qkv info --threads 1 --json
  qkv info --isa portable      the peak of another instruction set";

const BENCH: &str = "\
Examples:
  qkv bench
  qkv bench --quick
  qkv bench --shape 1,32,2048,128 --kv-heads 8 --causal
  qkv bench --shape 8,12,128,64 --shape 32,12,128,32 --repeat 15 --json
  qkv bench decode --quick";

const DECODE: &str = "\
Examples:
  qkv bench decode
  qkv bench decode --quick --json
  qkv bench decode --shape 1,32,8192,128 --kv-heads 8 --storage bf16,int8
  qkv bench decode --shape 4,32,2048,128 --kv-heads 8 --queries 4 --repeat 21";

const COMPARE: &str = "\
Examples:
  qkv compare
  qkv compare --quick
  qkv compare --shape 1,8,1024,64 --kv-heads 2 --causal
  qkv compare --input mine.safetensors
  qkv compare --input testdata/minilm.safetensors --prefix layer5 --repeat 21";

const WALKTHROUGH: &str = "\
Examples:
  qkv walkthrough
  qkv walkthrough --sentence \"the cat sat on the mat\" --causal
  qkv walkthrough --dim 8 --json";

/// Sizes of random input, and how to measure: for `bench` and `compare`.
#[derive(Args, Debug, Default, PartialEq)]
pub(crate) struct Sizes {
    /// Random input of this shape: batch, heads, length, head dim. May be given several times.
    ///
    /// Values are uniform with mean 0 and variance 1, from the generator SplitMix64 with seeds 1 (q), 2 (k) and 3 (v):
    /// the same on every machine. Example: --shape 1,12,1024,64
    #[arg(long, value_name = "B,H,S,D")]
    pub(crate) shape: Vec<ShapeArg>,

    /// Key/value heads of the random input; they must divide the heads (grouped-query attention).
    ///
    /// Example: --shape 1,32,1024,128 --kv-heads 8
    #[arg(long, value_name = "N", requires = "shape")]
    pub(crate) kv_heads: Option<usize>,

    /// The causal mask only; without it each input is computed full and causal.
    ///
    /// Where queries and keys differ in number, the last query sees the last key. Example: --shape 1,8,2048,64 --causal
    #[arg(long)]
    pub(crate) causal: bool,

    /// Rounds of each measurement, of which the median counts [default: 7, with --quick 3].
    ///
    /// A round repeats short work until it fills some tens of milliseconds. Example: --repeat 21
    #[arg(long, value_name = "N", value_parser = at_most::<10_000>)]
    pub(crate) repeat: Option<usize>,

    /// A shorter run: fewer rounds, and the longest inputs are left out.
    ///
    /// Example: qkv bench --quick
    #[arg(long)]
    pub(crate) quick: bool,
}

impl Sizes {
    /// Rounds of each measurement.
    pub(crate) fn rounds(&self) -> usize {
        rounds(self.repeat, self.quick)
    }

    /// Which masks to compute: `true` is causal.
    pub(crate) fn masks(&self) -> &'static [bool] {
        if self.causal { &[true] } else { &[false, true] }
    }
}

fn rounds(repeat: Option<usize>, quick: bool) -> usize {
    repeat.unwrap_or(if quick { 3 } else { 7 })
}

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BenchCommand>,
    #[command(flatten)]
    pub(crate) sizes: Sizes,
}

/// What else to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure one step of decoding over a cache of keys and values.
    ///
    /// In a step every head has one new query row (--queries: a few) that attends to all keys of its sequence, so
    /// reading the keys and values is what takes the time. Without --shape: batch 1 with 32 heads over 8 key/value heads
    /// and 8192 keys, batch 8 with 32 heads over 8 and 1024 keys, and batch 1 with 32 heads over 32 and 4096 keys, all of
    /// head dim 128; each stored as f32, bf16, f16 and int8 (one scale per key and head), and the first also as f32 in
    /// pages of 16 tokens, in no order, as a pool has them that has been used for a while.
    ///
    /// Shown are the time of a step, tokens/s (batch times queries over the time) and GB/s (bytes of all keys and values,
    /// scales among them, over the time). The roofline is the time that a step takes at least: the larger of its bytes
    /// over the bandwidth of reading memory and its FLOP, 2 (key dim + value dim) for each visible score, over the peak of
    /// multiply-adds. Both are measured before and after each row's turn, with the same threads; medians of the
    /// rounds are shown.
    ///
    /// A cache smaller than the L3 cache would be read from there, where no model finds it: its weights have passed
    /// through since the last step. So each step reads another copy, of as many as make at least four times the L3 cache
    /// (and at least 128 MiB, at most 1 GiB, where one copy is not more); the bandwidth is that of a buffer of their size.
    #[command(after_help = DECODE)]
    Decode(DecodeArgs),
}

#[derive(Args, Debug)]
pub(crate) struct DecodeArgs {
    /// A cache of this shape: batch, query heads, keys, head dim. May be given several times.
    ///
    /// Values are random, the same on every machine. Example: --shape 1,32,8192,128
    #[arg(long, value_name = "B,H,KEYS,D")]
    pub(crate) shape: Vec<ShapeArg>,

    /// Key/value heads of the given shapes; they must divide the heads (grouped-query attention).
    ///
    /// Example: --shape 1,32,8192,128 --kv-heads 8
    #[arg(long, value_name = "N", requires = "shape")]
    pub(crate) kv_heads: Option<usize>,

    /// What keys and values are stored as: some of f32, bf16, f16 and int8, with commas between them.
    ///
    /// Example: --storage bf16,int8
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "f32,bf16,f16,int8",
        hide_possible_values = true
    )]
    pub(crate) storage: Vec<StorageArg>,

    /// New query rows of each head, as in speculative decoding; they are the last tokens of the cache.
    ///
    /// Each sees the keys up to its own. Example: --queries 4
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_most::<4096>)]
    pub(crate) queries: usize,

    /// Rounds of each measurement, of which the median counts [default: 7, with --quick 3].
    ///
    /// A round repeats steps until they fill some tens of milliseconds. Example: --repeat 21
    #[arg(long, value_name = "N", value_parser = at_most::<10_000>)]
    pub(crate) repeat: Option<usize>,

    /// A shorter run: fewer rounds, and caches of a quarter of the keys, where no --shape is given.
    ///
    /// Example: qkv bench decode --quick
    #[arg(long)]
    pub(crate) quick: bool,
}

impl DecodeArgs {
    /// Rounds of each measurement.
    pub(crate) fn rounds(&self) -> usize {
        rounds(self.repeat, self.quick)
    }
}

/// What `--storage` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StorageArg {
    F32,
    Bf16,
    F16,
    Int8,
}

impl StorageArg {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }

    pub(crate) fn storage(self) -> Storage {
        match self {
            Self::F32 => Storage::F32,
            Self::Bf16 => Storage::Bf16,
            Self::F16 => Storage::F16,
            Self::Int8 => Storage::Int8 { group: None, zero_point: false },
        }
    }

    /// Bytes of a row of a cache, its scale among them.
    pub(crate) fn row_bytes(self, dim: f64) -> f64 {
        match self {
            Self::F32 => 4.0 * dim,
            Self::Bf16 | Self::F16 => 2.0 * dim,
            Self::Int8 => dim + 4.0,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct CompareArgs {
    /// Your own tensors: a safetensors file with q, k and v, or NAME.q, NAME.k and NAME.v.
    ///
    /// Tensors are f32 of shape (batch, heads, length, head dim), or (heads, length, head dim). A tensor
    /// `out` (or NAME.out) is taken as the output without a mask (with --causal: with it) and compared as well.
    /// Example: --input mine.safetensors
    #[arg(long, value_name = "FILE", conflicts_with = "shape")]
    pub(crate) input: Option<PathBuf>,

    /// Only the tensors NAME.q, NAME.k and NAME.v of the input file.
    ///
    /// Example: --input testdata/minilm.safetensors --prefix layer0
    #[arg(long, value_name = "NAME", requires = "input")]
    pub(crate) prefix: Option<String>,

    #[command(flatten)]
    pub(crate) sizes: Sizes,
}

#[derive(Args, Debug)]
pub(crate) struct WalkthroughArgs {
    /// The sentence, 1 to 12 words.
    ///
    /// Example: --sentence "to be or not to be"
    #[arg(long, value_name = "TEXT", default_value = "the cat sat on the mat")]
    pub(crate) sentence: String,

    /// Let each word see only itself and the words before it.
    ///
    /// Example: qkv walkthrough --causal
    #[arg(long)]
    pub(crate) causal: bool,

    /// Features of each word, 4 to 8.
    ///
    /// Example: --dim 8
    #[arg(long, value_name = "N", default_value = "4", value_parser = walkthrough_dim)]
    pub(crate) dim: usize,
}

/// The four sizes of `--shape`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShapeArg {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) length: usize,
    pub(crate) dim: usize,
}

impl FromStr for ShapeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(',').map(str::trim).collect();
        let &[batch, heads, length, dim] = parts.as_slice() else {
            let given = parts.len();
            return Err(format!("{given} numbers, expected 4: batch,heads,length,dim, like 1,12,1024,64"));
        };
        let number = |axis: &str, text: &str| {
            text.parse::<usize>().map_err(|error| format!("{axis} is \"{text}\", expected a number: {error}"))
        };
        Ok(Self {
            batch: number("batch", batch)?,
            heads: number("heads", heads)?,
            length: number("length", length)?,
            dim: number("dim", dim)?,
        })
    }
}

/// A number from 1 to `MOST`.
fn at_most<const MOST: usize>(text: &str) -> Result<usize, String> {
    in_range(text, 1, MOST)
}

fn walkthrough_dim(text: &str) -> Result<usize, String> {
    in_range(text, 4, 8)
}

fn in_range(text: &str, least: usize, most: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("expected a number from {least} to {most}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_explains_itself_with_an_example() {
        fn check(command: &clap::Command) {
            for arg in
                command.get_arguments().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version"))
            {
                let help = arg.get_long_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example: "), "{} {}: {help}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().filter(|command| command.get_name() != "help").for_each(check);
        }
        let mut root = Cli::command();
        root.build();
        root.get_subcommands().filter(|command| command.get_name() != "help").for_each(check);
    }

    #[test]
    fn shapes_parse_or_say_why_not() {
        let shape = "1, 12,1024,64".parse::<ShapeArg>();
        assert_eq!(shape, Ok(ShapeArg { batch: 1, heads: 12, length: 1024, dim: 64 }));
        for (bad, because) in [
            ("", "1 numbers"),
            ("1,2,3", "3 numbers"),
            ("1,2,3,4,5", "5 numbers"),
            ("1,2,3,x", "dim is \"x\""),
            ("1,-2,3,4", "heads is \"-2\""),
            ("1,2,99999999999999999999999,4", "too large"),
        ] {
            let error = bad.parse::<ShapeArg>().unwrap_err();
            assert!(error.contains(because), "{bad}: {error}");
        }
    }
}
