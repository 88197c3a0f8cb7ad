//! `measure matrix`: rounds of (limit, workload) pairs, and what comes out of them.
//!
//! In every round each workload has one turn: a stretch of repeated calls with the limit measured before and after it,
//! see support/turn.rs. The order rotates from round to round, so that no workload always follows the same one. The
//! figure of a workload is the median of its ratios to the limit; the quartiles beside it show how steady they were.
//!
//! Where the goal is a fraction of the rate without a mask, the two take turns call by call on the same inputs, after the
//! workload's own stretch: two ratios to the limit would bring the noise of four measurements of it.

use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use qkv_benches::{
    AttentionShape, Call, Environment, Lengths, Limit, Turn, Workload, flops_per_cycle, median,
    prepare_attention, quartiles, ratio_of_two,
};
use serde::Serialize;

use crate::goals::{Goal, Row, rows};
use crate::report;

/// What `measure matrix` can be told.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rounds, of which the medians are printed.
    #[arg(long, default_value = "9", value_parser = crate::positive)]
    rounds: usize,
    /// Least length of a workload's turn, in seconds.
    #[arg(long, default_value = "0.06", value_parser = crate::seconds)]
    seconds: Duration,
    /// Length of each measurement of the limit, in seconds.
    #[arg(long, default_value = "0.02", value_parser = crate::seconds)]
    probe_seconds: Duration,
    /// One half of the table.
    #[arg(long)]
    only: Option<Half>,
    /// Rows whose name contains this text, e.g. "d64" or "gemm 512"; may be given several times.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Prints everything that was measured as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Half {
    Attention,
    Gemm,
}

impl Options {
    fn wants(&self, row: &Row) -> bool {
        let half = match row.workload {
            Workload::Attention(_) => Half::Attention,
            Workload::Gemm(_) => Half::Gemm,
        };
        let name = row.workload.to_string();
        self.only.is_none_or(|only| only == half)
            && (self.filter.is_empty() || self.filter.iter().any(|text| name.contains(text.as_str())))
    }
}

/// What is said about a workload in the end.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) workload: Workload,
    /// Of what `percent` is a part: "GFLOP/s" of multiply-adds or "GB/s" read.
    pub(crate) unit: &'static str,
    /// Median of the rates, in that unit.
    pub(crate) rate: f64,
    /// Median of the times of a call, in microseconds.
    pub(crate) microseconds: f64,
    /// Median of the ratios to the limit, in percent, with their quartiles.
    pub(crate) percent: f64,
    pub(crate) quartiles: (f64, f64),
    /// Median over the rounds of the rate over that of the same shape without a mask.
    pub(crate) of_full: Option<f64>,
    /// The goal in percent of the limit; None where this machine cannot tell.
    pub(crate) goal: Option<f64>,
    /// Whether the goal is a fraction of the rate without a mask instead.
    pub(crate) goal_is_fraction: bool,
    /// What is left to the goal (negative: missing), in percent of the limit or of the full rate.
    pub(crate) margin: Option<f64>,
    pub(crate) turns: Vec<Turn>,
}

/// Everything that `measure matrix` has found out.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Matrix {
    pub(crate) environment: Environment,
    pub(crate) flops_per_cycle: u32,
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    /// Median of all measurements of the peak, and their quartiles, in GFLOP/s; None where no row asked for it.
    pub(crate) peak: Option<(f64, (f64, f64))>,
    /// The same of the read bandwidth, in GB/s.
    pub(crate) bandwidth: Option<(f64, (f64, f64))>,
    pub(crate) rows: Vec<Outcome>,
}

/// The row, its prepared call, and its turns so far.
struct Runner {
    row: Row,
    call: Call,
    turns: Vec<Turn>,
    /// With the mask or without, where these two are compared, and the ratios of their rates.
    either: Option<Box<dyn FnMut(bool)>>,
    of_full: Vec<f64>,
}

/// Stretches of a comparison of two, so that calls of 20 and 10 ms take half a dozen turns.
const STRETCHES_OF_TWO: u32 = 3;

impl Runner {
    fn turn(&mut self, options: &Options, threads: usize) -> Result<(), Box<dyn Error>> {
        let Row { limit, workload, .. } = self.row;
        let amount = match (limit, workload) {
            (Limit::Bandwidth, Workload::Gemm(shape)) => shape.bytes_read(),
            _ => workload.flops(),
        };
        let lengths = Lengths { stretch: options.seconds, probe: options.probe_seconds };
        self.turns.push(Turn::take(limit, amount, threads, lengths, &mut self.call)?);
        if let (Some(either), Some(shape)) = (&mut self.either, self.row.of_full()) {
            let work = workload.flops() / AttentionShape { causal: false, ..shape }.flops();
            self.of_full.push(work / ratio_of_two(STRETCHES_OF_TWO * options.seconds, either));
        }
        Ok(())
    }

    fn percents(&self) -> Vec<f64> {
        self.turns.iter().map(Turn::percent).collect()
    }

    fn outcome(&self, flops_per_cycle: u32) -> Outcome {
        let of = |f: fn(&Turn) -> f64| median(&self.turns.iter().map(f).collect::<Vec<_>>());
        let percents = self.percents();
        let percent = median(&percents);
        let of_full = (!self.of_full.is_empty()).then(|| median(&self.of_full));
        let goal = match self.row.goal {
            Goal::OfFull(fraction) => Some(fraction),
            _ => self.row.percent(flops_per_cycle),
        };
        let margin = match self.row.goal {
            Goal::OfFull(fraction) => of_full.map(|of_full| 100.0 * (of_full - fraction)),
            _ => goal.map(|goal| percent - goal),
        };
        Outcome {
            name: self.row.workload.to_string(),
            workload: self.row.workload,
            unit: self.row.limit.unit(),
            rate: of(|turn| turn.rate),
            microseconds: of(|turn| 1e6 * turn.seconds),
            percent,
            quartiles: quartiles(&percents),
            of_full,
            goal,
            goal_is_fraction: matches!(self.row.goal, Goal::OfFull(_)),
            margin,
            turns: self.turns.clone(),
        }
    }
}

/// Median and quartiles of the limits that were measured for rows of this kind.
fn limits(runners: &[Runner], limit: Limit) -> Option<(f64, (f64, f64))> {
    let of_kind = runners.iter().filter(|runner| runner.row.limit == limit);
    let all: Vec<f64> = of_kind.flat_map(|runner| &runner.turns).map(|turn| turn.limit).collect();
    (!all.is_empty()).then(|| (median(&all), quartiles(&all)))
}

/// A line on standard error that is rewritten, where somebody watches.
fn progress(text: &str) {
    let mut err = io::stderr();
    if err.is_terminal() {
        // Whether the line can be written makes no difference to the measurement.
        let _ = write!(err, "\r{text}\x1b[K").and_then(|()| err.flush());
    }
}

/// Measures and prints.
///
/// # Errors
/// Where no row is left, `QKV_ISA` cannot be used, or memory or threads are refused.
pub(crate) fn run(options: &Options, threads: usize) -> Result<(), Box<dyn Error>> {
    let wanted: Vec<Row> = rows().into_iter().filter(|row| options.wants(row)).collect();
    if wanted.is_empty() {
        return Err("--only and --filter leave no row of the table".into());
    }
    let flops_per_cycle = flops_per_cycle()?;
    let mut runners = Vec::with_capacity(wanted.len());
    for row in wanted {
        let call = row.workload.prepare()?;
        let either = row.of_full().map(prepare_attention).transpose()?;
        let either = either.map(|call| Box::new(call) as Box<dyn FnMut(bool)>);
        let turns = Vec::with_capacity(options.rounds);
        runners.push(Runner { row, call, turns, either, of_full: Vec::new() });
    }
    let count = runners.len();
    for round in 0..options.rounds {
        for turn in 0..count {
            // A step that shares no divisor with the number of rows would shuffle more; a rotation is easier to follow.
            let runner = &mut runners[(round + turn) % count];
            progress(&format!("round {} of {}: {}", round + 1, options.rounds, runner.row.workload));
            runner.turn(options, threads)?;
        }
    }
    progress("");
    let matrix = Matrix {
        environment: Environment::read()?,
        flops_per_cycle,
        rounds: options.rounds,
        seconds: options.seconds.as_secs_f64(),
        peak: limits(&runners, Limit::Peak),
        bandwidth: limits(&runners, Limit::Bandwidth),
        rows: runners.iter().map(|runner| runner.outcome(flops_per_cycle)).collect(),
    };
    if options.json {
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&matrix)?)?;
    } else {
        write!(io::stdout(), "{}", report::table(&matrix))?;
    }
    Ok(())
}
