//! Where log lines go: to stdout through a bounded queue. A stalled reader does not block the
//! authority.

use std::io;
use std::str::FromStr;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Lines in the queue; further ones are dropped.
const MAX_QUEUED_LINES: usize = 16 * 1024;

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text for people.
    Plain,
    /// One JSON object per line.
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

/// Format and levels of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// The format of lines.
    pub format: Format,
    /// The levels, in the syntax of [`EnvFilter`].
    pub filter: String,
}

/// Starts the log. Dropping the guard writes the queued lines.
pub(super) fn install(config: &LogConfig) -> io::Result<WorkerGuard> {
    let filter = EnvFilter::try_new(&config.filter).map_err(io::Error::other)?;
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(MAX_QUEUED_LINES)
        .lossy(true)
        .finish(io::stdout());
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(writer);
    match config.format {
        Format::Plain => subscriber.try_init(),
        Format::Json => subscriber.json().flatten_event(true).try_init(),
    }
    .map_err(io::Error::other)?;
    Ok(guard)
}
