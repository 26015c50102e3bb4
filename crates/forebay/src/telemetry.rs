//! Logs, to standard error: what a command produces belongs to standard output.

use std::io::IsTerminal as _;

use tracing_subscriber::{Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::{
    settings::{choices::LogFormat, groups::Process},
    terminal::Terminal,
};

/// Starts logging for the whole process. Lines are written as they come; nothing is left to flush at the end.
pub(crate) fn init(settings: &Process, terminal: Terminal) {
    let filter = settings.log_filter.filter();
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = match settings.log_format {
        // A terminal shows what happens now; a journal has its own clock but not our precision.
        LogFormat::Text => {
            layer.with_ansi(terminal.paint_err.on).with_target(!std::io::stderr().is_terminal()).boxed()
        }
        LogFormat::Json => {
            layer.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
        }
    };
    // Only a second call could fail, and there is none.
    let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
}
