//! Rows cut into register tiles: as many of MR as there are, and an even last pair instead of a thin last one.

/// Something done for a tile of `ROWS` rows from row `first` on.
pub(crate) trait RowsOp {
    /// Implementations must be `#[inline(always)]`.
    fn run<const ROWS: usize>(&mut self, first: usize);
}

/// Calls `op` for tiles that cover `rows` rows, in order, none of more than `MR`.
///
/// A tile of 2 rows keeps the FMA pipes half busy (4 chains of latency 4 on two pipes), so 8 rows with MR = 6 are cut
/// 4 + 4, not 6 + 2.
#[inline(always)]
pub(crate) fn for_row_tiles<const MR: usize, O: RowsOp>(rows: usize, op: &mut O) {
    let mut at = 0;
    let rest = rows % MR;
    let full = if rest == 0 { rows } else { (rows - rest).saturating_sub(MR) };
    while at < full {
        op.run::<MR>(at);
        at += MR;
    }
    let left = rows - at;
    let first = if left > MR { left.div_ceil(2) } else { left };
    for part in [first, left - first] {
        run_rows::<MR, O>(part, at, op);
        at += part;
    }
}

/// Turns a number of rows into a type. The guards are constants: tiles of more than MR rows are not compiled.
#[inline(always)]
fn run_rows<const MR: usize, O: RowsOp>(rows: usize, first: usize, op: &mut O) {
    match rows {
        0 => {}
        1 => op.run::<1>(first),
        2 if MR >= 2 => op.run::<2>(first),
        3 if MR >= 3 => op.run::<3>(first),
        4 if MR >= 4 => op.run::<4>(first),
        5 if MR >= 5 => op.run::<5>(first),
        6 if MR >= 6 => op.run::<6>(first),
        _ => unreachable!("row tiles are at most MR"),
    }
}
