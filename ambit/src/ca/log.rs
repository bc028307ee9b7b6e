//! The log: one line per event, never waiting for its reader.

use std::io;
use std::str::FromStr;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Lines that wait for a reader that stalls; more are dropped.
const WAITING: usize = 16 * 1024;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Plain,
    /// For machines.
    Json,
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            _ => Err("it is neither plain nor json"),
        }
    }
}

/// How the log is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// How lines look.
    pub format: Format,
    /// Which lines there are, as `tracing` has it.
    pub filter: String,
}

/// Starts the log on stdout. What waits is written when the guard is dropped.
pub(super) fn install(config: &LogConfig) -> io::Result<WorkerGuard> {
    let filter = EnvFilter::try_new(&config.filter).map_err(io::Error::other)?;
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING)
        .lossy(true)
        .finish(io::stdout());
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(writer);
    match config.format {
        Format::Plain => lines.try_init(),
        Format::Json => lines.json().flatten_event(true).try_init(),
    }
    .map_err(io::Error::other)?;
    Ok(guard)
}
