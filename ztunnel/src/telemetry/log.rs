//! The log: one writer thread behind a bounded queue that drops, and counts, what a stalled reader
//! does not take.

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

use super::line::{Fields, Format};

/// Lines that may wait for the writer: about 4 MB of access log, or a second of it at full load.
/// The daemon carries the node's traffic whether or not anybody reads its log, so past this lines
/// are dropped and counted.
const WAITING_LINES: usize = 10_000;

/// How much the writer gathers before it writes: many lines cost one system call under load, and a
/// single line is flushed at once.
const WRITE_BUFFER: usize = 64 * 1024;

/// How the log starts.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// How lines look.
    pub format: Format,
    /// Levels in the form of `RUST_LOG`, such as `info` or `info,access=off`.
    pub filter: String,
}

/// The levels cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Not the form of `RUST_LOG`.
    #[error("log level {filter:?} is not understood")]
    Filter {
        /// What was asked for.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Another part of the process has installed a log before.
    #[error("a log is installed already")]
    Installed(#[source] tracing::subscriber::SetGlobalDefaultError),
    /// The log has been taken down.
    #[error("the log has ended")]
    Ended(#[source] reload::Error),
}

/// The running log. Clones share it.
#[derive(Clone)]
pub struct Log {
    format: Format,
    writer: NonBlocking,
    dropped: ErrorCounter,
    filter: reload::Handle<EnvFilter, Registry>,
    initial: Arc<str>,
}

/// Writes what still waits when dropped; hold it until the process ends.
#[must_use = "dropping the guard ends the log"]
pub struct LogGuard(#[allow(dead_code)] WorkerGuard);

impl Log {
    /// Starts the log of the process on standard output.
    ///
    /// # Errors
    /// Fails if the levels are not understood, or a log is installed already.
    pub fn install(config: &LogConfig) -> Result<(Self, LogGuard), LogError> {
        let (log, subscriber, guard) = Self::to(io::stdout(), config)?;
        tracing::subscriber::set_global_default(subscriber).map_err(LogError::Installed)?;
        Ok((log, guard))
    }

    fn to(
        out: impl Write + Send + 'static,
        config: &LogConfig,
    ) -> Result<(Self, impl Subscriber + Send + Sync + 'static, LogGuard), LogError> {
        let (filter, handle) = reload::Layer::new(parse(&config.filter)?);
        let (writer, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(WAITING_LINES)
            .thread_name("log")
            .finish(io::BufWriter::with_capacity(WRITE_BUFFER, out));
        let lines = tracing_subscriber::fmt::layer()
            .event_format(Lines(config.format))
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

    /// Changes the levels, or returns to those of the start. Answers with what holds now.
    ///
    /// # Errors
    /// Fails, and changes nothing, if the levels are not understood.
    pub fn set(&self, filter: Option<&str>) -> Result<String, LogError> {
        let filter = parse(filter.unwrap_or(&self.initial))?;
        let now = filter.to_string();
        self.filter.reload(filter).map_err(LogError::Ended)?;
        Ok(now)
    }

    /// The levels that hold now.
    pub fn filter(&self) -> String {
        self.filter
            .with_current(ToString::to_string)
            .unwrap_or_default()
    }

    /// Lines that nobody took in time, since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped.dropped_lines() as u64
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// A whole line, past the levels. Never waits.
    pub(super) fn write(&self, line: &str) {
        // Each write is one entry of the queue; a full queue counts the line as dropped and is no
        // error.
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

/// Events as lines.
struct Lines(Format);

impl<S, N> FormatEvent<S, N> for Lines
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
        let mut visitor = Gather {
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

struct Gather {
    message: String,
    fields: Fields,
}

impl Visit for Gather {
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

    /// Takes nothing until released.
    struct Stalled(mpsc::Receiver<()>);

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct Memory(Arc<std::sync::Mutex<Vec<u8>>>);

    impl Write for Memory {
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
            format: Format::Plain,
            filter: filter.into(),
        }
    }

    #[test]
    fn a_reader_that_stalls_costs_lines_and_never_time() {
        let (release, stalled) = mpsc::channel();
        let (log, _subscriber, guard) = Log::to(Stalled(stalled), &config("info")).unwrap();
        let start = Instant::now();
        let line = "x".repeat(400) + "\n";
        for _ in 0..WAITING_LINES * 3 {
            log.write(&line);
        }
        // Three full queues are formatted and refused in milliseconds; a wait for the reader would
        // last for ever.
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(
            log.dropped() >= (WAITING_LINES * 2 - WAITING_LINES / 10) as u64,
            "dropped {}",
            log.dropped()
        );
        drop(release);
        drop(guard);
    }

    #[test]
    fn the_levels_change_while_the_log_runs_and_a_mistake_changes_nothing() {
        let memory = Memory::default();
        let (log, subscriber, guard) = Log::to(memory.clone(), &config("info")).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("hidden");
            assert!(log.set(Some("debug")).is_ok());
            tracing::debug!(pods = 3_u64, name = "a b", "shown");
            assert!(log.set(Some("nonsense=nonsense=")).is_err());
            tracing::debug!("shown too");
            assert_eq!(log.set(None).unwrap(), "info");
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
