//! Lines from a person or a pipe.
//!
//! Reading blocks, so it has a thread of its own, which reads a line only when one is asked for: a terminal is in raw
//! mode only meanwhile, and Ctrl-C during an answer is an ordinary signal. The thread is never joined: it may wait for a
//! line that nobody will type, and ends with the process.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Read as _},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use rustyline::{Config, Editor, error::ReadlineError, history::MemHistory};
use tokio::sync::mpsc;

/// One line has this many bytes at most.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Lines that the arrow keys bring back.
const RECALLED_LINES_MAX: usize = 500;

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-C at the prompt.
    Interrupted,
    /// Ctrl-D at the prompt, or the end of the pipe.
    End,
}

/// Where lines come from.
#[derive(Debug)]
pub(super) struct Input {
    asks: SyncSender<()>,
    lines: mpsc::Receiver<io::Result<Line>>,
    is_terminal: bool,
    /// A line was asked for and has not come: a dropped call of [`Input::next`] must not ask again.
    is_asked: bool,
}

impl Input {
    /// Standard input: with line editing if a person sits at it.
    pub(super) fn start() -> Self {
        let is_terminal = io::stdin().is_terminal();
        let (asks, asked) = sync_channel(1);
        let (sender, lines) = mpsc::channel(1);
        thread::spawn(move || if is_terminal { edit(&asked, &sender) } else { read(&asked, &sender) });
        Self { asks, lines, is_terminal, is_asked: false }
    }

    /// Whether a person sits at it.
    pub(super) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// The next line. Cancel-safe: a line that comes after the call was dropped is given to the next one.
    ///
    /// # Errors
    /// Standard input cannot be read, or a line is too long.
    pub(super) async fn next(&mut self) -> io::Result<Line> {
        if !self.is_asked && self.asks.try_send(()).is_err() {
            return Ok(Line::End);
        }
        self.is_asked = true;
        let line = self.lines.recv().await;
        self.is_asked = false;
        line.unwrap_or(Ok(Line::End))
    }
}

/// Serves lines from a pipe.
fn read(asked: &Receiver<()>, lines: &mpsc::Sender<io::Result<Line>>) {
    let mut stdin = io::stdin().lock();
    while asked.recv().is_ok() {
        let mut text = String::new();
        let line = match stdin.by_ref().take(LINE_BYTES_MAX + 1).read_line(&mut text) {
            Ok(0) => Ok(Line::End),
            Ok(length) if length as u64 > LINE_BYTES_MAX => Err(io::Error::other(format!(
                "a line is longer than {LINE_BYTES_MAX} bytes; use `-m -` for long questions"
            ))),
            Ok(_) => Ok(Line::Text(text)),
            Err(error) => Err(error),
        };
        if lines.blocking_send(line).is_err() {
            return;
        }
    }
}

/// Serves lines from a person, with editing and recall.
fn edit(asked: &Receiver<()>, lines: &mpsc::Sender<io::Result<Line>>) {
    let mut editor = editor();
    while asked.recv().is_ok() {
        let line = match &mut editor {
            Err(error) => Err(io::Error::other(error.to_string())),
            Ok(editor) => match editor.readline("> ") {
                Ok(text) => {
                    // Recall is a convenience: a line that cannot be remembered is still a line.
                    let _ = editor.add_history_entry(text.trim());
                    Ok(Line::Text(text))
                }
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(io::Error::other(error.to_string())),
            },
        };
        if lines.blocking_send(line).is_err() {
            return;
        }
    }
}

fn editor() -> rustyline::Result<Editor<(), MemHistory>> {
    let config = Config::builder().max_history_size(RECALLED_LINES_MAX)?.auto_add_history(false).build();
    let history = MemHistory::with_config(&config);
    Editor::with_history(config, history)
}
