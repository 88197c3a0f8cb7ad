//! What the reader sees: tables, numbers, colours, the progress bar, and the way to standard output.
//!
//! Results are put together as text and written in one go, so that a reader who went away (`qkv bench | head`) is
//! noticed in one place. Colours and the progress bar appear on terminals only. No line is longer than [`WIDTH`].

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, LineStyle, Table, TableStyle};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Columns of the widest line.
pub(crate) const WIDTH: u16 = 100;

/// A line under the header, and nothing else.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::new('─', '─', '─', '─'));

/// Writes a line to standard error, or nowhere where nobody listens.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes to standard output. A reader who has closed it is no error.
pub(crate) fn print(text: &str) -> io::Result<()> {
    sent(io::stdout().lock().write_all(text.as_bytes()))
}

/// What became of a write to standard output, once all of it has left.
pub(crate) fn sent(written: io::Result<()>) -> io::Result<()> {
    match written.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Whether standard output takes colours: a terminal, and the reader has not asked for none (no-color.org).
pub(crate) fn colours() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal() && !unwanted
}

/// A table under construction: the first `labels` columns are words, the others numbers, aligned right.
#[derive(Debug)]
pub(crate) struct Grid {
    table: Table,
    labels: usize,
}

impl Grid {
    pub(crate) fn new<S: Into<String>>(labels: usize, header: impl IntoIterator<Item = S>) -> Self {
        let mut table = Self::bare();
        let cells = header.into_iter().enumerate().map(|(column, text)| {
            Cell::new(text.into()).add_attribute(Attribute::Bold).set_alignment(alignment(column, labels))
        });
        table.set_header(cells);
        Self { table, labels }
    }

    /// A table without a header.
    pub(crate) fn headless(labels: usize) -> Self {
        Self { table: Self::bare(), labels }
    }

    fn bare() -> Table {
        let mut table = Table::new();
        table.load_style(STYLE).set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH);
        if colours() {
            table.enforce_styling()
        } else {
            table.force_no_tty()
        };
        table
    }

    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.row_with(cells.into_iter().map(|text| (text.into(), Tone::Plain)));
    }

    /// A row with cells that stand out.
    pub(crate) fn row_with(&mut self, cells: impl IntoIterator<Item = (String, Tone)>) {
        let labels = self.labels;
        let cells = cells.into_iter().enumerate().map(|(column, (text, tone))| {
            let cell = Cell::new(text).set_alignment(alignment(column, labels));
            match tone {
                Tone::Plain => cell,
                Tone::Good => cell.fg(Color::Green),
                Tone::Bad => cell.fg(Color::Red).add_attribute(Attribute::Bold),
                Tone::Quiet => cell.fg(Color::DarkGrey),
            }
        });
        self.table.add_row(cells);
    }

    /// The table as text, a line feed at the end of each line.
    pub(crate) fn text(&self) -> String {
        self.table.lines().fold(String::new(), |mut text, line| {
            text.push_str(line.trim_end());
            text.push('\n');
            text
        })
    }
}

fn alignment(column: usize, labels: usize) -> CellAlignment {
    if column < labels { CellAlignment::Left } else { CellAlignment::Right }
}

/// What a cell says beyond its text, on terminals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Bad,
    Quiet,
}

/// A paragraph, broken into lines of at most [`WIDTH`] columns.
pub(crate) fn paragraph(text: &str) -> String {
    let mut lines = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let width = word.chars().count();
        if column > 0 && column + 1 + width > usize::from(WIDTH) {
            lines.push('\n');
            column = 0;
        } else if column > 0 {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += width;
    }
    lines.push('\n');
    lines
}

/// A line that stands out.
pub(crate) fn heading(text: &str) -> String {
    if colours() { format!("\u{1b}[1m{text}\u{1b}[0m\n") } else { format!("{text}\n") }
}

/// A number with three digits that count: 0.0123, 1.23, 12.3, 123, 1234.
pub(crate) fn three_digits(x: f64) -> String {
    let magnitude = x.abs();
    match magnitude {
        _ if !x.is_finite() => "-".to_owned(),
        m if m >= 99.95 => format!("{x:.0}"),
        m if m >= 9.995 => format!("{x:.1}"),
        m if m >= 0.9995 || m == 0.0 => format!("{x:.2}"),
        m if m >= 0.1 => format!("{x:.3}"),
        m if m >= 0.01 => format!("{x:.4}"),
        _ => format!("{x:.1e}"),
    }
}

/// A time with its unit.
pub(crate) fn seconds_text(seconds: f64) -> String {
    let (scale, unit) = match seconds {
        s if s >= 0.9995 => (1.0, "s"),
        s if s >= 0.9995e-3 => (1e3, "ms"),
        _ => (1e6, "us"),
    };
    format!("{} {unit}", three_digits(seconds * scale))
}

/// An error as in 4.7e-6; 0 is 0.
pub(crate) fn error_text(error: f64) -> String {
    if error == 0.0 { "0".to_owned() } else { format!("{error:.1e}") }
}

/// A progress bar on standard error, for people: drawn where that is a terminal and the work takes over a second.
///
/// It is drawn when a step begins or ends, never by a clock of its own: a thread that draws would disturb what is
/// measured meanwhile.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    started: Instant,
    expected: Duration,
    shown: bool,
}

impl Progress {
    /// A bar of this many steps, which are expected to take this many seconds.
    pub(crate) fn new(steps: usize, expected: f64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}") {
            bar.set_style(style);
        }
        let expected = Duration::try_from_secs_f64(expected).unwrap_or(Duration::MAX);
        Self { bar, started: Instant::now(), expected, shown: false }
    }

    /// Says what is being done now.
    pub(crate) fn doing(&mut self, what: impl Into<String>) {
        let long = self.expected.max(self.started.elapsed()) > Duration::from_secs(1);
        if !self.shown && long && io::stderr().is_terminal() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.shown = true;
        }
        self.bar.set_message(what.into());
    }

    /// One step is done.
    pub(crate) fn step(&mut self) {
        self.bar.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        for (x, text) in [
            (0.0, "0.00"),
            (1234.5, "1234"),
            (123.4, "123"),
            (99.96, "100"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.9996, "1.00"),
            (0.1234, "0.123"),
            (0.01234, "0.0123"),
            (0.001234, "1.2e-3"),
            (f64::INFINITY, "-"),
        ] {
            assert_eq!(three_digits(x), text);
        }
        assert_eq!(seconds_text(2.5), "2.50 s");
        assert_eq!(seconds_text(0.0123), "12.3 ms");
        assert_eq!(seconds_text(4.56e-5), "45.6 us");
        assert_eq!(error_text(4.7e-6), "4.7e-6");
    }

    #[test]
    fn paragraphs_are_broken_at_the_width() {
        let text = paragraph(&"twelve chars ".repeat(40));
        assert!(text.lines().count() > 4);
        assert!(text.lines().all(|line| line.len() <= usize::from(WIDTH) && !line.ends_with(' ')));
        assert_eq!(paragraph("  a \n b "), "a b\n");
    }

    #[test]
    fn tables_keep_the_width_and_align_numbers_right() {
        let mut grid = Grid::new(1, ["name", "value"]);
        grid.row(["a", "1.5"]);
        grid.row(["long ".repeat(60).as_str(), "12"]);
        let text = grid.text();
        assert!(text.lines().all(|line| line.chars().count() <= usize::from(WIDTH)), "{text}");
        assert!(text.lines().nth(2).is_some_and(|line| line.ends_with(" 1.5")), "{text}");
    }
}
