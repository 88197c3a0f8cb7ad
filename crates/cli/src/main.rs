//! The program `qkv`: what the library does on this machine, for people and (`--json`) for scripts.
//!
//! It translates and shows, it computes nothing of its own: attention, the references and the probes are the library's.
//! One file per subcommand ([`info`], [`mod@bench`], [`decode`], [`compare`], [`walkthrough`]), and beside them what they share:
//! the command line ([`args`]), where tensors come from ([`input`]), timing ([`measure`]), errors against the exact
//! result ([`accuracy`]), bytes ([`memory`]) and tables ([`output`]).
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 a comparison failed its
//! tolerance, 2 bad arguments or bad input, with one line that says which.

mod accuracy;
mod args;
mod bench;
mod compare;
mod decode;
mod info;
mod input;
mod measure;
mod memory;
mod output;
mod walkthrough;

use std::fmt;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use qkv::AttentionError;
use qkv::cache::CacheError;
use qkv::probe::ProbeError;
use qkv::simd::{Isa, IsaError};
use serde::Serialize;

use crate::args::{BenchCommand, Cli, Command, Common, CompareArgs, Sizes};

/// A comparison failed its tolerance.
const FAILED: u8 = 1;
/// Bad arguments or bad input.
const REFUSED: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_parsed(&error),
    };
    match run(cli) {
        Ok(report) => match output::print(&report.text) {
            Ok(()) if report.complaints.is_empty() => ExitCode::SUCCESS,
            Ok(()) => {
                for complaint in report.complaints {
                    output::complain(&format!("failed: {complaint}"));
                }
                ExitCode::from(FAILED)
            }
            Err(error) => refuse(&format!("cannot write the results: {error}")),
        },
        Err(failure) => refuse(&failure.to_string()),
    }
}

fn run(cli: Cli) -> Result<Report, Failure> {
    let context = Context::new(&cli.common)?;
    match cli.command.unwrap_or(Command::Compare(CompareArgs::plain())) {
        Command::Info => info::run(&context),
        Command::Bench(args) => match &args.command {
            None => bench::run(&args.sizes, &context),
            // Clap could refuse these, but would refuse the common options with them.
            Some(_) if args.sizes != Sizes::default() => Err(Failure::new(
                "the options of bench decode come after decode (see qkv bench decode --help)",
            )),
            Some(BenchCommand::Decode(args)) => decode::run(args, &context),
        },
        Command::Compare(args) => compare::run(&args, &context),
        Command::Walkthrough(args) => walkthrough::run(&args, &context),
    }
}

impl CompareArgs {
    /// As without any option.
    fn plain() -> Self {
        Self { input: None, prefix: None, sizes: Sizes::default() }
    }
}

/// What holds for the whole run.
#[derive(Debug)]
pub(crate) struct Context {
    json: bool,
    threads: usize,
    isa: Isa,
}

impl Context {
    /// Decides the instruction set and the number of threads, before anything has used either.
    fn new(common: &Common) -> Result<Self, Failure> {
        let isa = match common.isa {
            Some(kind) => Isa::choose(kind)?,
            None => Isa::active()?,
        };
        if let Some(threads) = common.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build_global()
                .map_err(|error| Failure::new(format!("--threads {threads}: {error}")))?;
        }
        Ok(Self { json: common.json, threads: rayon::current_num_threads(), isa })
    }

    /// One line on who computes.
    fn title(&self) -> String {
        let threads =
            if self.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", self.threads) };
        output::heading(&format!("qkv {}, {}, {threads}", env!("CARGO_PKG_VERSION"), self.isa.kind()))
    }
}

/// What a subcommand has to say.
#[derive(Debug)]
pub(crate) struct Report {
    /// For standard output.
    text: String,
    /// Comparisons that failed, for standard error.
    complaints: Vec<String>,
}

impl Report {
    /// A result that cannot fail, as JSON where that is asked for.
    fn new(context: &Context, json: &impl Serialize, text: impl FnOnce() -> String) -> Result<Self, Failure> {
        let text = if context.json {
            let mut json = serde_json::to_string_pretty(json)
                .map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
            json.push('\n');
            json
        } else {
            text()
        };
        Ok(Self { text, complaints: Vec::new() })
    }
}

/// Why there is no result: one line.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    /// Says first what it is about.
    pub(crate) fn about(self, what: &str) -> Self {
        Self(format!("{what}: {}", self.0))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<AttentionError> for Failure {
    fn from(error: AttentionError) -> Self {
        Self(error.to_string())
    }
}

impl From<CacheError> for Failure {
    fn from(error: CacheError) -> Self {
        Self(error.to_string())
    }
}

impl From<ProbeError> for Failure {
    fn from(error: ProbeError) -> Self {
        Self(error.to_string())
    }
}

impl From<IsaError> for Failure {
    fn from(error: IsaError) -> Self {
        Self(error.to_string())
    }
}

/// Help and version go where results go; everything else that clap has to say is a refusal, told in one line.
fn not_parsed(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match output::sent(error.print()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => refuse(&format!("cannot write the help: {error}")),
        };
    }
    // The first paragraph names the argument and the fault; usage and hints follow after an empty line.
    let whole = error.render().to_string();
    let first: Vec<&str> = whole.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let text = first.join(" ");
    refuse(&format!("{} (see --help)", text.strip_prefix("error: ").unwrap_or(&text)))
}

fn refuse(why: &str) -> ExitCode {
    // Whatever a file name or an argument contains: one line.
    let line: String = why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    output::complain(&format!("error: {line}"));
    ExitCode::from(REFUSED)
}
