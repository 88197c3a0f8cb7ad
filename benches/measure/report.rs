//! The printed table of `measure matrix`: what was measured where, then one line for each workload, at most 100 columns.

use std::fmt::Write;

use crate::matrix::{Matrix, Outcome};

/// The goal as the table shows it: percent of the limit, or a fraction of the rate without a mask.
fn goal(row: &Outcome) -> String {
    match row.goal {
        None => "best peer".to_owned(),
        Some(fraction) if row.goal_is_fraction => format!("{fraction:.2} x full"),
        Some(percent) => format!("{percent:.1}"),
    }
}

/// "met", or by how much not; a dash where this run cannot tell.
fn verdict(row: &Outcome) -> String {
    let of_full = row.of_full.map(|fraction| format!("{fraction:.3} ")).unwrap_or_default();
    match row.margin {
        None => "-".to_owned(),
        Some(margin) if margin >= 0.0 => of_full + "met",
        Some(_) if row.of_full.is_some() => of_full + "no",
        Some(margin) => format!("{margin:.1}"),
    }
}

/// Head, table, and a note on what cannot be told here.
pub(crate) fn table(matrix: &Matrix) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{words}");
    };
    line(matrix.environment.to_string());
    let mut limits = Vec::new();
    if let Some((peak, (low, high))) = matrix.peak {
        limits.push(format!("peak {peak:.1} GFLOP/s ({low:.1} to {high:.1})"));
    }
    if let Some((bandwidth, (low, high))) = matrix.bandwidth {
        limits.push(format!("reading {bandwidth:.1} GB/s ({low:.1} to {high:.1})"));
    }
    line(format!("{}, {} FLOP per cycle and core", limits.join(", "), matrix.flops_per_cycle));
    let stretch = 1e3 * matrix.seconds;
    line(format!(
        "medians of {} rounds of at least {stretch:.0} ms; in brackets the quartiles",
        matrix.rounds
    ));
    line(String::new());

    let name_width = matrix.rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max("workload".len());
    line(format!(
        "{:name_width$} {:>10} {:>9} {:>6} {:^15} {:>11} {:>10}",
        "workload", "us a call", "GFLOP/s", "%", "(quartiles)", "goal", ""
    ));
    for row in &matrix.rows {
        // Where reading is the limit, the unit is another one and says so.
        let rate =
            if row.unit == "GB/s" { format!("{:.1} GB/s", row.rate) } else { format!("{:.1}", row.rate) };
        let (low, high) = row.quartiles;
        line(format!(
            "{:name_width$} {:>10.1} {rate:>9} {:>6.1} {:^15} {:>11} {:>10}",
            row.name,
            row.microseconds,
            row.percent,
            format!("({low:.1} to {high:.1})"),
            goal(row),
            verdict(row)
        ));
    }
    if matrix.rows.iter().any(|row| row.goal.is_none()) {
        line(String::new());
        line(
            "best peer: scripts/gemm_peers.py can tell, the recorded figures are of another machine"
                .to_owned(),
        );
    }
    text
}
