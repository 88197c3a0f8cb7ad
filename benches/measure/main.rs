//! `measure`: qkv against the limit of the machine, for people, for scripts and for the records.
//!
//! ```text
//! measure matrix                                            the table of goals: each workload in percent of the limit
//! measure features                                          what each mask and score option costs
//! measure decode                                            what a step of decoding reaches of the roofline
//! measure errors                                            errors against f64, beside scripts/peer_error.py
//! measure gemm --m 512 --k 512 --n 512 --seconds 0.05       one number, GFLOP/s
//! measure attention --batch 1 --heads 12 --seq 512 --dim 64 --causal --seconds 0.05
//! measure peak --threads 2 --seconds 0.2                    one number, GFLOP/s of multiply-adds on registers
//! measure bandwidth --mib 64 --seconds 0.2                  one number, GB/s read
//! ```
//!
//! The one-number commands end their standard output with that number, which is what scripts/gemm_peers.py and
//! scripts/attention_peers.py (`--qkv PATH`) and scripts/tune.py rely on. Exit codes: 0 done, 2 bad arguments.

mod decode;
mod errors;
mod features;
mod goals;
mod matrix;
mod report;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use qkv::gemm::Blocking;
use qkv_benches::{
    AttentionShape, Call, GemmShape, Lengths, Limit, Turn, Workload, fma_peak, prepare_product,
    read_bandwidth, seconds_per_call, use_threads,
};

/// Measures qkv against the limit of the machine.
#[derive(Debug, Parser)]
#[command(name = "measure", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads (default: RAYON_NUM_THREADS, else one for each CPU).
    #[arg(long, global = true, value_parser = positive)]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints the table of goals: every workload in percent of the limit measured right before it.
    Matrix(matrix::Options),
    /// Prints errors against f64 on the inputs of scripts/peer_error.py.
    Errors(errors::Options),
    /// Prints what each mask and score option costs beside the same call without it.
    Features(features::Options),
    /// Prints what a step of decoding reaches of the roofline, with every storage type.
    Decode(decode::Options),
    /// Prints the GFLOP/s of a product of an m x k and a k x n matrix.
    Gemm(GemmArgs),
    /// Prints the GFLOP/s of a call of attention.
    Attention(AttentionArgs),
    /// Prints the GFLOP/s of multiply-adds on registers.
    Peak(Stretch),
    /// Prints the GB/s of reading memory.
    Bandwidth(BandwidthArgs),
}

#[derive(Debug, Args)]
struct Stretch {
    /// Least time that is measured, in seconds.
    #[arg(long, default_value = "0.2", value_parser = seconds)]
    seconds: Duration,
}

#[derive(Debug, Args)]
struct How {
    #[command(flatten)]
    stretch: Stretch,
    /// Prints percent of the peak of multiply-adds, measured before and after, instead of GFLOP/s.
    #[arg(long)]
    percent: bool,
}

#[derive(Debug, Args)]
struct GemmArgs {
    /// Rows of A and of C.
    #[arg(long)]
    m: usize,
    /// Columns of A, rows of B.
    #[arg(long)]
    k: usize,
    /// Columns of B and of C.
    #[arg(long)]
    n: usize,
    /// Block sizes and what is packed (a, b, ab or none) instead of the planned ones.
    #[arg(long, value_name = "KC,MC,NC,ROWS,PACKED", value_parser = blocking)]
    blocking: Option<Blocking>,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct AttentionArgs {
    /// Batch.
    #[arg(long)]
    batch: usize,
    /// Query heads.
    #[arg(long)]
    heads: usize,
    /// Key/value heads (default: as many as query heads).
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Length of queries and keys.
    #[arg(long)]
    seq: usize,
    /// Dim of queries, keys and values.
    #[arg(long)]
    dim: usize,
    /// Query i sees keys 0 to i only; counts as half the operations.
    #[arg(long)]
    causal: bool,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct BandwidthArgs {
    /// Size of the memory that is read, in MiB.
    #[arg(long, default_value = "256", value_parser = positive)]
    mib: usize,
    /// In huge pages, where the system has them.
    #[arg(long)]
    huge_pages: bool,
    #[command(flatten)]
    stretch: Stretch,
}

/// A length of time that clap can read: positive and at most an hour.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 3600.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected a number of seconds above 0 and up to 3600".to_owned()),
    }
}

/// A number that is not 0.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number above 0".to_owned()),
        Ok(number) => Ok(number),
    }
}

/// Block sizes, as "256,96,512,2048,ab".
fn blocking(text: &str) -> Result<Blocking, String> {
    let parse = || {
        let (sizes, packed) = text.rsplit_once(',')?;
        let sizes: Result<Vec<usize>, _> = sizes.split(',').map(str::parse).collect();
        let [kc, mc, nc, rows] = sizes.ok()?.try_into().ok()?;
        let (pack_a, pack_b) = match packed {
            "ab" => (true, true),
            "a" => (true, false),
            "b" => (false, true),
            "none" => (false, false),
            _ => return None,
        };
        Some(Blocking { kc, mc, nc, rows, pack_a, pack_b })
    };
    parse().ok_or_else(|| "expected four sizes and what is packed, such as 256,96,512,2048,ab".to_owned())
}

/// Length of the peak's measurements for `--percent`.
const PROBE: Duration = Duration::from_millis(20);

/// What a call of `flops` operations reaches, as the last word.
fn print_rate(flops: f64, mut call: Call, how: &How, threads: usize) -> Result<(), Box<dyn Error>> {
    let stretch = how.stretch.seconds;
    if how.percent {
        let lengths = Lengths { stretch, probe: PROBE };
        writeln!(
            io::stdout(),
            "{:.2}",
            Turn::take(Limit::Peak, flops, threads, lengths, &mut call)?.percent()
        )?;
    } else {
        writeln!(io::stdout(), "{:.3}", 1e-9 * flops / seconds_per_call(stretch, &mut call))?;
    }
    Ok(())
}

fn run(cli: Cli) -> Result<(), Box<dyn Error>> {
    let threads = use_threads(cli.threads)?;
    match cli.command {
        Command::Matrix(options) => matrix::run(&options, threads),
        Command::Errors(options) => errors::run(&options),
        Command::Features(options) => features::run(&options),
        Command::Decode(options) => decode::run(&options, threads),
        Command::Gemm(GemmArgs { m, k, n, blocking, how }) => {
            let shape = GemmShape::new(m, k, n);
            print_rate(shape.flops(), prepare_product(shape, blocking)?, &how, threads)
        }
        Command::Attention(AttentionArgs { batch, heads, kv_heads, seq, dim, causal, how }) => {
            let kv_heads = kv_heads.unwrap_or(heads);
            let shape = AttentionShape { batch, heads, kv_heads, len: seq, dim, causal };
            print_rate(shape.flops(), Workload::Attention(shape).prepare()?, &how, threads)
        }
        Command::Peak(Stretch { seconds }) => {
            writeln!(io::stdout(), "{:.3}", fma_peak(threads, seconds)?)?;
            Ok(())
        }
        Command::Bandwidth(BandwidthArgs { mib, huge_pages, stretch }) => {
            let bytes = mib.checked_mul(1 << 20).ok_or("--mib: more than can be addressed")?;
            writeln!(io::stdout(), "{:.3}", read_bandwidth(threads, stretch.seconds, bytes, huge_pages)?)?;
            Ok(())
        }
    }
}

fn main() -> ExitCode {
    // A wrong command line ends in clap, with code 2; what is found out later is the caller's mistake as well: sizes that
    // qkv refuses, a QKV_ISA that this CPU lacks.
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader who has seen enough (`measure errors | head`).
        Err(problem)
            if problem.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::from(2)
        }
    }
}
