//! The log: one writer thread behind a bounded queue. If the reader of standard output stalls,
//! lines are dropped and counted.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use component::ErrorChain;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Registry, reload};

use super::line::{Fields, LogFormat};

/// Lines that may wait for the writer: about 4 MB of access log, or a second of it at full load. A
/// stalled reader must not stop the node's traffic, so above this lines are dropped and counted.
const MAX_QUEUED_LINES: usize = 10_000;

/// The writer's buffer. Under load many lines share one system call; a single line is flushed at
/// once.
const WRITE_BUFFER_BYTES: usize = 64 * 1024;

/// The configuration of the log.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// The format of its lines.
    pub format: LogFormat,
    /// Levels in `RUST_LOG` syntax, such as `info` or `info,access=off`.
    pub filter: String,
}

/// Why the log cannot be installed or its levels not be changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The levels are not in `RUST_LOG` syntax.
    #[error("invalid log level {filter:?}: use a level or target=level, separated by commas")]
    Filter {
        /// The requested levels.
        filter: String,
        /// The syntax error.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// The process has a log already.
    #[error("the process has a log already")]
    Installed(#[source] tracing::subscriber::SetGlobalDefaultError),
    /// The log was shut down.
    #[error("the log was shut down")]
    ShutDown(#[source] reload::Error),
}

/// A handle to the log. Clones share it.
#[derive(Clone)]
pub struct Log {
    format: LogFormat,
    writer: NonBlocking,
    dropped: ErrorCounter,
    filter: reload::Handle<EnvFilter, Registry>,
    initial: Arc<str>,
}

/// Flushes the queue on drop; keep it until the process ends.
#[must_use = "dropping the guard shuts the log down"]
pub struct LogGuard(#[allow(dead_code)] WorkerGuard);

impl Log {
    /// Installs the log of the process, on standard output.
    ///
    /// # Errors
    /// Fails if the levels are invalid, or the process has a log already.
    pub fn install(config: &LogConfig) -> Result<(Self, LogGuard), LogError> {
        let (log, subscriber, guard) = Self::new(io::stdout(), config)?;
        tracing::subscriber::set_global_default(subscriber).map_err(LogError::Installed)?;
        Ok((log, guard))
    }

    fn new(
        out: impl Write + Send + 'static,
        config: &LogConfig,
    ) -> Result<(Self, impl Subscriber + Send + Sync + 'static, LogGuard), LogError> {
        let (filter, handle) = reload::Layer::new(parse(&config.filter)?);
        let (writer, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(MAX_QUEUED_LINES)
            .thread_name("log")
            .finish(io::BufWriter::with_capacity(WRITE_BUFFER_BYTES, out));
        let lines = tracing_subscriber::fmt::layer()
            .event_format(LineFormatter(config.format))
            .with_writer(writer.clone());
        let log = Self {
            format: config.format,
            dropped: writer.error_counter(),
            writer,
            filter: handle,
            initial: config.filter.as_str().into(),
        };
        Ok((
            log,
            Registry::default().with(filter).with(lines),
            LogGuard(guard),
        ))
    }

    /// Changes the levels, or restores the configured ones. Returns the levels now in force.
    ///
    /// # Errors
    /// Fails, and changes nothing, if the levels are invalid.
    pub fn set_filter(&self, filter: Option<&str>) -> Result<String, LogError> {
        let filter = parse(filter.unwrap_or(&self.initial))?;
        let now = filter.to_string();
        self.filter.reload(filter).map_err(LogError::ShutDown)?;
        Ok(now)
    }

    /// The levels in force.
    pub fn filter(&self) -> String {
        self.filter
            .with_current(ToString::to_string)
            .unwrap_or_default()
    }

    /// Lines dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped.dropped_lines() as u64
    }

    pub(super) fn format(&self) -> LogFormat {
        self.format
    }

    /// Writes a complete line, without a check of its level. Never waits.
    pub(super) fn write(&self, line: &str) {
        // Each write is one entry of the queue. A full queue is no error: the line counts as
        // dropped.
        let _ = self.writer.clone().write_all(line.as_bytes());
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("format", &self.format)
            .field("dropped", &self.dropped())
            .finish_non_exhaustive()
    }
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|source| LogError::Filter {
            filter: filter.into(),
            source,
        })
}

/// Formats tracing events as lines.
struct LineFormatter(LogFormat);

impl<S, N> FormatEvent<S, N> for LineFormatter
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut visitor = EventVisitor {
            message: String::new(),
            fields: Fields::new(self.0),
        };
        event.record(&mut visitor);
        let metadata = event.metadata();
        let level: Level = *metadata.level();
        writer.write_str(
            &visitor
                .fields
                .line(level, metadata.target(), &visitor.message),
        )
    }
}

struct EventVisitor {
    message: String,
    fields: Fields,
}

impl Visit for EventVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        self.record_str(field, &text);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => self.fields.text(name, value),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.fields.number(field.name(), value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.fields
            .text(field.name(), &ErrorChain(value).to_string());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    /// Blocks until its channel is closed.
    struct StalledWriter(mpsc::Receiver<()>);

    impl Write for StalledWriter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct MemoryWriter(Arc<std::sync::Mutex<Vec<u8>>>);

    impl Write for MemoryWriter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn config(filter: &str) -> LogConfig {
        LogConfig {
            format: LogFormat::Plain,
            filter: filter.into(),
        }
    }

    #[test]
    fn stalled_reader_drops_lines_and_never_blocks() {
        let (release, stalled) = mpsc::channel();
        let (log, _subscriber, guard) = Log::new(StalledWriter(stalled), &config("info")).unwrap();
        let start = Instant::now();
        let line = "x".repeat(400) + "\n";
        for _ in 0..MAX_QUEUED_LINES * 3 {
            log.write(&line);
        }
        // Three queues of lines are formatted and dropped in milliseconds; a wait for the reader
        // would not end.
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(
            log.dropped() >= (MAX_QUEUED_LINES * 2 - MAX_QUEUED_LINES / 10) as u64,
            "dropped {}",
            log.dropped()
        );
        drop(release);
        drop(guard);
    }

    #[test]
    fn levels_change_at_runtime_and_invalid_levels_change_nothing() {
        let memory = MemoryWriter::default();
        let (log, subscriber, guard) = Log::new(memory.clone(), &config("info")).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("hidden");
            assert!(log.set_filter(Some("debug")).is_ok());
            tracing::debug!(pods = 3_u64, name = "a b", "shown");
            assert!(log.set_filter(Some("nonsense=nonsense=")).is_err());
            tracing::debug!("shown too");
            assert_eq!(log.set_filter(None).unwrap(), "info");
            tracing::debug!("hidden again");
        });
        drop(guard);
        let written = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let rest: Vec<_> = written
            .lines()
            .map(|line| line.split_once('\t').unwrap().1)
            .collect();
        assert_eq!(
            rest,
            [
                "debug\tztunnel::telemetry::log::tests\tshown\tpods=3 name=\"a b\"",
                "debug\tztunnel::telemetry::log::tests\tshown too"
            ]
        );
    }
}
