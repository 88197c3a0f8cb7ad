//! Rows cut into register tiles: one rule for matrix products and for both products of attention.

/// The rows of the next tile where `left` rows are left: `mr` as long as there are enough, and at the end two tiles of
/// about half each rather than a tile with too few accumulators to hide the latency of the multiply-add: 7 rows are
/// 4 + 3, not 6 + 1. Where tiles may not begin at any row, the last one has what is left.
#[inline(always)]
pub(crate) fn next_rows(left: usize, mr: usize, any_row: bool) -> usize {
    if !any_row || left <= mr || left >= 2 * mr || left + 2 >= 2 * mr {
        left.min(mr)
    } else {
        left.div_ceil(2)
    }
}

/// Evaluates `$body` with the constant `$r` equal to `$rows`, which is at most `$mr`.
macro_rules! with_rows {
    ($rows:expr, $mr:expr, $r:ident => $body:block) => {
        with_rows!(@ $rows, $mr, $r, $body, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
    };
    (@ $rows:expr, $mr:expr, $r:ident, $body:block, $($n:literal)*) => {
        match $rows {
            // The second condition is constant: arms above the tile's rows leave no machine code.
            $($n if $n <= $mr => {
                const $r: usize = $n;
                $body
            })*
            _ => {}
        }
    };
}
pub(crate) use with_rows;

/// Something done for a tile of `ROWS` rows from row `first` on.
pub trait RowsOp {
    /// Implementations must be `#[inline(always)]`.
    fn run<const ROWS: usize>(&mut self, first: usize);
}

/// Calls `op` for tiles that cover `rows` rows, in order, none of more than `MR`; a thin last tile is avoided by two even
/// ones. One loop over one match: each size of tile is compiled once.
#[inline(always)]
pub fn for_row_tiles<const MR: usize, O: RowsOp>(rows: usize, op: &mut O) {
    let mut at = 0;
    while at < rows {
        let part = next_rows(rows - at, MR, true);
        with_rows!(part, MR, ROWS => { op.run::<ROWS>(at) });
        at += part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_rows_without_a_thin_one() {
        for mr in [4, 6, 8] {
            for rows in 0..100 {
                let (mut left, mut sizes) = (rows, Vec::new());
                while left > 0 {
                    let next = next_rows(left, mr, true);
                    assert!((1..=mr).contains(&next));
                    sizes.push(next);
                    left -= next;
                }
                assert_eq!(sizes.iter().sum::<usize>(), rows);
                assert_eq!(sizes.len(), rows.div_ceil(mr));
                assert!(rows < mr || sizes.iter().all(|&r| 2 * r >= mr), "{rows} rows as {sizes:?}");
            }
        }
    }
}
