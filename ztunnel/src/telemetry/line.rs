//! One line of log, in either format: Istio's tab-separated text, or one JSON object.

use std::fmt::{self, Display, Write as _};
use std::str::FromStr;

use tracing::Level;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `time level scope message k=v k="v"`, the first five separated by tabs.
    #[default]
    Plain,
    /// One object per line.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            other => Err(format!("log format {other:?} is neither plain nor json")),
        }
    }
}

impl Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Json => "json",
        })
    }
}

/// The fields of a line while they are gathered. Values are quoted so that no byte of them can
/// start another field or line.
pub(crate) struct Fields {
    format: Format,
    text: String,
}

impl Fields {
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            text: String::with_capacity(512),
        }
    }

    /// A value that is text: quoted in both formats.
    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        // Writing to a string cannot fail.
        let _ = match self.format {
            Format::Plain => write!(self.text, "{value:?}"),
            Format::Json => write!(self.text, "{}", serde_json::Value::from(value)),
        };
    }

    /// A value that needs no quotes in text, such as an address: its own syntax has neither spaces
    /// nor quotes.
    pub(crate) fn bare(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = match self.format {
            Format::Plain => write!(self.text, "{value}"),
            Format::Json => write!(self.text, "{}", serde_json::Value::from(value.to_string())),
        };
    }

    /// A number.
    pub(crate) fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        let _ = write!(self.text, "{value}");
    }

    fn key(&mut self, key: &str) {
        let _ = match self.format {
            Format::Plain if self.text.is_empty() => write!(self.text, "{key}="),
            Format::Plain => write!(self.text, " {key}="),
            Format::Json => write!(self.text, ",{}:", serde_json::Value::from(key)),
        };
    }

    /// The whole line, with the time of now.
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
            Format::Plain if self.text.is_empty() => {
                format!("{time}\t{level}\t{scope}\t{}\n", Escaped(message))
            }
            Format::Plain => format!(
                "{time}\t{level}\t{scope}\t{}\t{}\n",
                Escaped(message),
                self.text
            ),
            Format::Json => format!(
                "{{\"level\":\"{level}\",\"time\":\"{time}\",\"scope\":{},\"message\":{}{}}}\n",
                serde_json::Value::from(scope),
                serde_json::Value::from(message),
                self.text
            ),
        }
    }
}

/// A message without the control characters that could forge a field or a line.
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

    fn line(format: Format) -> String {
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
    fn a_plain_line_is_tab_separated_and_nothing_in_it_starts_another_line() {
        assert_eq!(
            line(Format::Plain),
            "2026-01-02T03:04:05.000006Z\tinfo\taccess\tconnection\\ncomplete\t\
             src.addr=10.0.0.1:80 error=\"bad \\\"name\\\"\\nforged\\tline\" bytes_sent=7\n"
        );
    }

    #[test]
    fn a_json_line_is_one_object() {
        let parsed: serde_json::Value = serde_json::from_str(&line(Format::Json)).unwrap();
        assert_eq!(parsed["level"], "info");
        assert_eq!(parsed["scope"], "access");
        assert_eq!(parsed["message"], "connection\ncomplete");
        assert_eq!(parsed["src.addr"], "10.0.0.1:80");
        assert_eq!(parsed["error"], "bad \"name\"\nforged\tline");
        assert_eq!(parsed["bytes_sent"], 7);
    }
}
