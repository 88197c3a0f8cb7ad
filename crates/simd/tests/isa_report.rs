//! A report in place of a test: one line per instruction set that qkv has a name for, saying whether it was executed on
//! this machine or why not, so that a green run cannot hide that a vector unit was never touched.
//!
//! ```text
//! portable  executed (4 lanes, 16 registers)
//! simd128   NOT EXECUTED: not supported by this build
//! neon      NOT EXECUTED: not supported by this build
//! avx2      executed (8 lanes, 16 registers)
//! avx512    executed (16 lanes, 32 registers), active
//! active: avx512, the best of this CPU (QKV_ISA is not set)
//! ```
//!
//! The exit code is 1 where `QKV_ISA` names something that cannot be executed, or where an instruction set computes
//! nonsense. It has no harness: its lines show without `--nocapture`, and whatever arguments come are ignored.

use std::process::ExitCode;

use qkv_simd::{Isa, IsaError, IsaKind, Simd, SimdOp, math};

/// 2^-lane in each lane through the hot function, added up: 2 less the last term, exactly. And the registers.
struct Probe;

impl SimdOp for Probe {
    type Output = (f32, usize);
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> (f32, usize) {
        let powers = math::exp2_nonpositive(s, s.sub(s.zero(), s.iota()));
        (s.reduce_add(powers), S::REGISTERS)
    }
}

/// What is said about an instruction set, and whether that is no cause for alarm.
fn line(kind: IsaKind) -> (String, bool) {
    let isa = match Isa::with_kind(kind) {
        Ok(isa) => isa,
        Err(IsaError::NotOnThisCpu { .. }) => return ("NOT EXECUTED: this CPU lacks it".to_owned(), true),
        Err(IsaError::NotBuilt { .. }) => {
            return ("NOT EXECUTED: not supported by this build".to_owned(), true);
        }
        Err(error) => return (format!("NOT EXECUTED: {error}"), false),
    };
    let (sum, registers) = isa.dispatch(Probe);
    let want = 2.0 - (1.0 - isa.lanes() as f32).exp2();
    if sum == want {
        (format!("executed ({} lanes, {registers} registers)", isa.lanes()), true)
    } else {
        (format!("EXECUTED WRONGLY: the sum of powers is {sum}, not {want}"), false)
    }
}

fn main() -> ExitCode {
    // Test runners that list what there is find nothing here.
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    let active = Isa::active();
    let mut fine = true;
    for kind in IsaKind::ALL {
        let (text, good) = line(kind);
        let mark = if active.as_ref().is_ok_and(|isa| isa.kind() == kind) { ", active" } else { "" };
        println!("{:<9} {text}{mark}", kind.name());
        fine &= good;
    }
    match (active, std::env::var_os("QKV_ISA")) {
        (Ok(isa), None) => println!("active: {}, the best of this CPU (QKV_ISA is not set)", isa.kind()),
        (Ok(isa), Some(_)) => println!("active: {}, because QKV_ISA says so", isa.kind()),
        (Err(error), _) => {
            println!("active: none, QKV_ISA cannot be obeyed");
            eprintln!("error: QKV_ISA: {error}");
            fine = false;
        }
    }
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
