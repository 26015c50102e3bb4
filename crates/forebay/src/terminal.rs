//! The terminal: the only place that writes to standard output and standard error.
//!
//! What a command produces goes to standard output, everything about it (questions, progress, figures, errors) to
//! standard error, so that pipes get the product alone.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Write as _},
};

/// When to colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ColorWhen {
    /// On terminals, unless `NO_COLOR` is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Standard output and standard error, and what they can show.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terminal {
    /// Standard output is a terminal.
    pub(crate) out_is_terminal: bool,
    /// How to paint what goes to standard output.
    pub(crate) paint_out: Paint,
    /// How to paint what goes to standard error.
    pub(crate) paint_err: Paint,
    columns: Option<usize>,
}

impl Terminal {
    /// Looks at this process's standard streams.
    pub(crate) fn of_this_process(when: ColorWhen, environment: &BTreeMap<String, String>) -> Self {
        let colored = |is_terminal: bool| match when {
            ColorWhen::Always => true,
            ColorWhen::Never => false,
            ColorWhen::Auto => is_terminal && allows_color(environment),
        };
        let out_is_terminal = io::stdout().is_terminal();
        let columns = environment.get("COLUMNS").and_then(|columns| columns.parse().ok());
        Self {
            out_is_terminal,
            paint_out: Paint { on: colored(out_is_terminal) },
            paint_err: Paint { on: colored(io::stderr().is_terminal()) },
            columns: columns.filter(|columns| *columns > 0),
        }
    }

    /// Columns that a line may take; `None` where nothing wraps, as in a pipe. Asked anew each time: windows change.
    pub(crate) fn width(&self) -> Option<usize> {
        let size = || terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        self.columns.or_else(|| if self.out_is_terminal { size() } else { None })
    }

    /// Writes to standard output, at once.
    ///
    /// # Errors
    /// The reader may have gone.
    pub(crate) fn out(&self, text: &str) -> io::Result<()> {
        let mut stream = io::stdout().lock();
        stream.write_all(text.as_bytes())?;
        stream.flush()
    }

    /// Writes to standard error. If that fails there is nobody left to tell.
    pub(crate) fn err(&self, text: &str) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Shows how far something is, on one line that the next call writes over; nothing where standard error is no terminal.
    /// An empty text clears the line.
    pub(crate) fn progress(&self, text: &str) {
        if io::stderr().is_terminal() {
            self.err(&format!("\r\x1b[K{text}"));
        }
    }

    /// Makes room for a new picture of the same thing: clears a terminal, separates with an empty line elsewhere.
    ///
    /// # Errors
    /// As [`Terminal::out`].
    pub(crate) fn next_picture(&self, is_first: bool) -> io::Result<()> {
        match (self.out_is_terminal, is_first) {
            // Cursor home, then erase to the end: no flicker, and the scroll-back stays.
            (true, false) => self.out("\x1b[H\x1b[J"),
            (true, true) => self.out("\x1b[2J\x1b[H"),
            (false, false) => self.out("\n"),
            (false, true) => Ok(()),
        }
    }
}

/// <https://no-color.org>: any value but the empty one means no colour. A dumb terminal has none either.
fn allows_color(environment: &BTreeMap<String, String>) -> bool {
    environment.get("NO_COLOR").is_none_or(String::is_empty)
        && environment.get("TERM").is_none_or(|term| term != "dumb")
}

/// What a piece of text is, which decides its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Tone {
    /// As it is.
    #[default]
    Plain,
    /// A title, or the row that matters.
    Strong,
    /// Beside the point.
    Faint,
    /// As it should be.
    Good,
    /// Worth a look.
    Warning,
    /// Wrong.
    Bad,
}

/// Turns tones into escape sequences, or into nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Paint {
    /// Whether there is colour.
    pub(crate) on: bool,
}

impl Paint {
    /// Without colour, for tests and files.
    #[cfg(test)]
    pub(crate) const NONE: Paint = Paint { on: false };

    /// `text` in its tone.
    pub(crate) fn tone(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Strong => "1",
            Tone::Faint => "2",
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Plain => "",
        };
        if !self.on || code.is_empty() { text.to_owned() } else { format!("\x1b[{code}m{text}\x1b[0m") }
    }
}

/// Text from elsewhere without what could steer a terminal: control characters other than new lines and tabs.
pub(crate) fn without_controls(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn color_follows_the_environment() {
        let check = |variables: &[(&str, &str)], expected: bool| {
            let environment = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            assert_eq!(allows_color(&environment), expected, "{variables:?}");
        };
        check(&[], true);
        check(&[("TERM", "xterm")], true);
        check(&[("NO_COLOR", "")], true);
        check(&[("NO_COLOR", "1")], false);
        check(&[("NO_COLOR", "0")], false);
        check(&[("TERM", "dumb")], false);
    }

    #[test]
    fn text_from_elsewhere_cannot_steer_the_terminal() {
        assert_eq!(without_controls("a\x1b[2Jb\r\n\tc\u{9b}d\x07é"), "a[2Jb\n\tcdé");
    }
}
