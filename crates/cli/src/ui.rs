//! What the user sees: results on standard output, everything else on standard error.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::{
    args::Global,
    exit::{Code, Failure},
};

/// Log lines go to standard error, so that results stay clean; prompts and answers are never logged.
pub(crate) fn start_log(global: &Global) -> anyhow::Result<()> {
    let filter = match (&global.log, global.verbose) {
        (Some(filter), _) => filter.as_str(),
        (None, 0) if global.quiet => "error",
        (None, 0) => "warn",
        (None, 1) => "info",
        (None, 2) => "info,murmur=debug,murmur_node=debug,murmur_engine=debug,murmur_api=debug,murmur_store=debug",
        (None, _) => "trace",
    };
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Failure::because(
            Code::Usage,
            format!("the log filter '{filter}' cannot be read: {error}. Write for instance info, or murmur_node=debug"),
        )
    })?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = if global.json {
        subscriber.json().try_init()
    } else {
        subscriber.with_ansi(io::stderr().is_terminal()).try_init()
    };
    started.map_err(|error| anyhow::anyhow!("the log cannot be started: {error}"))
}

/// A line on standard error.
pub(crate) fn say(line: &str) {
    // Standard error may be closed; there is nowhere left to say so.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Text on standard output, and out at once.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing to standard output")
}

/// A value as indented JSON on standard output.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Rows under headings, columns as wide as their content; columns named in `right` are aligned to the right.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>], right: &[usize]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (column, cell) in cells.enumerate().take(widths.len()) {
            let padding = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
            if column > 0 {
                text.push_str("  ");
            }
            if right.contains(&column) {
                text.push_str(&padding);
                text.push_str(cell);
            } else {
                text.push_str(cell);
                text.push_str(&padding);
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    };
    let mut text = line(&mut headings.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// Text from elsewhere, safe for a terminal: control characters could move the cursor, change colours or answer for the user.
pub(crate) fn without_controls(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_their_columns_and_end_no_line_in_spaces() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "100".to_owned()]];
        assert_eq!(table(&["NAME", "SIZE"], &rows, &[1]), "NAME  SIZE\na        1\nlong   100\n");
        let rows = vec![vec!["x".to_owned(), String::new()]];
        assert_eq!(table(&["N", "WHY"], &rows, &[]), "N  WHY\nx\n");
    }

    #[test]
    fn escape_sequences_of_a_model_do_not_reach_the_terminal() {
        assert_eq!(without_controls("a\x1b[31mred\x07\u{9b}\tb\n"), "a[31mred\tb\n");
    }
}
