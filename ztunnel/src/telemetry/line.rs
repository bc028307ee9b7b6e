//! The format of a log line: Istio's tab-separated text, or one JSON object.

use std::fmt::{self, Display, Write as _};
use std::str::FromStr;

use tracing::Level;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// `time level scope message k=v k="v"`, the first five separated by tabs.
    #[default]
    Plain,
    /// One object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            other => Err(format!("log format {other:?} is neither plain nor json")),
        }
    }
}

impl Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Json => "json",
        })
    }
}

/// Collects the fields of a line. Values are quoted so that none of their bytes can start another
/// field or line.
pub(crate) struct Fields {
    format: LogFormat,
    text: String,
}

impl Fields {
    pub(crate) fn new(format: LogFormat) -> Self {
        Self {
            format,
            text: String::with_capacity(512),
        }
    }

    /// Adds text, quoted in both formats.
    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        // Writing to a string never fails.
        let _ = match self.format {
            LogFormat::Plain => write!(self.text, "{value:?}"),
            LogFormat::Json => write!(self.text, "{}", serde_json::Value::from(value)),
        };
    }

    /// Adds a value that needs no quotes in plain text, such as an address: its syntax has neither
    /// spaces nor quotes.
    pub(crate) fn bare(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = match self.format {
            LogFormat::Plain => write!(self.text, "{value}"),
            LogFormat::Json => write!(self.text, "{}", serde_json::Value::from(value.to_string())),
        };
    }

    /// Adds a number.
    pub(crate) fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        let _ = write!(self.text, "{value}");
    }

    fn key(&mut self, key: &str) {
        let _ = match self.format {
            LogFormat::Plain if self.text.is_empty() => write!(self.text, "{key}="),
            LogFormat::Plain => write!(self.text, " {key}="),
            LogFormat::Json => write!(self.text, ",{}:", serde_json::Value::from(key)),
        };
    }

    /// The complete line, with the current time.
    pub(crate) fn line(self, level: Level, scope: &str, message: &str) -> String {
        let mut time = String::with_capacity(32);
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        self.line_at(&time, level, scope, message)
    }

    fn line_at(self, time: &str, level: Level, scope: &str, message: &str) -> String {
        let level = match level {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        match self.format {
            LogFormat::Plain if self.text.is_empty() => {
                format!("{time}\t{level}\t{scope}\t{}\n", Escaped(message))
            }
            LogFormat::Plain => format!(
                "{time}\t{level}\t{scope}\t{}\t{}\n",
                Escaped(message),
                self.text
            ),
            LogFormat::Json => format!(
                "{{\"level\":\"{level}\",\"time\":\"{time}\",\"scope\":{},\"message\":{}{}}}\n",
                serde_json::Value::from(scope),
                serde_json::Value::from(message),
                self.text
            ),
        }
    }
}

/// A message whose control characters, which could forge a field or a line, are escaped.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| {
            if c.is_control() {
                write!(f, "{}", c.escape_default())
            } else {
                f.write_char(c)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: LogFormat) -> String {
        let mut fields = Fields::new(format);
        fields.bare("src.addr", "10.0.0.1:80");
        fields.text("error", "bad \"name\"\nforged\tline");
        fields.number("bytes_sent", 7);
        fields.line_at(
            "2026-01-02T03:04:05.000006Z",
            Level::INFO,
            "access",
            "connection\ncomplete",
        )
    }

    #[test]
    fn plain_line_is_tab_separated_and_escapes_control_characters() {
        assert_eq!(
            line(LogFormat::Plain),
            "2026-01-02T03:04:05.000006Z\tinfo\taccess\tconnection\\ncomplete\t\
             src.addr=10.0.0.1:80 error=\"bad \\\"name\\\"\\nforged\\tline\" bytes_sent=7\n"
        );
    }

    #[test]
    fn json_line_is_one_object() {
        let parsed: serde_json::Value = serde_json::from_str(&line(LogFormat::Json)).unwrap();
        assert_eq!(parsed["level"], "info");
        assert_eq!(parsed["scope"], "access");
        assert_eq!(parsed["message"], "connection\ncomplete");
        assert_eq!(parsed["src.addr"], "10.0.0.1:80");
        assert_eq!(parsed["error"], "bad \"name\"\nforged\tline");
        assert_eq!(parsed["bytes_sent"], 7);
    }
}
