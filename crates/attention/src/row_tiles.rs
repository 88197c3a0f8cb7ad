//! Rows cut into register tiles: as many of MR as there are, and an even last pair instead of a thin last one.

/// Something done for a tile of `ROWS` rows from row `first` on.
pub(crate) trait RowsOp {
    /// Implementations must be `#[inline(always)]`.
    fn run<const ROWS: usize>(&mut self, first: usize);
}

/// Calls `op` for tiles that cover `rows` rows, in order, none of more than `MR`.
///
/// A tile of 2 rows keeps the FMA pipes half busy (4 chains of latency 4 on two pipes), so 8 rows with MR = 6 are cut
/// 4 + 4, not 6 + 2. One loop over one match: each size of tile is compiled once.
#[inline(always)]
pub(crate) fn for_row_tiles<const MR: usize, O: RowsOp>(rows: usize, op: &mut O) {
    let mut at = 0;
    while at < rows {
        let left = rows - at;
        let part = match left {
            _ if left >= 2 * MR => MR,
            _ if left > MR => left.div_ceil(2),
            _ => left,
        };
        // The guards are constants: tiles of more than MR rows are not compiled.
        match part {
            6 if MR >= 6 => op.run::<6>(at),
            5 if MR >= 5 => op.run::<5>(at),
            4 if MR >= 4 => op.run::<4>(at),
            3 if MR >= 3 => op.run::<3>(at),
            2 if MR >= 2 => op.run::<2>(at),
            _ => {
                debug_assert_eq!(part, 1);
                op.run::<1>(at);
            }
        }
        at += part;
    }
}
